"""Keys and values of tokens that a decoder has seen, for decoding step by step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpref.models.config import DecoderConfig
from jaxpref.packing import Seats, Tree


class Cache(NamedTuple):
    """Keys and values of what a row has seen, for decoding step by step.

    Attributes:
      keys: rotated keys of every layer.
      values: values of every layer.
      positions: position of each slot's token.
      filled: slots that hold a token, rather than padding or nothing.
      used: slots that have been written, the same in every row.
    """

    keys: Float[Array, "layers rows slots kv_heads head_dim"]
    values: Float[Array, "layers rows slots kv_heads head_dim"]
    positions: Int[Array, "rows slots"]
    filled: Bool[Array, "rows slots"]
    used: Int[Array, ""]


def empty_cache(config: DecoderConfig, rows: int, slots: int) -> Cache:
    """A cache with room for `slots` tokens a row."""
    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    dtype = jnp.dtype(config.dtype)
    return Cache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((rows, slots), jnp.int32),
        filled=jnp.zeros((rows, slots), bool),
        used=jnp.zeros((), jnp.int32),
    )


def write_slots(slots: Array, new: Array, used: Array | None) -> Array:
    """Writes new keys or values after those in use."""
    assert used is not None
    zero = jnp.zeros_like(used)
    return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), (zero, used, zero, zero))


def slot_seats(slots: Array, positions: Array, present: Array | np.ndarray) -> Seats:
    """Seats of tokens in a cache, where what is not `present` is padding, or not written yet.

    Padding is a branch of its own, slot by slot: it sees what is before it and itself, and
    nobody else sees it.
    """
    branch = jnp.where(present, 0, -1 - slots[None])
    return Seats(slots, positions, Tree(jnp.ones_like(branch), branch))
