"""Machines that a plan can be made for, whether they are here or not."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpref.errors import UserError


class Chip(NamedTuple):
    """What one chip can do.

    Attributes:
      name: as topologies begin with it.
      operations: floating-point operations a second, in bfloat16.
      memory: bytes.
      bandwidth: bytes a second between the chip and its memory.
      links: bytes a second that it receives along one axis of the torus, from both sides.
      network: bytes a second that it receives from other slices; 0 where that is not known.
    """

    name: str
    operations: float
    memory: float
    bandwidth: float
    links: float
    network: float = 0.0


# From the pages of Cloud TPU on each generation (docs.cloud.google.com/tpu/docs, read 2026-11). An
# axis has two links, each of which is a quarter (v5e, v6e) or a sixth (v4, v5p) of what a chip has.
# Eight chips share the network of a host with two cards of 100 Gbit/s (v5e), or four of 200 (v6e).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32e9, 1228e9, 100e9),
        Chip("v5e", 197e12, 16e9, 819e9, 100e9, 3.125e9),
        Chip("v5p", 459e12, 95e9, 2765e9, 200e9, 6.25e9),
        Chip("v6e", 918e12, 32e9, 1640e9, 200e9, 12.5e9),
    )
}

_TOPOLOGY = re.compile(r"(\w+):(\d+(?:x\d+)*)$")


def prepare(topology: str) -> None:
    """Sets what JAX reads as it loads; to be called before that.

    Raises:
      UserError: there is no such topology.
    """
    name, sizes = _parse(topology)
    if name == "gpu":
        return
    # A plan is made on a machine without accelerators, or beside them.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if name == "cpu":
        flag = f"--xla_force_host_platform_device_count={sizes}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        return
    # Without these libtpu looks for a TPU, and for the service that tells of it.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5p-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        os.environ.setdefault(variable, value)


def devices_of(topology: str, slices: int = 1) -> tuple[Sequence[Any], Chip | None]:
    """The devices of a topology, and what they can do, where that is known.

    Args:
      topology: such as v5p:4x4x4, cpu:8, or gpu for those that are here.
      slices: how many there are of it.

    Raises:
      UserError: there is no such topology, or what it takes to plan for it is not installed.
    """
    import jax

    name, sizes = _parse(topology)
    if name in ("cpu", "gpu"):
        try:
            found = jax.devices(name)
        except RuntimeError as error:
            raise UserError(f"--topology={topology}: there are no {name}s here.") from error
        if name == "cpu" and len(found) < int(sizes):
            raise UserError(
                f"--topology={topology}: JAX was loaded with {len(found)} CPU devices before."
            )
        return found[: int(sizes or len(found))], None
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology}: the compiler for TPUs is not installed, which needs no TPU: "
            "pip install 'jaxpref[tpu]'."
        )
    if slices > 1 and not CHIPS[name].network:
        raise UserError(
            f"--slices={slices}: how fast the network between slices of {name} is has not been "
            "published; plan for one slice, or for another kind of TPU."
        )
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{sizes}", **more
        )
    except Exception as error:
        raise UserError(
            f"--topology={topology}: the compiler for TPUs knows no such slice ({error})."
        ) from error
    return described.devices, CHIPS[name]


def _parse(topology: str) -> tuple[str, str]:
    if topology == "gpu":
        return "gpu", ""
    found = _TOPOLOGY.match(topology)
    known = f"{', '.join(CHIPS)}, as in v5p:4x4x4; or cpu:8, or gpu"
    if found is None or found[1] not in ("cpu", *CHIPS):
        raise UserError(f"--topology={topology}: should be one of {known}.")
    if found[1] == "cpu" and "x" in found[2]:
        raise UserError(f"--topology={topology}: CPUs have a number alone, as in cpu:8.")
    return found[1], found[2]
