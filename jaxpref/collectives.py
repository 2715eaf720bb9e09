"""What devices exchange of weights: parts are gathered for a product, gradients scattered."""

import contextlib
import contextvars
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

# Sizes of the lines of devices that an axis of the mesh consists of, outermost first.
_LINES: contextvars.ContextVar[Mapping[str, tuple[int, ...]]] = contextvars.ContextVar(
    "lines", default=types.MappingProxyType({})
)


class Split(NamedTuple):
    """How positions and a table of the vocabulary lie over the mesh that is set.

    Attributes:
      positions: the axes of the mesh along which positions are split.
      vocabulary: the axis along which the table's rows are; None: they are whole.
      width: the axis, one of those of positions, along which its columns are; None: they are whole.
    """

    positions: tuple[str, ...]
    vocabulary: str | None
    width: str | None

    @property
    def table(self) -> PartitionSpec:
        """Of the table `[vocabulary, width]`."""
        return PartitionSpec(self.vocabulary, self.width)

    @property
    def rows(self) -> PartitionSpec:
        """Of arrays with positions along their first axis."""
        return PartitionSpec(self.positions)

    @property
    def copies(self) -> tuple[str, ...]:
        """The axes along which devices have the same part of the table, for other positions."""
        return tuple(name for name in self.positions if name != self.width)

    @property
    def shards(self) -> int:
        """How many parts positions are split into."""
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes[name] for name in self.positions)

    @property
    def parts(self) -> int:
        """How many parts the table's columns are split into."""
        return 1 if self.width is None else jax.sharding.get_abstract_mesh().shape[self.width]


@contextlib.contextmanager
def lines(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Makes known to what is traced inside which lines of devices the axes of the mesh consist of.

    Args:
      sizes: of the lines that an axis consists of, outermost first: their product is its size.
        Along an axis without an entry sums are scattered in one go.
    """
    token = _LINES.set(sizes)
    try:
        yield
    finally:
        _LINES.reset(token)


def lines_of(places: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The sizes of the lines that neighbours in an order form, outermost first.

    Args:
      places: coordinates of each device in its machine, in the order of an axis of the mesh.

    Returns:
      One size where the order is not that of lines in a grid, such as where it is a ring. How a sum
      is scattered there is left to the compiler.

    >>> lines_of([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)])
    (2, 3)
    >>> lines_of([(0, 0), (0, 1), (1, 1), (1, 0)])
    (4,)
    """
    grid = np.asarray(places)
    sizes: list[int] = []
    while len(grid) > 1:
        moves = grid != grid[0]
        (along,) = np.nonzero(moves[1])
        # As many as differ from the first where the second does, and nowhere else.
        alike = (moves == moves[1]).all(axis=1)
        alike[0] = True
        size = len(grid) if alike.all() else int(np.argmin(alike))
        if len(along) != 1 or len(grid) % size:
            return (len(places),)
        lines = grid.reshape(-1, size, grid.shape[1])
        # Every line has the same numbers along it, and no others.
        steps = lines - lines[:, :1]
        if (steps != steps[0]).any():
            return (len(places),)
        sizes.insert(0, size)
        grid = lines[:, 0]
    return tuple(sizes)


def gather(x: Shaped[Array, "..."], name: str, axis: int) -> Shaped[Array, "..."]:
    """The parts that devices have along an axis of the mesh as one array, under `shard_map`.

    Its gradient is scattered.

    Args:
      x: this device's part.
      name: of the mesh's axis.
      axis: of the array, along which the parts lie one after another.
    """
    if not _lines_along(name):
        return jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return _gather(x, name, axis)


def scatter(x: Shaped[Array, "..."], name: str, axis: int) -> Shaped[Array, "..."]:
    """This device's part of the sum of what devices along an axis of the mesh have.

    On TPUs it is done line by line: they have no scatter for all devices of a torus at once, and
    their compiler would sum the whole array on every device, which moves twice as much.

    Args:
      x: what this device has of the sum.
      name: of the mesh's axis.
      axis: of the array, along which it is split.
    """
    sizes = _lines_along(name)
    if not sizes:
        return jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True)
    x = jnp.moveaxis(x, axis, 0)
    # The compiler also sums the whole array if its layout in memory has that axis last, unless the
    # parts are whole tiles. It chooses such a layout where what comes next is transposed.
    in_order = Layout(tuple(range(x.ndim)))
    size = beyond = jax.lax.axis_size(name)
    for length in sizes:
        beyond //= length
        # Devices of one line are `beyond` apart.
        groups = [
            [first + step * beyond for step in range(length)]
            for start in range(0, size, length * beyond)
            for first in range(start, start + beyond)
        ]
        x = jax.lax.psum_scatter(
            with_layout_constraint(x, in_order),
            name,
            scatter_dimension=0,
            axis_index_groups=groups,
            tiled=True,
        )
    return jnp.moveaxis(x, 0, axis)


def _lines_along(name: str) -> tuple[int, ...]:
    return _LINES.get().get(name, ())


# It is gathered in one go, and not line by line: TPUs gather along all axes of a torus together.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, name: str, axis: int) -> Array:
    return jax.lax.all_gather(x, name, axis=axis, tiled=True)


def _gather_forward(x: Array, name: str, axis: int) -> tuple[Array, None]:
    return _gather(x, name, axis), None


def _gather_backward(name: str, axis: int, _: None, gradient: Array) -> tuple[Any]:
    return (scatter(gradient, name, axis),)


_gather.defvjp(_gather_forward, _gather_backward)
