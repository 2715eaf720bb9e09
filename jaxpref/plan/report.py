"""A plan as tables, and as JSON."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from jaxpref import sharding
from jaxpref.plan.estimate import Estimate
from jaxpref.plan.machines import Chip
from jaxpref.plan.programs import Planned

# Bytes from which a size is told in GB.
_SMALLEST_IN_GB = 1e8


class Report(NamedTuple):
    """What a plan has found.

    Attributes:
      planned: the run.
      estimates: of its programs.
      chip: what it is planned for; None where that is not known.
      devices: how many there are.
    """

    planned: Planned
    estimates: tuple[Estimate, ...]
    chip: Chip | None
    devices: int

    @property
    def peak(self) -> int:
        """Bytes of a device, at most."""
        return max(estimate.peak for estimate in self.estimates)

    @property
    def fits(self) -> bool | None:
        """Whether that is what a chip has; None where it is not known."""
        return None if self.chip is None else self.peak <= self.chip.memory

    @property
    def seconds(self) -> float:
        """Of a step, if each program takes as long as what bounds it; 0 where it is not known."""
        return _seconds(self.estimates)

    @property
    def sampling_seconds(self) -> float:
        """Those of a step's programs that sample."""
        return _seconds(e for e in self.estimates if e.name in self.planned.sampling)

    @property
    def utilisation(self) -> float:
        """The share of the chips' operations that the tokens need, at that time; 0: not known."""
        if self.chip is None or not self.seconds:
            return 0.0
        useful = sum(e.calls * e.useful for e in self.estimates)
        return useful / (self.seconds * self.chip.operations)

    @property
    def _tokens(self) -> int:
        """Of an update."""
        return sum(e.tokens for e in self.estimates if e.name == "update")

    def speed(self, of: Literal["examples", "tokens"]) -> float:
        """So many a second, at most; 0 where it is not known."""
        count = self.planned.examples if of == "examples" else self._tokens
        return count / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON: bytes, seconds and operations are of a device."""
        return {
            "algorithm": self.planned.layout.config.algorithm.name,
            "mesh": dict(self.planned.layout.mesh.shape),
            "devices": self.devices,
            "chip": None if self.chip is None else self.chip._asdict(),
            "batch": self.planned.data,
            "examples": self.planned.examples,
            "fill": self.planned.fill,
            "compilations": len(self.estimates),
            "programs": [
                {**estimate._asdict(), "bound": estimate.bound} for estimate in self.estimates
            ],
            "peak": self.peak,
            "fits": self.fits,
            "step_seconds": self.seconds,
            "sampling_seconds": self.sampling_seconds,
            "examples_a_second": self.speed("examples"),
            "tokens_a_second": self.speed("tokens"),
            "sampled_tokens": self.planned.sampled,
            "utilisation": self.utilisation,
        }

    def tables(self) -> list[Table]:
        """What a person reads, a column a program: what samples is a table of its own."""
        of = "" if self.chip is None else f" ({self.chip.name} has {size(self.chip.memory)})"
        title = f"What a device holds and does{of}"
        samples = [e for e in self.estimates if e.name in self.planned.sampling]
        if not samples:
            return [self._table(title, self.estimates)]
        trains = [e for e in self.estimates if e not in samples]
        return [
            self._table(f"{title}: sampling", samples),
            self._table(f"{title}: training", trains),
        ]

    def _table(self, title: str, estimates: Sequence[Estimate]) -> Table:
        table = Table(title=title)
        table.add_column()
        for e in estimates:
            table.add_column(e.name, justify="right")
        for name in dict.fromkeys(name for e in estimates for name in e.held):
            table.add_row(name, *(size(e.held.get(name, 0)) for e in estimates))
        if any(e.activations for e in estimates):
            table.add_row("activations", *(size(e.activations) for e in estimates))
        rest = (e.peak - sum(e.held.values()) - e.activations for e in estimates)
        table.add_row("the rest", *map(size, rest))
        table.add_row("memory at most", *(size(e.peak) for e in estimates), end_section=True)
        table.add_row("times a step", *(str(e.calls) for e in estimates))
        table.add_row("compiled in", *(f"{e.compiling:.0f} s" for e in estimates))
        table.add_row("tokens", *(f"{e.tokens:,}" for e in estimates))
        table.add_row("operations", *(f"{e.operations / 1e12:.3g} T" for e in estimates))
        for kind in dict.fromkeys(kind for e in estimates for kind in e.exchanged):
            table.add_row(kind, *(size(e.exchanged.get(kind, 0)) for e in estimates))
        for name in dict.fromkeys(name for e in estimates for name in e.seconds):
            cells = (
                Text(f"{e.seconds[name] * 1e3:,.0f} ms", style="bold" if name == e.bound else "")
                for e in estimates
            )
            table.add_row(f"{name} takes", *cells)
        return table

    def sentences(self) -> list[str]:
        """What follows of it."""
        lines = []
        mesh = " x ".join(
            f"{name} {count}" for name, count in self.planned.layout.mesh.shape.items()
        )
        tokens = self._tokens
        lines.append(
            f"{self.devices} devices, mesh {mesh}; {self.planned.examples:,} examples a step, "
            f"{tokens:,} tokens an update, of which {self.planned.fill:.0%} are no padding "
            f"({self.planned.data}); {len(self.estimates)} compilation"
            f"{'s' * (len(self.estimates) > 1)} for all steps, beside those of evaluations"
        )
        if self.chip is not None:
            bounds = ", ".join(
                f"{e.name} by {'its ' if e.bound != 'compute' else ''}{e.bound}"
                for e in self.estimates
            )
            longest = " if no response ends early" if self.planned.sampling else ""
            lines.append(
                f"a step takes {self.seconds:.3f} s or more{longest} (bound: {bounds}): at most "
                f"{self.speed('examples'):,.1f} examples and {self.speed('tokens'):,.0f} tokens a "
                f"second, {self.utilisation:.0%} of the "
                "chips' operations"
            )
        lines += sharding.not_split(self.planned.layout.state.params)
        if self.planned.sampling:
            sampled = self.planned.sampled
            speed = (
                f": {self.sampling_seconds:.3f} s of the step, "
                f"{sampled / self.sampling_seconds:,.0f} of these tokens a second"
                if self.chip is not None
                else ""
            )
            lines.append(
                f"sampling is planned for the longest prompts and {sampled:,} tokens, as if no "
                f"response ended early, with the largest cache from the first token on{speed}"
            )
        return lines


def _seconds(estimates: Iterable[Estimate]) -> float:
    return sum(e.calls * max(e.seconds.values(), default=0.0) for e in estimates)


def size(count: float) -> str:
    """Bytes, to be read."""
    return f"{count / 1e9:,.2f} GB" if count >= _SMALLEST_IN_GB else f"{count / 1e6:,.2f} MB"
