"""One mesh, `(data, fsdp, tensor)`, and which axis of an array lies along which axis of it.

`data` and `fsdp` both split the rows of a batch; `fsdp` also splits parameters along
their width, `tensor` along heads, feed-forward and vocabulary. Arrays name their axes
logically (`width`, `heads`, `rows`), and `RULES` is the one place that maps these names.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpref import collectives, processes
from jaxpref.collectives import Split
from jaxpref.errors import UserError
from jaxpref.packing import ROW_FIELDS, PackedBatch
from jaxpref.trainable import path_of

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

# Bytes from which it matters that an array is whole on every device.
_LARGE = 2**20

# For decoding, weights are whole along their width: a gather for every token would cost more than
# what it reads.
GENERATION_RULES: Rules = tuple((name, None if name == "width" else axis) for name, axis in RULES)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices, or over those given.

    Neighbours along an axis of the mesh are neighbours in the machine, as far as there is a choice;
    the axes of a TPU's torus may be split for it. Several slices lie along `data`.

    Args:
      data: devices along `data`; -1 for all that the other two leave.
      fsdp: devices along `fsdp`, or -1.
      tensor: devices along `tensor`, or -1.
      devices: by default all, of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `fsdp` or `tensor` would lie
        between the slices of TPUs.
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
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices by their places in a mesh, see `make_mesh`.

    Args:
      sizes: of the mesh along `AXES`; they multiply to the number of devices.
      devices: of one kind; those of a machine that is not here will do.

    Raises:
      UserError: `fsdp` or `tensor` would lie between the slices of TPUs.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    inside, between = list(sizes), [slices, 1, 1]
    if slices > 1 and sizes[0] % slices == 0:
        inside[0] //= slices
        return mesh_utils.create_hybrid_device_mesh(
            inside, between, devices, allow_split_physical_axes=True
        )
    if slices > 1 and devices[0].platform == "tpu":
        raise UserError(
            f"mesh.data is {sizes[0]}, and the {len(devices)} devices are in {slices} slices, "
            "between which the network is too slow for mesh.fsdp and mesh.tensor. Set mesh.data to "
            f"a multiple of {slices}."
        )
    if devices[0].platform == "tpu" and max(sizes) == len(devices):
        # In lines, along which gradients are scattered; on small slices JAX would make it a ring.
        devices = sorted(devices, key=_place)
        return np.array(devices, object).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def batch_shards(mesh: Mesh) -> int:
    """Blocks that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_shards(mesh: Mesh) -> tuple[int, ...] | None:
    """The blocks of rows that this process's devices hold; None if it trains alone, and so all."""
    if jax.process_count() == 1:
        return None
    shards = mesh.devices.reshape(batch_shards(mesh), -1)
    mine = [[device.process_index == jax.process_index() for device in of] for of in shards]
    return tuple(int(shard) for shard in np.flatnonzero(np.any(mine, axis=1)))


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Makes the mesh and the rules known to what is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules), collectives.lines(_lines(mesh)):
        yield


def _lines(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    """Which lines of a torus the axes of a mesh of TPUs consist of."""
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    ends = {name: np.moveaxis(mesh.devices, i, 0) for i, name in enumerate(mesh.axis_names)}
    return {
        name: collectives.lines_of(
            [_place(device) for device in devices.reshape(len(devices), -1)[:, 0]]
        )
        for name, devices in ends.items()
    }


def _place(device: Any) -> tuple[int, ...]:
    """Of a TPU in its torus."""
    return (*device.coords, getattr(device, "core_on_chip", 0))


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
        return NamedSharding(mesh, _spec(mesh, leaf.names, leaf.value.shape, rules))

    return jax.tree.map(place, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def table_split(shape: Sequence[int]) -> Split | None:
    """How a table of the vocabulary lies over the mesh that `use` has made known.

    Args:
      shape: entries of the vocabulary, and width.

    Returns:
      None outside of `use`, and where there is one device.
    """
    spec = spec_of(("vocabulary", "width"), shape)
    return None if spec is None else Split(dict(nn.get_logical_axis_rules())["rows"], *spec)


def spec_of(names: Sequence[str], shape: Sequence[int]) -> PartitionSpec | None:
    """Along which axes of the mesh that `use` has made known those of an array lie.

    Args:
      names: logical, of the array's axes.
      shape: of the array; an axis that its mesh axes do not divide is whole.

    Returns:
      None outside of `use`, and where there is one device.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), nn.get_logical_axis_rules()
    if mesh.empty or mesh.size == 1 or not rules:
        return None
    return _spec(mesh, names, shape, rules)


def gathered_along() -> tuple[str | None, int]:
    """The axis of the mesh along which products gather the parts of their weights.

    It is where weights are split by their width, and rows are split, too, so that each device would
    multiply other rows with another part.

    Returns:
      The axis, and how many parts there are; None and 1 outside of `use`, on one device, and where
      the rules have such weights whole.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    name = rules.get("width")
    if mesh.empty or mesh.size == 1 or name not in names_in(rules.get("rows")):
        return None, 1
    return name, mesh.shape[name]


def names_in(along: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes of a mesh that an axis of an array lies along."""
    return (along,) if isinstance(along, str) else along or ()


def not_split(trained: Mapping[str, Any], **others: Any) -> list[str]:
    """What every device holds whole, though the mesh could split it.

    Args:
      trained: by role, nested dictionaries of arrays, or of their shapes, with shardings.
      **others: what is held beside that, by its name.

    Returns:
      A sentence for each array above a megabyte.
    """
    sentences = []
    for name, tree in {**trained, **others}.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            size = leaf.size * leaf.dtype.itemsize
            split = leaf.sharding.mesh.shape["fsdp"] * leaf.sharding.mesh.shape["tensor"] > 1
            if split and size > _LARGE and leaf.sharding.is_fully_replicated:
                sentences.append(
                    f"not split: {name} {path_of(path)}, {size / 1e6:.1f} MB on every device, "
                    "because the mesh divides none of its axes"
                )
    return sentences


def put_batch(mesh: Mesh, batch: PackedBatch) -> PackedBatch:
    """Puts a batch of micro-batches (a leading axis) on the devices: rows split, tables whole.

    Where several processes train they put the same batch, of which each may have the rows of its
    own devices alone (`packing.Budget.own`).

    Raises:
      UserError: this process has another batch than the first one.
    """
    if jax.process_count() > 1:
        processes.check_same("the next batch", _digest(batch))
    shards, own = batch_shards(mesh), own_shards(mesh)
    if batch.shards == shards or own is None:
        return _placed(batch, lambda x, spec: _put(mesh, x, spec))
    if batch.shards != len(own):
        raise ValueError(
            f"a batch has the rows of all {shards} shards, or of the {len(own)} of this process; "
            f"this one has those of {batch.shards}."
        )

    def put(x: Any, spec: PartitionSpec) -> jax.Array:
        if spec == PartitionSpec():
            return _put(mesh, x, spec)
        of_shard = x.shape[1] // len(own)

        def rows(index: Any) -> np.ndarray:
            # A device holds the rows of one shard.
            first = own.index((index[1].start or 0) // of_shard) * of_shard
            return x[:, first : first + of_shard]

        shape = (x.shape[0], shards * of_shard, *x.shape[2:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), rows)

    return dataclasses.replace(_placed(batch, put), shards=shards)


def _digest(batch: PackedBatch) -> str:
    """Of all that processes should have alike of a batch."""
    digest = hashlib.sha256(repr((batch.tokens.shape[0], batch.aligned)).encode())
    for x in jax.tree.leaves((batch.lengths, batch.extras, batch.written)):
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]


def abstract_batch(mesh: Mesh, batch: PackedBatch) -> PackedBatch:
    """The shapes, dtypes and shardings of what `put_batch` makes of a batch, or of its shapes."""

    def describe(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return _placed(batch, describe)


def _placed(batch: PackedBatch, put: Callable[[Any, PartitionSpec], Any]) -> PackedBatch:
    by_row, whole = PartitionSpec(None, ("data", "fsdp")), PartitionSpec()
    rows: dict[str, Any] = {name: put(getattr(batch, name), by_row) for name in ROW_FIELDS}
    extras = {name: put(x, whole) for name, x in batch.extras.items()}
    of_tokens = {name: put(x, by_row) for name, x in batch.token_extras.items()}
    return dataclasses.replace(
        batch,
        **rows,
        lengths=put(batch.lengths, whole),
        extras=extras,
        token_extras=of_tokens,
        written=None,
    )


def by_row(mesh: Mesh) -> NamedSharding:
    """Where the arrays of a batch are that have a row for each row of its tokens."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))


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


def _spec(
    mesh: Mesh | AbstractMesh, names: Sequence[str], shape: Sequence[int], rules: Rules
) -> PartitionSpec:
    """Along which axes of the mesh those of an array lie; one that they do not divide is whole."""
    axes = dict(rules)
    return PartitionSpec(
        *(
            axes[name] if size % _ways(mesh, axes[name]) == 0 else None
            for name, size in zip(names, shape, strict=True)
        )
    )


def _ways(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...] | None) -> int:
    ways = 1
    for name in names_in(axis):
        ways *= mesh.shape[name]
    return ways
