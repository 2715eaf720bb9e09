"""What may be changed where a run does not fit a machine, or could be faster on it."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from jaxpref import config as config_lib


def alternatives(config: ConfigDict, devices: int) -> Iterator[tuple[str, ConfigDict]]:
    """Other configs for the same run, those that change least of it first.

    Args:
      config: checked.
      devices: how many there are.

    Yields:
      The flags that make it so, and the config. Adapters, the last one, change what is trained.
    """
    for changes in _changes(config, devices):
        other = config.copy_and_resolve_references()
        for name, value in changes.items():
            group, _, knob = name.rpartition(".")
            part: Any = other
            for step in group.split("."):
                part = part[step]
            part[knob] = value
        yield " ".join(f"--config.{name}={value}" for name, value in changes.items()), other


def _changes(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
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
