"""What was measured: points, their estimates, and the file that keeps them."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpref.errors import UserError

# A label's value, as JSON has it.
Label = str | int | float | bool | None
# Labels that points have; of several values in a tuple any one.
Chosen = Mapping[str, Label | tuple[Label, ...]]
ALL: Chosen = MappingProxyType({})


class Point(NamedTuple):
    """What was measured under some labels.

    Attributes:
      labels: such as method, beta and step.
      values: by measure, one number for each unit. Points of the same units, such as seeds, have
        them in the same order.
      over: what the units are, in the plural: "seeds" or "prompts"; "" for what is exact.
    """

    labels: Mapping[str, Label]
    values: Mapping[str, Sequence[float] | Float[np.ndarray, " units"]]
    over: str = "seeds"


class Job(NamedTuple):
    """A part of an experiment that is done at once, or is there already.

    Attributes:
      name: for the terminal.
      settings: everything that its points depend on; a job whose settings changed is done anew.
      points: does it.
    """

    name: str
    settings: Mapping[str, Any]
    points: Callable[[], Sequence[Point]]

    @property
    def key(self) -> str:
        """The same for the same job."""
        return json.dumps({"name": self.name, **self.settings}, sort_keys=True)


class Estimate(NamedTuple):
    """A mean over units.

    Attributes:
      mean: of the values.
      error: its standard error; 0 where the value is exact, NaN where one unit says nothing of it.
      low: the lower end of its 95% confidence interval, by Student's t.
      high: the upper end.
      units: how many there are.
    """

    mean: float
    error: float
    low: float
    high: float
    units: int


def estimate(values: Sequence[float] | Float[np.ndarray, " units"], over: str) -> Estimate:
    """The mean of independent values, with its interval.

    Args:
      values: at least one.
      over: see `Point`.

    >>> estimate([1.0, 2.0, 3.0], "seeds").mean
    2.0
    """
    from scipy import stats

    found = np.asarray(values, float)
    mean, units = float(found.mean()), len(found)
    if not over:
        return Estimate(mean, 0.0, mean, mean, units)
    if units < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, units)
    error = float(found.std(ddof=1)) / math.sqrt(units)
    half = float(stats.t.ppf(0.975, units - 1)) * error
    return Estimate(mean, error, mean - half, mean + half, units)


def select(points: Iterable[Point], labels: Chosen) -> list[Point]:
    """The points that have these labels, whatever others they have."""

    def has(point: Point, name: str, wanted: Label | tuple[Label, ...]) -> bool:
        return name in point.labels and (
            point.labels[name] in (wanted if isinstance(wanted, tuple) else (wanted,))
        )

    return [p for p in points if all(has(p, *item) for item in labels.items())]


def check_counts(**counts: int | Sequence[int]) -> None:
    """Refuses settings below 1.

    Raises:
      UserError: one of them is, or it is a list of none.
    """
    for name, given in counts.items():
        values = list(given) if isinstance(given, Sequence) else [given]
        if not values or min(values) < 1:
            raise UserError(f"--config.{name} should be at least 1; got {given}.")


class PointsFile:
    """`points.jsonl`: a line a job, which is whole as soon as it is there.

    Attributes:
      done: the points of each job in the file, by its key.
    """

    def __init__(self, path: Path):
        """Reads what is there.

        Raises:
          UserError: a line is none of this file.
        """
        self._path = path
        self.done: dict[str, list[Point]] = {}
        if not path.exists():
            return
        lines = path.read_bytes()
        # A process that was killed may have left half a line.
        whole = lines.rfind(b"\n") + 1
        os.truncate(path, whole)
        for number, line in enumerate(lines[:whole].splitlines(), start=1):
            try:
                found = json.loads(line)
                self.done[found["job"]] = [Point(**point) for point in found["points"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}, line {number}: is no line of an experiment's points ({error}). "
                    "Remove the line, and its job will be done again."
                ) from error

    def add(self, job: Job, points: Sequence[Point]) -> None:
        """Writes down what a job has measured.

        Raises:
          UserError: a value is not finite.
        """
        for point in points:
            for measure, values in point.values.items():
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{job.name}: {measure} of {shown(point.labels)} is not finite in all of "
                        f"its {len(values)} {point.over or 'values'}. Did its training diverge?"
                    )
        measured = [_as_json(point) for point in points]
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps({"job": job.key, "points": measured}).encode() + b"\n")
        self.done[job.key] = [Point(**point) for point in measured]


def _as_json(point: Point) -> dict[str, Any]:
    values = {name: np.asarray(found, float).tolist() for name, found in point.values.items()}
    return {"labels": dict(point.labels), "values": values, "over": point.over}


def shown(labels: Chosen) -> str:
    """Labels in a sentence or in a legend."""
    return ", ".join(
        value if isinstance(value, str) else f"{name} {in_short(value)}"
        for name, value in labels.items()
    )


def in_short(value: Label | tuple[Label, ...]) -> str:
    """A label's value; numbers with four digits."""
    if isinstance(value, tuple):
        return " or ".join(map(in_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
