"""Products of a mixture of experts against `jax.lax.ragged_dot`, which they equal.

    python benchmarks/experts.py

2,048 or 8,192 copies of tokens, which go to 8 or to 64 experts at random. Both sides take turns.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from common import seconds

from jaxpref.models.grouped import grouped_product

# Copies of tokens, experts, and the width of what comes in and goes out.
CASES = [(2048, 8, 512, 1024), (8192, 64, 512, 256)]


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    rounds = parser.parse_args().rounds
    print("| case | | ours ms | ragged_dot ms | ratio | ours MB | ragged_dot MB |")
    print("|---|---|---|---|---|---|---|")
    for copies, experts, inputs, outputs in CASES:
        random = np.random.default_rng(0)
        sizes = np.bincount(random.integers(experts, size=copies), minlength=experts)
        keys = jax.random.split(jax.random.key(0), 2)
        given = (
            jax.random.normal(keys[0], (copies, inputs)),
            jax.random.normal(keys[1], (experts, inputs, outputs)),
            jnp.asarray(sizes, jnp.int32),
        )
        for name, of in (
            ("forward", lambda product: product),
            ("gradients", lambda product: jax.grad(lambda *x: (product(*x) ** 2).sum(), (0, 1))),
        ):
            sides = [
                jax.jit(of(product)).lower(*given).compile()
                for product in (grouped_product, jax.lax.ragged_dot)
            ]
            for ours, theirs in zip(
                *(jax.tree.leaves(side(*given)) for side in sides), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))
            times = [[seconds(side, *given) for side in sides] for _ in range(rounds)]
            ours, theirs = (statistics.median(side) for side in zip(*times, strict=True))
            ratio = statistics.median(their / our for our, their in times)
            memory = [side.memory_analysis().temp_size_in_bytes / 1e6 for side in sides]
            print(
                f"| {copies} to {experts} experts, {inputs} to {outputs} | {name} | "
                f"{1e3 * ours:.1f} | {1e3 * theirs:.1f} | {ratio:.1f} | {memory[0]:.0f} | "
                f"{memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
