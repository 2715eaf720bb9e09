"""What may be changed where a run does not fit a machine, or could be faster on it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxpref import config as config_lib


class Alternative(NamedTuple):
    """Another way to do a run.

    Attributes:
      flags: that make it so.
      config: with them.
      rows: full rows a device, in place of those that the data need; 0: these.
    """

    flags: str
    config: ConfigDict
    rows: int


def alternatives(
    config: ConfigDict, devices: int, *, rows: int = 0, of_data: int = 0
) -> Iterator[Alternative]:
    """Other configs for the same run, those that change least of it first.

    Args:
      config: checked.
      devices: how many there are.
      rows: full rows a device that it is planned for; 0: those of the data.
      of_data: rows of a micro-batch of the data, over all devices; 0: not known.

    Yields:
      One after the other. Adapters, the last one, change what is trained.
    """
    if rows:
        for other in (rows // 2, 2 * rows):
            if other:
                yield Alternative(f"--rows={other}", config, other)
    for changes in _changes(config, devices, of_data):
        other = config.copy_and_resolve_references()
        for name, value in changes.items():
            group, _, knob = name.rpartition(".")
            part: Any = other
            for step in group.split("."):
                part = part[step]
            part[knob] = value
        flags = " ".join(f"--config.{name}={value}" for name, value in changes.items())
        yield Alternative(flags, other, rows)


def _changes(config: ConfigDict, devices: int, of_data: int) -> Iterator[dict[str, Any]]:
    shards = devices // max(config.mesh.tensor, 1)
    for other in (of_data // 2, 2 * of_data):
        # A method that takes a batch whole has no micro-batches.
        if other >= shards and other % shards == 0:
            yield {"data.rows": other}
    for remat in ("none", "dots", "full"):
        if remat != config.model.remat:
            yield {"model.remat": remat}
    for data, fsdp, tensor in _meshes(config, devices):
        yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    if config.reference.mode == "live":
        if config.reference.dtype != "bfloat16":
            yield {"reference.dtype": "bfloat16"}
        if not config_lib.method_of(config.algorithm.name).samples:
            yield {"reference.mode": "precomputed"}
    if not config.model.lora.rank and not config.train.trainable:
        yield {"model.lora.rank": 16, "model.frozen_dtype": "bfloat16"}


def _meshes(config: ConfigDict, devices: int) -> Iterator[tuple[int, int, int]]:
    """Meshes that split parameters over all devices, or over as many as leave 128 columns each."""
    now = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    for tensor in (1, 2, 4, 8):
        fsdp = devices // tensor
        if devices % tensor == 0 and now not in ((1, fsdp, tensor), (-1, fsdp, tensor)):
            yield 1, fsdp, tensor
    for fsdp in (32, 16):
        if devices % fsdp == 0 and devices > fsdp and now[1] != fsdp:
            yield devices // fsdp, fsdp, 1
