"""Weights in four bits: NormalFloat, as QLoRA keeps its frozen base (arXiv 2305.14314).

Sixteen levels at quantiles of the normal distribution, one scale for a block of 64 weights.
Two codes share a byte, so that arrays of any backend and of Orbax can hold them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4:
    """An array in four bits a value, in blocks along its last axis.

    Attributes:
      codes: `[*axes, last / 2]` of uint8: two levels a byte, the first in the low half.
      scales: `[*axes, last / block]`: the largest magnitude of each block.
    """

    # Arrays, or what JAX puts in their place: shapes, shardings, None.
    codes: Any
    scales: Any

    def dequantize(self, dtype: Any) -> Array:
        """The values, up to the rounding to levels."""
        codes = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1)
        blocked = codes.reshape(*self.scales.shape, -1)
        values = jnp.asarray(levels())[blocked] * self.scales[..., None].astype(jnp.float32)
        return values.reshape(*self.codes.shape[:-1], -1).astype(dtype)


@functools.cache
def levels() -> np.ndarray:
    """The sixteen levels, from -1 to 1 (QLoRA, appendix E): quantiles of the normal, and 0."""
    from scipy.stats import norm

    # The mean of the two outermost probabilities that leave out the same tail on each side.
    outermost = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = norm.ppf(np.linspace(outermost, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(outermost, 0.5, 8)[:-1])
    both = np.sort(np.concatenate([positive, [0.0], negative]))
    return (both / both.max()).astype(np.float32)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be kept in blocks of 64."""
    return len(shape) > 1 and shape[-1] % _block(shape) == 0 and shape[-1] % 2 == 0


@jax.jit
def quantize(x: Array) -> Nf4:
    """Rounds each value to the nearest level of its block.

    Args:
      x: an array that `fits`.
    """
    blocked = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, _block(x.shape))
    scales = jnp.abs(blocked).max(axis=-1)
    share = blocked / jnp.where(scales > 0, scales, 1)[..., None]
    middles = (levels()[1:] + levels()[:-1]) / 2
    codes = (share[..., None] > jnp.broadcast_to(middles, (*share.shape, 15))).sum(
        axis=-1, dtype=jnp.uint8
    )
    codes = codes.reshape(x.shape)
    return Nf4(codes[..., ::2] | codes[..., 1::2] << 4, scales.astype(jnp.bfloat16))


def abstract(x: Array | jax.ShapeDtypeStruct) -> Nf4:
    """Shapes, dtypes and shardings of what `quantize` makes of an array of this shape."""
    *axes, last = x.shape
    blocks = last // _block(x.shape)
    sharding = x.sharding
    if isinstance(sharding, NamedSharding):
        *spec, of_last = (*sharding.spec, *(None,) * len(x.shape))[: len(x.shape)]
        # The last axis is split between blocks, or not at all.
        split = NamedSharding(sharding.mesh, PartitionSpec(of_last)).shard_shape
        whole = blocks % (last // split((last,))[0])
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec, None if whole else of_last))
    return Nf4(
        jax.ShapeDtypeStruct((*axes, last // 2), jnp.uint8, sharding=sharding),
        jax.ShapeDtypeStruct((*axes, blocks), jnp.bfloat16, sharding=sharding),
    )


def _block(shape: tuple[int, ...]) -> int:
    return min(BLOCK, shape[-1])
