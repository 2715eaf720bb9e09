"""Attention over rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.packing import Seats, sees


def attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    seats: Seats,
    *,
    window: Int[Array, ""] | int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    block_size: int = 128,
) -> Float[Array, "rows length heads head_dim"]:
    """Softmax attention with grouped queries; scores and softmax in at least float32.

    Who sees whom comes as seats, not as a mask, and each implementation makes of them what it
    needs. This one goes through the queries block by block, and makes the mask of one block at
    a time, again in the backward pass: an array of all pairs of tokens never exists. Another
    one is a function of the same arguments (but `block_size`), and is compared with this one.

    Args:
      query: queries, already rotated.
      key: keys; query head `h` uses key head `h // (heads // kv_heads)`.
      value: values.
      seats: of the tokens, with an order that rises along the row, so that a block of queries
        need not compute the keys after it.
      window: see `packing.sees`.
      scale: of the scores; by default `head_dim ** -0.5`.
      soft_cap: bounds the scores to `soft_cap * tanh(score / soft_cap)`; None for none.
      block_size: queries a block.

    Returns:
      The weighted values, in the queries' dtype.
    """

    @jax.checkpoint
    def attend(
        query: Array,
        key: Array,
        value: Array,
        queries: Seats,
        keys: Seats,
        window: Array | int | None,
    ) -> Array:
        # Keeps nothing for the backward pass, where mask and scores are computed again.
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        # With heads first the products need no other order of their operands.
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        scores = jnp.einsum("rhqd,rhkd->rhqk", query, key, preferred_element_type=dtype)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        if soft_cap is not None:
            scores, factor = soft_cap * jnp.tanh(scores * (factor / soft_cap)), 1.0
        # The mask is added: on CPUs XLA fuses an addition with the products, but not a choice.
        # Half of the lowest number leaves room for the score.
        scores += jnp.where(sees(queries, keys, window), 0, jnp.finfo(dtype).min / 2)[:, None]
        highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(factor * (scores - highest))
        found = jnp.einsum(
            "rhqk,rhkd->rhqd", weights.astype(value.dtype), value, preferred_element_type=dtype
        )
        # To divide what is found is less work than to divide every weight.
        return (found / weights.sum(axis=-1, keepdims=True)).astype(value.dtype).swapaxes(1, 2)

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    length, blocks = query.shape[1], []
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        blocks.append(
            attend(
                query[:, start:end],
                key[:, :end],
                value[:, :end],
                seats.between(start, end),
                seats.between(0, end),
                window,
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
