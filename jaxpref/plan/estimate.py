"""What a compiled program takes of a machine, and about how long."""

import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxpref import sharding
from jaxpref.models import DecoderConfig
from jaxpref.plan import hlo
from jaxpref.plan.machines import Chip
from jaxpref.plan.programs import Planned, Program, bytes_of
from jaxpref.trainable import path_of

# Products of matrices in each of the kernels of splash attention, by the names that they have.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Estimate(NamedTuple):
    """What one program takes of a device, each time that it is run.

    Attributes:
      name: of the program.
      calls: how often a step runs it.
      compiling: seconds, here.
      held: bytes that are there before and after, by what they are.
      activations: bytes of what layers keep for the backward pass.
      peak: bytes at most, the held ones and the activations among them.
      operations: floating-point operations, attention's with all pairs of a causal row.
      useful: of them, what the tokens need at least: products with the parameters, without those
        that are computed again, and without attention.
      exchanged: bytes received from other devices, by the kind of exchange; what other slices send
        is a kind of its own.
      moved: bytes between the chip and its memory, about.
      tokens: that go through a model, over all devices, padding among them.
      seconds: the least that operations, memory, links, and the network between slices take; {} for
        a chip that is not known.
    """

    name: str
    calls: int
    compiling: float
    held: dict[str, int]
    activations: int
    peak: int
    operations: float
    useful: float
    exchanged: dict[str, float]
    moved: float
    tokens: int
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__, default="")


class TooLargeError(Exception):
    """A program does not fit the chip's memory.

    Attributes:
      name: of the program.
      needed: bytes; 0 if the compiler does not say.
    """

    def __init__(self, name: str, needed: int):
        """Takes both."""
        super().__init__(name)
        self.name, self.needed = name, needed


def estimate(planned: Planned, program: Program, mesh: Mesh, chip: Chip | None) -> Estimate:
    """Compiles a program, and reads from it what it takes.

    Raises:
      TooLargeError: the compiler finds no room for it.
    """
    began = time.monotonic()
    with sharding.use(mesh, program.rules):
        lowered = program.function.lower(*program.inputs)
    try:
        compiled = lowered.compile()
    except Exception as error:
        beside = sum(map(bytes_of, program.held.values()))
        if (needed := _needed(str(error), beside)) is None:
            raise
        raise TooLargeError(program.name, needed) from error
    compiling = time.monotonic() - began
    read = hlo.Program(compiled.as_text(), program.work.trips)
    exchanged: dict[str, float] = {}
    between = 0.0
    for found in read.collectives():
        kind = f"{found.kind} of slices" if found.slices else found.kind
        exchanged[kind] = exchanged.get(kind, 0.0) + found.received
        between += found.received if found.slices else 0.0
    held = {name: bytes_of(tree) for name, tree in program.held.items()}
    operations = read.operations() + _attention(read, planned.decoder.config, program, mesh)
    moved = read.moved()
    seconds = {}
    if chip is not None:
        seconds = {
            "compute": operations / chip.operations,
            "memory": moved / chip.bandwidth,
            "links": (sum(exchanged.values()) - between) / chip.links,
        }
        if between:
            seconds["network"] = between / chip.network
    return Estimate(
        name=program.name,
        calls=program.calls,
        compiling=compiling,
        held={name: size for name, size in held.items() if size},
        activations=_activations(read, planned.decoder.config, program),
        peak=max(
            _peak(compiled, program, sum(held.values())),
            sum(held.values()) + bytes_of(program.copied),
        ),
        operations=operations,
        useful=_useful(program, planned.decoder.config) / mesh.size,
        exchanged={kind: size for kind, size in exchanged.items() if size},
        moved=moved,
        tokens=program.work.tokens,
        seconds=seconds,
    )


def _needed(message: str, held: int) -> int | None:
    """The bytes that a program would need, if that is what the compiler complains of.

    Args:
      message: of the error.
      held: bytes that are there before, which one of the messages leaves out.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])", message)
    if found is None:
        return 0
    needed = int(float(found[2]) * _UNITS[found[3]])
    return needed if found[1] == "Used " else needed + held


def _activations(read: hlo.Program, config: DecoderConfig, program: Program) -> int:
    """What the scan over the layers keeps of each, which is none of their parameters."""
    if not any(trained for _, trained in program.passes):
        return 0
    parts = {
        leaf.sharding.shard_shape(leaf.shape)
        for tree in program.held.values()
        for leaf in jax.tree.leaves(tree)
    }
    return read.carried(config.layers, parts)


def _peak(compiled: Any, program: Program, held: int) -> int:
    """Bytes at most: what is held, and what the program needs beside what it is given of that."""
    memory = compiled.memory_analysis()
    given = memory.argument_size_in_bytes
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = given + made + memory.temp_size_in_bytes
    return max(held - given, 0) + needed


def _attention(read: hlo.Program, config: DecoderConfig, program: Program, mesh: Mesh) -> float:
    """Operations of the attention kernels, which are no part of what the compiler shows."""
    heads = config.heads // (
        mesh.shape["tensor"] if config.heads % mesh.shape["tensor"] == 0 else 1
    )
    # A call of a kernel is one row; a loop is around it where a device has several.
    pairs = program.work.length * (program.work.length + 1) / 2
    products = sum(count * read.kernels(name) for name, count in _KERNELS.items())
    return products * 2 * pairs * heads * config.head_dim


def _useful(program: Program, config: DecoderConfig) -> float:
    """Operations that the tokens of a call need at least, over all devices."""
    total, work = 0.0, program.work
    for params, trained in program.passes:
        for path, leaf in jax.tree.leaves_with_path(params):
            name = path_of(path)
            if len(leaf.shape) < 2 or "position" in name:
                continue
            # Embeddings are looked up; as the head they are multiplied with what is scored alone.
            table = name in ("embedding", "head", "score")
            if name == "embedding" and ("head" in params or "score" in params):
                continue
            size = leaf.size
            if config.experts and name.endswith(("/gate", "/up", "/down")):
                # A token goes to some of the experts.
                size = size * config.experts_per_token // config.experts
            total += (6 if trained else 2) * size * (work.scored if table else work.tokens)
    return total
