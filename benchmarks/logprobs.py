"""Blockwise log-probs against full logits: memory and time, forward and backward, float32.

    python benchmarks/logprobs.py

4,096 tokens, vocabulary 131,072, width 1,024. Memory is what a compiled function takes
beyond its inputs and its gradients: XLA's own figure, and the growth of the process's
resident memory. Each side has a process of its own; the sides take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

TOKENS, VOCABULARY, WIDTH = 4096, 131_072, 1024
SIDES = ("full", "blockwise")


def measure(side: str, repeats: int) -> dict[str, Any]:
    """Times one side and weighs its memory."""
    import jax
    import jax.numpy as jnp
    from common import forget_peak, matmul_flops_per_second, peak_bytes, seconds

    from jaxpref import logprobs

    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH))
    kernel = 0.02 * jax.random.normal(keys[1], (VOCABULARY, WIDTH))
    targets = jax.random.randint(keys[2], (TOKENS,), 0, VOCABULARY)
    weights = jnp.linspace(0.5, 1.5, TOKENS)

    def full(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return (weights * logprobs.from_logits(hidden @ kernel.T, targets)).sum()

    def blockwise(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        head = logprobs.LMHead(kernel)
        return (weights * logprobs.token_logprobs(hidden, head, targets)).sum()

    function = jax.jit(jax.value_and_grad({"full": full, "blockwise": blockwise}[side], (0, 1)))
    rate = matmul_flops_per_second()
    jax.block_until_ready((hidden, kernel, targets))
    compiled = function.lower(hidden, kernel).compile()
    forget_peak()
    before, gradients = peak_bytes(), hidden.nbytes + kernel.nbytes
    value, (_, by_kernel) = compiled(hidden, kernel)
    result = {"value": float(value), "norm": float(jnp.linalg.norm(by_kernel))}
    grown = max(peak_bytes() - before - gradients, 0)
    del by_kernel
    return {
        **result,
        "seconds": statistics.median(seconds(compiled, hidden, kernel) for _ in range(repeats)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "grown_bytes": grown,
        "matmul_flops_per_second": rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="calls timed a process")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side takes")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.repeats)))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, f"--side={side}", f"--repeats={args.repeats}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[side].append(json.loads(done.stdout))
            print(f"round {turn + 1}: {side:10} {results[side][-1]['seconds']:.2f} s", flush=True)
    report(results)


def report(results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, ratios, and the distance to the limit."""
    from common import describe_machine

    middle = {
        side: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for side, rounds in results.items()
    }
    time_ratio = statistics.median(
        b["seconds"] / f["seconds"]
        for b, f in zip(results["blockwise"], results["full"], strict=True)
    )
    flops = 3 * 2 * TOKENS * VOCABULARY * WIDTH
    print(f"\n{describe_machine()}\n")
    print("| side | seconds | of the limit | temporary MiB (XLA) | grown MiB (resident) |")
    print("|---|---|---|---|---|")
    for side, figures in middle.items():
        limit = flops / figures["matmul_flops_per_second"]
        print(
            f"| {side} | {figures['seconds']:.2f} | {limit / figures['seconds']:.2f} "
            f"| {figures['temporary_bytes'] / 2**20:.0f} | {figures['grown_bytes'] / 2**20:.0f} |"
        )
    memory = middle["blockwise"]["temporary_bytes"] / middle["full"]["temporary_bytes"]
    print(f"\nblockwise / full: time {time_ratio:.2f}, memory {memory:.4f} (1/{1 / memory:.0f})")
    print(
        f"values {middle['full']['value']:.4f} and {middle['blockwise']['value']:.4f}, gradient "
        f"norms {middle['full']['norm']:.6f} and {middle['blockwise']['norm']:.6f}\n"
        f"The limit: one forward and two backward products ({flops / 1e12:.1f} TFLOP) at the rate "
        "of a matrix product measured beside."
    )


if __name__ == "__main__":
    main()
