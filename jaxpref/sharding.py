"""One mesh, `(data, fsdp, tensor)`, and which axis of an array lies along which axis of it.

`data` and `fsdp` both split the rows of a batch; `fsdp` also splits parameters along
their width, `tensor` along heads, feed-forward and vocabulary. Arrays name their axes
logically (`width`, `heads`, `rows`), and `RULES` is the one place that maps these names.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpref.errors import UserError
from jaxpref.packing import ROW_FIELDS, PackedBatch

AXES = ("data", "fsdp", "tensor")

Rules = tuple[tuple[str, Any], ...]
RULES: Rules = (
    ("rows", ("data", "fsdp")),
    ("length", None),
    ("activation", None),
    ("gathered", None),
    ("vocabulary", "tensor"),
    ("width", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("feed_forward", "tensor"),
    ("head_dim", None),
    ("norm", None),
    ("positions", None),
    ("embedding", None),
    ("experts", None),
    ("rank", None),
    ("scalar", None),
    ("layers", None),
)

# For decoding, weights are whole along their width: a gather for every token would cost more than
# what it reads.
GENERATION_RULES: Rules = tuple((name, None if name == "width" else axis) for name, axis in RULES)


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of a run, whose devices together are then `jax.devices()`.

    It has to come before anything that asks JAX for a device. Without arguments the cluster says
    who the others are (Cloud TPU, Slurm, Open MPI, Kubernetes); elsewhere there are none.

    Args:
      coordinator: HOST:PORT of process 0, which waits there for the others.
      processes: how many there are; 1 for this one alone, whatever the cluster says.
      process: which of them this one is, from 0.

    Raises:
      UserError: they cannot be joined.
    """
    if processes == 1:
        return
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        if coordinator is None and "coordinator_address" in str(error):
            # No cluster is known here.
            return
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the other processes of this run cannot be joined ({reason}). Give each of them the "
            "same --coordinator=HOST:PORT and --num_processes, and its own --process_id; or "
            "--num_processes=1 for a process by itself."
        ) from error


def in_first(action: Callable[[], int | None]) -> int:
    """Acts in the first process alone; its answer, or that it has failed, goes to all.

    Raises:
      UserError: what the action raises.
    """
    answer, failed = 0, None
    if jax.process_index() == 0:
        try:
            answer = action() or 0
        except UserError as error:
            failed = error
    if jax.process_count() > 1:
        told = multihost_utils.broadcast_one_to_all(np.asarray([answer, failed is not None]))
        answer = int(told[0])
        if told[1] and failed is None:
            failed = UserError("process 0 of this run cannot go on; it says why.")
    if failed is not None:
        raise failed
    return answer


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, or over those given.

    Args:
      data: devices along `data`; -1 for all that the other two leave.
      fsdp: devices along `fsdp`, or -1.
      tensor: devices along `tensor`, or -1.
      devices: by default all, of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if sizes.count(-1) == 1:
        known = -(sizes[0] * sizes[1] * sizes[2])
        sizes[sizes.index(-1)] = count // known if known > 0 else 0
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] != count:
        raise UserError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor} should multiply to the "
            f"{count} devices here ({devices[0].platform}); one of them may be -1."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Blocks that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Makes the mesh and the rules known to what is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def shardings(mesh: Mesh, abstract: Any, rules: Rules = RULES) -> Any:
    """Where each array of a tree goes.

    Args:
      mesh: the mesh.
      abstract: shapes, boxed with logical axis names as Linen's `init` gives them
        under `jax.eval_shape`; what carries no names is replicated.
      rules: which axis of an array lies along which axis of the mesh.

    Returns:
      The tree, unboxed, of `NamedSharding`. An axis that its mesh axes do not divide
      is not split.
    """

    def place(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = dict(rules)
        spec = [
            axes[name] if size % _ways(mesh, axes[name]) == 0 else None
            for name, size in zip(leaf.names, leaf.value.shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def put_batch(mesh: Mesh, batch: PackedBatch) -> PackedBatch:
    """Puts a batch of micro-batches (a leading axis) on the devices: rows split, tables whole."""
    by_row, whole = PartitionSpec(None, ("data", "fsdp")), PartitionSpec()
    rows: dict[str, Any] = {name: _put(mesh, getattr(batch, name), by_row) for name in ROW_FIELDS}
    extras = {name: _put(mesh, x, whole) for name, x in batch.extras.items()}
    lengths = _put(mesh, batch.lengths, whole)
    of_tokens = {name: _put(mesh, x, by_row) for name, x in batch.token_extras.items()}
    return dataclasses.replace(
        batch, **rows, lengths=lengths, extras=extras, token_extras=of_tokens
    )


def put_rows(mesh: Mesh, array: Any) -> jax.Array:
    """Puts an array on the devices, split along its first axis as rows are."""
    return _put(mesh, array, PartitionSpec(("data", "fsdp")))


def put_whole(mesh: Mesh, array: Any) -> jax.Array:
    """Puts an array on the devices, whole on each of them."""
    return _put(mesh, array, PartitionSpec())


def _put(mesh: Mesh, x: Any, spec: PartitionSpec) -> jax.Array:
    # Every process has the whole array, and hands over what its own devices hold of it.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)


def fetch(tree: Any) -> Any:
    """NumPy arrays of a tree's arrays, whole, in every process."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


def _ways(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
    axes = (axis,) if isinstance(axis, str) else axis or ()
    ways = 1
    for name in axes:
        ways *= mesh.shape[name]
    return ways
