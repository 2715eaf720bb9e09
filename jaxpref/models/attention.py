"""Attention over rows, and rotary position embeddings."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.inputs import in_float32
from jaxpref.packing import Seats, sees


def rotary_angles(
    positions: Int[Array, "rows length"], frequencies: Float[Array, " half"], scale: float = 1.0
) -> tuple[Float[Array, "rows length 1 half"], Float[Array, "rows length 1 half"]]:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

    Args:
      positions: position of each token.
      frequencies: angle by which each pair turns from one position to the next.
      scale: multiplies both (YaRN's attention factor, arXiv 2309.00071, section 3.4).
    """
    angles = positions[..., None, None].astype(frequencies.dtype) * frequencies[None, None, None]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "rows length heads head_dim"],
    cos: Float[Array, "rows length 1 half"],
    sin: Float[Array, "rows length 1 half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "rows length heads head_dim"]:
    """Rotates the first `2 * half` entries of each head, in at least float32; the others stay.

    Args:
      x: queries or keys.
      cos: cosines of each pair's angle.
      sin: sines of each pair's angle.
      interleaved: pairs are neighbours, as in GPT-J; else the first half turns against
        the second, as in GPT-NeoX and after it.
    """
    rotated = 2 * cos.shape[-1]
    turning, still = in_float32(x[..., :rotated]), x[..., rotated:]
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        turned = jnp.stack([first, second], axis=-1).reshape(turning.shape)
    else:
        turned = jnp.concatenate([first, second], axis=-1)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, still], axis=-1) if still.shape[-1] else turned


def attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows keys kv_heads head_dim"],
    value: Float[Array, "rows keys kv_heads head_dim"],
    queries: Seats,
    keys: Seats | None = None,
    *,
    window: Int[Array, ""] | None = None,
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
      queries: seats of the queries.
      keys: seats of the keys. None if they are the queries' own tokens, with an order that
        rises along the row, so that a block of queries need not compute the keys after it.
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
        window: Array | None,
    ) -> Array:
        # Keeps nothing for the backward pass, where mask and scores are computed again.
        mask = sees(queries, keys, window)
        if soft_cap is None and query.dtype != jnp.float64:
            return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)
        return _written_out(query, key, value, mask, scale, soft_cap)

    length, blocks = query.shape[1], []
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        seen, seats = (end, queries) if keys is None else (key.shape[1], keys)
        blocks.append(
            attend(
                query[:, start:end],
                key[:, :seen],
                value[:, :seen],
                queries.between(start, end),
                seats.between(0, seen),
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
