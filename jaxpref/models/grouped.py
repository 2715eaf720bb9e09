"""Products in which each run of rows has a weight of its own, as in a mixture of experts."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows of a block, at least and at most.
_FEWEST, _MOST = 128, 1024


def grouped_product(
    rows: Float[Array, "rows inputs"],
    weights: Float[Array, "groups inputs outputs"],
    sizes: Int[Array, " groups"],
) -> Float[Array, "rows outputs"]:
    """Each row times the weight of its group.

    It is what `jax.lax.ragged_dot` says, which TPUs have a kernel for. Its gradient for the
    weights, and on other devices all of it, XLA computes with every row for every group. Here
    blocks of rows are taken one after the other, each with its group alone.

    Args:
      rows: sorted by group.
      weights: of the groups.
      sizes: how many rows each group has; together all.
    """
    if not len(rows):
        return jnp.zeros_like(rows, shape=(0, weights.shape[2]))
    return _grouped(rows, weights, sizes)


@jax.custom_vjp
def _grouped(rows: Array, weights: Array, sizes: Array) -> Array:
    of_blocks = partial(_product, of=lambda x, weight: x @ weight)
    return jax.lax.platform_dependent(
        rows, weights, sizes, tpu=jax.lax.ragged_dot, default=of_blocks
    )


def _grouped_forward(rows: Array, weights: Array, sizes: Array) -> tuple[Array, Any]:
    return _grouped(rows, weights, sizes), (rows, weights, sizes)


def _grouped_backward(kept: Any, gradient: Array) -> tuple[Any, ...]:
    rows, weights, sizes = kept
    of_rows = jax.lax.platform_dependent(
        gradient,
        weights,
        sizes,
        tpu=lambda x, weights, sizes: jax.lax.ragged_dot(x, weights.swapaxes(1, 2), sizes),
        default=partial(_product, of=lambda x, weight: x @ weight.T),
    )
    return of_rows, _of_weights(rows, gradient, sizes), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


class _Blocks(NamedTuple):
    """Blocks of rows; some at the end may have none.

    Attributes:
      group: that all rows of the block belong to.
      start: its first row.
      stop: the row after its last one.
      first: whether it is the first block of its group.
    """

    group: Array
    start: Array
    stop: Array
    first: Array

    def take(self, x: Array, size: int) -> tuple[Array, Array, Array]:
        """A window of rows with those of one block in it: where it is, the rows, which are."""
        at = jnp.minimum(self.start, len(x) - size)
        places = at + jnp.arange(size)
        real = (places >= self.start) & (places < self.stop)
        return at, jax.lax.dynamic_slice_in_dim(x, at, size), real[:, None]


def _size(rows: int, groups: int) -> int:
    """The rows of a block: about half of those of a group, so that most places are taken."""
    half = 2 ** int(math.log2(max(rows // (2 * groups), 1)))
    return min(max(half, _FEWEST), _MOST, rows)


def _blocks(sizes: Array, rows: int, size: int) -> _Blocks:
    """As many as there may be at most, one after the other."""
    most = min(rows, -(-rows // size) + len(sizes))
    ends, counts = jnp.cumsum(sizes), -(-sizes // size)
    behind = jnp.cumsum(counts)
    number = jnp.arange(most)
    # Those that have no rows go on with the last group that has some.
    group = jnp.searchsorted(behind, jnp.minimum(number, behind[-1] - 1), side="right")
    of_group = number - (behind - counts)[group]
    start = (ends - sizes)[group] + of_group * size
    return _Blocks(group, start, jnp.minimum(start + size, ends[group]), of_group == 0)


def _product(rows: Array, weights: Array, sizes: Array, *, of: Any) -> Array:
    size = _size(len(rows), len(weights))

    def step(out: Array, block: _Blocks) -> tuple[Array, None]:
        at, x, real = block.take(rows, size)
        made = of(x, jax.lax.dynamic_index_in_dim(weights, block.group, keepdims=False))
        before = jax.lax.dynamic_slice_in_dim(out, at, size)
        made = jnp.where(real, made, before)
        return jax.lax.dynamic_update_slice_in_dim(out, made, at, axis=0), None

    made = jax.eval_shape(of, rows, weights[0])
    out = jnp.zeros_like(rows, shape=made.shape)
    return jax.lax.scan(step, out, _blocks(sizes, len(rows), size))[0]


def _of_weights(rows: Array, gradient: Array, sizes: Array) -> Array:
    size, dtype = _size(len(rows), len(sizes)), jnp.promote_types(rows.dtype, jnp.float32)

    def step(carry: tuple[Array, Array], block: _Blocks) -> tuple[tuple[Array, Array], None]:
        out, total = carry
        _, x, real = block.take(rows, size)
        _, of_out, _ = block.take(gradient, size)
        x = jnp.where(real, x, 0)
        made = jax.lax.dot_general(
            x, of_out, (((0,), (0,)), ((), ())), preferred_element_type=dtype
        )
        total = jnp.where(block.first, 0, total) + made
        out = jax.lax.dynamic_update_index_in_dim(out, total.astype(out.dtype), block.group, 0)
        return (out, total), None

    shape = (rows.shape[1], gradient.shape[1])
    out = jnp.zeros_like(rows, shape=(len(sizes), *shape))
    carry = out, jnp.zeros_like(rows, shape=shape, dtype=dtype)
    return jax.lax.scan(step, carry, _blocks(sizes, len(rows), size))[0][0]
