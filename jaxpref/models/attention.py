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
        mask = sees(queries, keys, window)
        if soft_cap is None and query.dtype != jnp.float64:
            return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)
        return _written_out(query, key, value, mask, scale, soft_cap)

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


def _written_out(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    scale: float | None,
    soft_cap: float | None,
) -> Array:
    """With what `jax.nn.dot_product_attention` lacks: bounded scores, a softmax in float64."""
    rows, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("rqkgd,rskd->rkgqs", grouped, key, preferred_element_type=dtype)
    scores *= head_dim**-0.5 if scale is None else scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("rkgqs,rskd->rqkgd", weights, value).reshape(query.shape)
