"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.inputs import in_float32


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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
      frequencies: angle by which each pair of a head turns from one position to the next;
        fewer than `head_dim / 2` leave the rest of the head as it is.
      scale: multiplies cosines and sines.
      interleaved: pairs are neighbours (GPT-J) rather than halves.
      limit: positions from here on give NaN, since the frequencies are not made for them
        (LongRoPE's short factors); 0 for none.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    limit: int = 0

    def angles(self, positions: Int[Array, "rows length"]) -> tuple[Array, Array]:
        """Cosines and sines for tokens at these positions."""
        cos, sin = rotary_angles(positions, jnp.asarray(self.frequencies), self.scale)
        if not self.limit:
            return cos, sin
        within = (positions < self.limit)[..., None, None]
        return jnp.where(within, cos, jnp.nan), jnp.where(within, sin, jnp.nan)
