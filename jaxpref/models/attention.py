"""Attention over rows, with any mask that never looks ahead."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def rotary_angles(
    positions: Array, head_dim: int, theta: float
) -> tuple[Float[Array, "rows length 1 half"], Float[Array, "rows length 1 half"]]:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "rows length heads head_dim"],
    cos: Float[Array, "rows length 1 half"],
    sin: Float[Array, "rows length 1 half"],
) -> Float[Array, "rows length heads head_dim"]:
    """Rotates the first half of each head against the second, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(
    query: Float[Array, "rows length heads head_dim"],
    key: Float[Array, "rows length kv_heads head_dim"],
    value: Float[Array, "rows length kv_heads head_dim"],
    mask: Bool[Array, "rows length length"],
    *,
    block_size: int = 128,
) -> Float[Array, "rows length heads head_dim"]:
    """Softmax attention with grouped queries; scores and softmax in float32.

    Args:
      query: queries, already rotated.
      key: keys; query head `h` uses key head `h // (heads // kv_heads)`.
      value: values.
      mask: `[row, query, key]`, True where the query sees the key. No query may see a
        later key, so that a block of queries need not compute the keys after it.
      block_size: queries a block.

    Returns:
      The weighted values, in the queries' dtype.
    """
    length = query.shape[1]
    blocks = []
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        blocks.append(
            _attend(
                query[:, start:end], key[:, :end], value[:, :end], mask[:, None, start:end, :end]
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


@jax.checkpoint
def _attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Keeps nothing for the backward pass, where the scores are computed again."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask)
