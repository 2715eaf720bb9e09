"""Attention over packed rows against `jax.nn.dot_product_attention` under the same masks.

    python benchmarks/attention.py

16 rows of 512 tokens, 8 query heads and 4 key heads of 64, in blocks of 128 queries. Both sides
make the mask of a block at a time and keep nothing for the backward pass; they take turns.
"""

import argparse
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from common import seconds

from jaxpref.models.attention import attention
from jaxpref.packing import Group, Seats, pack, sees

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM, BLOCK = 16, 512, 8, 4, 64, 128


def theirs(query: jax.Array, key: jax.Array, value: jax.Array, seats: Seats) -> jax.Array:
    """The same blocks, by JAX's own attention."""

    @jax.checkpoint
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, seen: Seats) -> jax.Array:
        end = key.shape[1]
        queries, keys = seen.between(end - query.shape[1], end), seen.between(0, end)
        mask = sees(queries, keys)[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask)

    return jnp.concatenate(
        [
            attend(
                query[:, start : start + BLOCK],
                *(x[:, : start + BLOCK] for x in (key, value)),
                seats,
            )
            for start in range(0, LENGTH, BLOCK)
        ],
        axis=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns that each side takes")
    rounds = parser.parse_args().rounds
    group = Group(np.ones(56, int), [np.ones(100, int)] * 2)
    batch = jax.tree.map(jnp.asarray, pack([group] * 2 * ROWS, row_length=LENGTH))
    assert batch.tokens.shape == (ROWS, LENGTH)
    seats = Seats(jnp.arange(LENGTH), batch.positions, batch.tree)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [
        jax.random.normal(key, (ROWS, LENGTH, heads, HEAD_DIM))
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    ]

    def ours(query: jax.Array, key: jax.Array, value: jax.Array, seats: Seats) -> jax.Array:
        return attention(query, key, value, seats, block_size=BLOCK)

    for name, of in (
        ("forward", lambda attend: attend),
        ("gradients", lambda attend: jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2))),
    ):
        sides = [jax.jit(of(attend)) for attend in (ours, theirs)]
        found = [side(*inputs, seats) for side in sides]
        worst = max(
            float(jnp.abs(a - b).max() / jnp.abs(b).max())
            for a, b in zip(*map(jax.tree.leaves, found), strict=True)
        )
        times = [[seconds(side, *inputs, seats) for side in sides] for _ in range(rounds)]
        our, their = (statistics.median(side) for side in zip(*times, strict=True))
        print(
            f"{name}: {1e3 * our:.1f} ms, dot_product_attention {1e3 * their:.1f} ms, "
            f"{their / our:.2f} times; largest relative difference {worst:.0e}"
        )


if __name__ == "__main__":
    main()
