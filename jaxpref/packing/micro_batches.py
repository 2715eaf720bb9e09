"""The micro-batches of a batch one after the other, in one compiled loop.

Those at the end without any response are not computed, so that one program serves any number of
them up to the length of the leading axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxpref.packing.batch import PackedBatch

# A function of a micro-batch and of its number.
OfMicroBatch = Callable[[PackedBatch, Int[Array, ""]], Any]


def sum_micro_batches(function: OfMicroBatch, batch: PackedBatch) -> Any:
    """The sum of `function` over the leading axis of a batch."""

    def add(index: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, function(_part(batch, index), index))

    if len(batch.tokens) == 1:
        return function(_part(batch, 0), jnp.zeros((), jnp.int32))
    return _loop(batch, add, function, ())


def map_micro_batches(function: OfMicroBatch, batch: PackedBatch) -> Any:
    """What `function` gives for each micro-batch, stacked; zeros where it is not computed."""

    def put(index: Array, found: Any) -> Any:
        one = function(_part(batch, index), index)
        return jax.tree.map(lambda all, x: all.at[index].set(x), found, one)

    return _loop(batch, put, function, (len(batch.tokens),))


def _part(batch: PackedBatch, index: Array | int) -> PackedBatch:
    return jax.tree.map(lambda x: jnp.asarray(x)[index], batch)


def _loop(
    batch: PackedBatch,
    body: Callable[[Array, Any], Any],
    function: OfMicroBatch,
    leading: tuple[int, ...],
) -> Any:
    shapes = jax.eval_shape(function, _part(batch, 0), jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), shapes)
    held = (jnp.asarray(batch.lengths) > 0).any(axis=(1, 2)).sum()
    return jax.lax.fori_loop(0, held, body, zeros)
