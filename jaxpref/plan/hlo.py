"""What a compiled program does, read from its text: operations, and what devices exchange.

`compiled.cost_analysis()` counts the body of a loop once. Here everything is multiplied with the
trips of the loops that it is in.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

# Bytes of an element, by the name that HLO gives its type.
_BYTES = {"pred": 1, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")

# TPUs have a reduce-scatter as an all-reduce of which each keeps a part, in a computation so named.
_SCATTER = "all-reduce-scatter"
# What is exchanged while others compute begins beside a call of this target. Several exchanges may
# share a channel.
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
# What several slices exchange goes over the hosts' network.
_BETWEEN_SLICES = "_xla_megascale_transfer_type"
# The kernel that TPUs have for `jax.lax.ragged_dot`.
_GROUPED = "ragged-dot-none"

# The share of an array's bytes that a device receives is 1 - 1 / devices, this many times.
_COLLECTIVES = {
    "all-gather": 1,
    "all-reduce": 2,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
    "collective-permute": 1,
    "collective-broadcast": 1,
}


# What reads a part of its first operand.
_SLICES = ("dynamic-slice", "gather")

# What moves nothing by itself.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "iota"),
}


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: such as "all-gather".
      size: bytes of the array as a whole: of what is gathered, or reduced.
      times: how often it is done in a call of the program.
      devices: that take part in it together.
      source: where it comes from, as JAX names it.
      loops: names of the loops that it is in, the outermost first.
      slices: whether it is between slices of TPUs, whose devices of one place take part in it.
    """

    kind: str
    size: int
    times: int
    devices: int
    source: str
    loops: tuple[str, ...]
    slices: bool = False

    @property
    def received(self) -> float:
        """Bytes that a device receives, all times; what is reduced everywhere counts twice."""
        if self.devices == 1:
            return 0.0
        share = 1.0 if self.kind == "collective-permute" else 1 - 1 / self.devices
        return self.size * self.times * _COLLECTIVES[self.kind] * share


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    # What stands between the parentheses, and behind them.
    given: str
    attributes: str

    def called(self, name: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def source(self) -> str:
        """JAX's name of what it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


_Computation = Mapping[str, _Instruction]


class _Where(NamedTuple):
    """Where an instruction stands.

    Attributes:
      computation: its own.
      times: how often that is run.
      loops: around it, the outermost first.
      around: the computation that calls its own as a part of one instruction; "" for none.
    """

    computation: str
    times: int
    loops: tuple[str, ...]
    around: str


class _Step(NamedTuple):
    instruction: _Instruction
    where: _Where


class Program:
    """A compiled program, from `compiled.as_text()`."""

    def __init__(self, text: str, trips: int | None = None):
        """Reads it.

        Args:
          text: of a compiled program.
          trips: of a loop that ends when it is told to, and does not count to a bound of its own;
            None: there is none.

        Raises:
          ValueError: the text is none of a compiled program.
        """
        self._trips_otherwise = trips
        self._computations: dict[str, dict[str, _Instruction]] = {}
        self._roots: dict[str, str] = {}
        entry = None
        into: dict[str, _Instruction] = {}
        here = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                here = found[2]
                into = self._computations[here] = {}
                entry = here if found[1] else entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(found[1], line[found.end() :])
                into[found[1]] = instruction
                if line.lstrip().startswith("ROOT "):
                    self._roots[here] = found[1]
        if entry is None:
            raise ValueError("this is no text of a compiled program: it has no entry.")
        self._entry = entry

    def collectives(self) -> list[Collective]:
        """All exchanges between devices."""
        steps = list(self._walk(_Where(self._entry, 1, (), "")))
        starts = {
            step.where.computation for step in steps if _STARTS in step.instruction.attributes
        }
        overlapped = {_same(step) for step in steps if step.where.computation in starts}
        found: list[Collective] = []
        seen: set[tuple[Any, ...]] = set()
        for step in steps:
            if _BETWEEN_SLICES in step.instruction.attributes:
                # What is sent is received, too.
                if step.instruction.opcode == "recv":
                    found.append(_between_slices(step.instruction, step.where))
                continue
            if _kind(step.instruction.opcode) is None:
                continue
            if step.where.around and step.where.computation not in starts:
                # What goes on while others compute stands in each of the fusions that do, too.
                if _same(step) in overlapped or _same(step) in seen:
                    continue
                seen.add(_same(step))
            scatters = _SCATTER in step.where.computation
            found.append(_collective(step.instruction, step.where, scatters=scatters))
        return found

    def operations(self) -> float:
        """Floating-point operations of a device in products of matrices and convolutions."""
        steps = self._walk(_Where(self._entry, 1, (), ""))
        return float(
            sum(
                step.where.times
                * _operations(step.instruction, self._computations[step.where.computation])
                for step in steps
            )
        )

    def kernels(self, name: str) -> int:
        """How often a kernel is run whose source, as JAX names it, has this name in it."""
        return sum(
            step.where.times
            for step in self._walk(_Where(self._entry, 1, (), ""))
            if step.instruction.opcode == "custom-call" and name in step.instruction.source
        )

    def carried(self, count: int, besides: Collection[tuple[int, ...]]) -> int:
        """Bytes of the arrays with so many parts that a loop carries, at most.

        Args:
          count: of the parts, which lie along the first axis.
          besides: sizes of arrays that do not count.
        """
        loops = (
            _arrays(step.instruction.shape)
            for step in self._walk(_Where(self._entry, 1, (), ""))
            if step.instruction.opcode == "while"
        )
        return max(
            (
                sum(
                    _bytes(dtype, sizes)
                    for dtype, sizes in arrays
                    if len(sizes) > 1 and sizes[0] == count and sizes not in besides
                )
                for arrays in loops
            ),
            default=0,
        )

    def moved(self) -> float:
        """Bytes that a device reads from its memory and writes to it, about.

        Each instruction reads its operands and writes its result, but for what is kept on the chip,
        and of an array that is only sliced, looked up or written in part that part.
        """
        return float(
            sum(
                step.where.times * self._moved(step.instruction, step.where.computation)
                for step in self._walk(_Where(self._entry, 1, (), ""))
                if not step.where.around and step.instruction.opcode not in _FREE
            )
        )

    def _moved(self, instruction: _Instruction, inside: str) -> int:
        computation = self._computations[inside]
        operands = [computation[name] for name in instruction.operands if name in computation]
        written = _in_memory(instruction.shape)
        read = [_in_memory(operand.shape) for operand in operands]
        if instruction.opcode.endswith("-done"):
            return 0
        if instruction.opcode.endswith("-start"):
            # What goes on while others compute gives what it was given, too.
            return max(written, sum(read))
        if instruction.opcode in _SLICES:
            return 2 * written + sum(read[1:])
        if instruction.opcode == "dynamic-update-slice":
            return 2 * read[1]
        called = instruction.called("calls") if instruction.opcode == "fusion" else None
        if called is None or called not in self._computations:
            return written + sum(read)
        body = self._computations[called]
        parameters = {int(x.given): name for name, x in body.items() if x.opcode == "parameter"}
        for number, name in parameters.items():
            users = [x for x in body.values() if name in x.operands]
            if number >= len(read) or not users:
                continue
            if (part := self._sliced(name, body)) is not None:
                read[number] = min(read[number], part)
            elif all(x.opcode == "dynamic-update-slice" and x.operands[0] == name for x in users):
                # It is written in place: only what is new moves.
                part = sum(_in_memory(body[x.operands[1]].shape) for x in users)
                read[number], written = 0, max(written - _in_memory(users[0].shape), 0) + part
        return written + sum(read)

    def _sliced(self, name: str, body: _Computation) -> int | None:
        """Bytes of the parts that a fusion, or fusions in it, take of a value; None: all of it."""
        total = 0
        for user in (x for x in body.values() if name in x.operands):
            called = user.called("calls") if user.opcode == "fusion" else None
            if user.opcode in _SLICES and user.operands[0] == name:
                total += _in_memory(user.shape)
            elif called is not None and user.operands.count(name) == 1:
                inner = self._computations[called]
                number = str(user.operands.index(name))
                parameter = next(
                    x for x in inner.values() if x.opcode == "parameter" and x.given == number
                )
                if (part := self._sliced(parameter.name, inner)) is None:
                    return None
                total += part
            else:
                return None
        return total

    def _walk(self, where: _Where) -> Iterator[_Step]:
        """All instructions, each with where it stands."""
        computation = self._computations[where.computation]
        for instruction in computation.values():
            yield _Step(instruction, where)
            body = instruction.called("body")
            if instruction.opcode == "while" and body is not None:
                times = where.times * self._trips(instruction, computation)
                loops = (*where.loops, instruction.source)
                yield from self._walk(_Where(body, times, loops, ""))
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = instruction.called("calls") or instruction.called("to_apply")
                if called is not None:
                    around = where.around or where.computation
                    yield from self._walk(where._replace(computation=called, around=around))
            elif instruction.opcode == "conditional":
                for branch in _NAME.findall(
                    _between(instruction.attributes, "branch_computations")
                ):
                    yield from self._walk(where._replace(computation=branch))

    def _trips(self, loop: _Instruction, around: _Computation) -> int:
        """How often a loop is run.

        Raises:
          ValueError: it counts to no bound, and how often such a one is run is not known.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = loop.called("condition"), loop.called("body")
        assert condition is not None
        assert body is not None
        compared = self._compared(condition)
        if compared is None:
            if self._trips_otherwise is None:
                raise ValueError(f"the loop {loop.name} ({loop.source}) has no bound of its own.")
            return self._trips_otherwise
        index, bound = compared
        step = self._step(body, index)
        start = self._constant(self._element(around[loop.operands[0]], index, around), around)
        return max(math.ceil((bound - (start or 0)) / (step or 1)), 0)

    def _compared(self, condition: str) -> tuple[int, int] | None:
        """The element of a loop's carry that counts, and its bound."""
        computation = self._computations[condition]
        index, bound = None, None
        for instruction in computation.values():
            if instruction.opcode == "get-tuple-element":
                index = int(_attribute(instruction, "index"))
            elif instruction.opcode == "constant" and instruction.given.lstrip("-").isdigit():
                bound = int(instruction.given)
        return None if index is None or bound is None else (index, bound)

    def _step(self, body: str, index: int) -> int | None:
        """What a loop's body adds to an element of its carry."""
        computation = self._computations[body]
        element = self._element(computation[self._roots[body]], index, computation)
        if element.opcode == "fusion" and (called := element.called("calls")) is not None:
            computation = self._computations[called]
            element = computation[self._roots[called]]
        if element.opcode != "add":
            return None
        added = (self._constant(computation[name], computation) for name in element.operands)
        return next((number for number in added if number is not None), None)

    def _element(self, value: _Instruction, index: int, inside: _Computation) -> _Instruction:
        if value.opcode == "tuple":
            value = inside[value.operands[index]]
        while value.opcode in ("copy", "bitcast"):
            value = inside[value.operands[0]]
        return value

    def _constant(self, value: _Instruction, inside: _Computation) -> int | None:
        while value.opcode in ("copy", "bitcast", "convert"):
            value = inside[value.operands[0]]
        if value.opcode == "constant" and value.given.lstrip("-").isdigit():
            return int(value.given)
        return None


def _parse(name: str, rest: str) -> _Instruction:
    shape_end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    given = rest[opened + 1 : closed - 1]
    operands = tuple(_NAME.findall(given))
    return _Instruction(name, shape, rest[:opened], operands, given, rest[closed:])


def _closing(text: str, opened: int) -> int:
    """The place after the parenthesis that closes the one at `opened`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opened):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}.")


def _between(attributes: str, name: str) -> str:
    found = re.search(rf"{name}=\{{([^}}]*)\}}", attributes)
    return found[1] if found else ""


def _attribute(instruction: _Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=([^\s,]+)", instruction.attributes)
    return found[1] if found else ""


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and sizes of the arrays in a shape."""
    return [
        (dtype, tuple(int(re.sub(r"\D", "", size)) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
    ]


def _bytes(dtype: str, sizes: tuple[int, ...]) -> int:
    if dtype not in _BYTES:
        bits = re.match(r"[a-z]+(\d+)", dtype)
        _BYTES[dtype] = -(-int(bits[1]) // 8) if bits else 0
    return math.prod(sizes) * _BYTES[dtype]


def _in_memory(shape: str) -> int:
    """Bytes of the arrays of a shape that are not kept on the chip."""
    return sum(
        _bytes(*_arrays(array)[0])
        for array in re.findall(r"[a-z]\w*\[[\d,<=]*\](?:\{[^}]*\})?", shape)
        if "S(1)" not in array
    )


def _same(step: _Step) -> tuple[Any, ...]:
    """Alike for all places where one exchange stands."""
    channel = _attribute(step.instruction, "channel_id")
    return (step.where.around, step.where.loops, step.instruction.opcode, channel)


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in _COLLECTIVES else None


def _collective(instruction: _Instruction, where: _Where, *, scatters: bool) -> Collective:
    kind = _kind(instruction.opcode)
    assert kind is not None
    devices = _group_size(instruction)
    sizes = [_bytes(*array) for array in _arrays(instruction.shape)]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # Those that were given come first, then those that come out, then what is kept of it.
        sizes = [max(sizes)]
    size = sum(sizes) * (devices if kind == "reduce-scatter" else 1)
    if kind == "reduce-scatter" and instruction.opcode.endswith("-start"):
        size = max(sizes)
    kind = "reduce-scatter" if scatters else kind
    return Collective(kind, size, where.times, devices, instruction.source, where.loops)


def _between_slices(instruction: _Instruction, where: _Where) -> Collective:
    said = dict(re.findall(r'_xla_megascale_(\w+)="([^"]*)"', instruction.attributes))
    kind = said["transfer_type"].lower().replace("_", "-")
    if kind not in _COLLECTIVES:
        kind = "collective-permute"
    # Slices and devices, as in {1,2}x{0:3}.
    slices = _count(said["target"].partition("x")[0])
    size = _bytes(*_arrays(instruction.shape)[0]) * (slices if kind == "reduce-scatter" else 1)
    return Collective(kind, size, where.times, slices, instruction.source, where.loops, True)


def _count(ranges: str) -> int:
    """How many numbers there are in {0,2:4}."""
    parts = [part.split(":") for part in ranges.strip("{}").split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in parts)


def _group_size(instruction: _Instruction) -> int:
    """How many devices exchange something with each other."""
    if "source_target_pairs" in instruction.attributes:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes):
        return int(iota[2])
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", instruction.attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        # An axis may be split: 'axis_0':(2)4 is a part of 4 of it.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    raise ValueError(f"it is not known which devices take part in {instruction.name}.")


def _operations(instruction: _Instruction, computation: _Computation) -> float:
    if instruction.opcode == "dot":
        return _of_dot(instruction, computation)
    if instruction.opcode == "convolution":
        return _of_convolution(instruction, computation)
    if instruction.opcode == "custom-call" and instruction.source.endswith(_GROUPED):
        return _of_groups(instruction, computation)
    return 0.0


def _of_dot(instruction: _Instruction, computation: _Computation) -> float:
    ((_, left),) = _arrays(computation[instruction.operands[0]].shape)
    summed = _between(instruction.attributes, "lhs_contracting_dims")
    inner = math.prod(left[int(axis)] for axis in summed.split(",") if axis)
    ((_, out),) = _arrays(instruction.shape)
    return 2.0 * math.prod(out) * inner


def _of_groups(instruction: _Instruction, computation: _Computation) -> float:
    """Each row times the weight of its group; the kernel is given the weights last."""
    ((_, (_, inner)),) = _arrays(computation[instruction.operands[-2]].shape)
    ((_, out),) = _arrays(instruction.shape)
    return 2.0 * math.prod(out) * inner


def _of_convolution(instruction: _Instruction, computation: _Computation) -> float:
    """Products of numbers that are there: what is padded or lies between does not count."""
    ((_, left),) = _arrays(computation[instruction.operands[0]].shape)
    ((_, right),) = _arrays(computation[instruction.operands[1]].shape)
    ((_, out),) = _arrays(instruction.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    of_left, of_right, of_out = labels.groups()
    count = 2.0 * right[of_right.index("i")] * out[of_out.index("f")] * out[of_out.index("b")]
    window = _window(_between(instruction.attributes, "window"))
    for axis in (label for label in of_out if label.isdigit()):
        place = int(axis)
        size = right[of_right.index(axis)]
        stride, low, dilated, spread = (
            window[name][place] if name in window else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        length = left[of_left.index(axis)]
        extent = (length - 1) * dilated + 1
        count *= sum(
            0 <= position < extent and position % dilated == 0
            for o in range(out[of_out.index(axis)])
            for k in range(size)
            for position in [o * stride + k * spread - low]
        )
    return count


def _window(text: str) -> dict[str, list[int]]:
    """The parts of a window by name; of the padding what comes first."""
    return {
        name: [int(part.split("_")[0]) for part in numbers.split("x")]
        for name, _, numbers in (part.partition("=") for part in text.split())
        if name != "rhs_reversal"
    }
