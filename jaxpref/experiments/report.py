"""What an experiment shows: a table with its verdicts, and a figure."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxpref.evaluation.plots import Panel, Series, plot_panels
from jaxpref.experiments.claims import Verdict
from jaxpref.experiments.experiment import Diagram, Experiment
from jaxpref.experiments.points import Estimate, Point, estimate, in_short, select, shown

# How a measure that has a unit is called beside an axis.
_UNITS = {"kl": "KL (nats)", "kl_bound": "bound of the KL (nats)", "length": "length (tokens)"}


def write_table(
    experiment: Experiment,
    points: Sequence[Point],
    verdicts: Sequence[Verdict],
    path: Path,
    settings: str = "",
) -> None:
    """Writes what was measured and what became of the claims, as Markdown."""
    parts = [
        f"# {experiment.title}",
        experiment.source,
        *([f"Settings: {settings}."] if settings else []),
        _rows(["claim", "found (95% interval)", "verdict"], map(_verdict_row, verdicts)),
        _measured(experiment, select(points, experiment.table)),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _verdict_row(verdict: Verdict) -> list[str]:
    return [verdict.claim.text, in_words(verdict), verdict.verdict]


def in_words(verdict: Verdict) -> str:
    """What was found, and over how many units."""
    found, over = verdict.found, verdict.over
    if not found.units:
        return "no point has it"
    what = "" if verdict.claim.than is None else "difference "
    return f"{what}{_number(found.mean)}{_interval(found)}" + (
        f" over {found.units:,} {over}" if over else ", exact"
    )


def _interval(found: Estimate) -> str:
    if math.isnan(found.error):
        return ""
    return f" ({_number(found.low)} to {_number(found.high)})" if found.error else ""


def _measured(experiment: Experiment, points: Sequence[Point]) -> str:
    """A row a point: its labels, then mean and standard error of each measure."""
    labels = list(dict.fromkeys(name for point in points for name in point.labels))
    measures = list(dict.fromkeys(name for point in points for name in point.values))
    beside = {p.measure for p in experiment.published}
    heads = list(labels)
    for name in measures:
        heads += [name, f"{name}, published"] if name in beside else [name]
    rows = []
    for point in points:
        row = [in_short(point.labels[name]) if name in point.labels else "" for name in labels]
        for name in measures:
            values = point.values.get(name)
            row.append("" if values is None else _cell(estimate(values, point.over)))
            if name in beside:
                row.append(_published(experiment, point, name))
        units = len(next(iter(point.values.values())))
        rows.append([*row, f"{units:,} {point.over}" if point.over else "exact"])
    return "Mean (standard error).\n\n" + _rows([*heads, "over"], rows)


def _published(experiment: Experiment, point: Point, measure: str) -> str:
    for theirs in experiment.published:
        if theirs.measure == measure and select([point], theirs.labels):
            return f"{_number(theirs.mean)} ({_number(theirs.error)})"
    return ""


def _cell(found: Estimate) -> str:
    if math.isnan(found.error) or not found.error:
        return _number(found.mean)
    return f"{_number(found.mean)} ({_number(found.error)})"


def _number(x: float) -> str:
    return f"{x:.4g}"


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(experiment: Experiment, points: Sequence[Point], path: Path) -> None:
    """Draws the figure, with bands of 95%."""
    panels = [
        Panel(
            diagram.title,
            _UNITS.get(diagram.x, diagram.x),
            _UNITS.get(diagram.y, diagram.y),
            _series(diagram, select(points, diagram.where)),
            diagram.log_x,
        )
        for diagram in experiment.figure
    ]
    plot_panels(panels, path, f"{experiment.title} (with 95% intervals)")


def _series(diagram: Diagram, points: Sequence[Point]) -> list[Series]:
    found: dict[str, list[tuple[float | str, Estimate, bool]]] = {}
    for point in points:
        if diagram.y not in point.values:
            continue
        place = point.labels.get(diagram.x)
        if diagram.x in point.values:
            place = estimate(point.values[diagram.x], point.over).mean
        if place is None:
            continue
        labels = {name: point.labels[name] for name in diagram.series if name in point.labels}
        y = estimate(point.values[diagram.y], point.over)
        found.setdefault(shown(labels), []).append((place, y, not point.over))
    drawn = []
    for label, marks in found.items():
        if not any(isinstance(place, str) for place, _, _ in marks):
            marks.sort(key=lambda mark: mark[0])
        exact = all(mark[2] for mark in marks)
        known = not exact and not any(math.isnan(mark[1].error) for mark in marks)
        drawn.append(
            Series(
                label,
                [place for place, _, _ in marks],
                [y.mean for _, y, _ in marks],
                [y.low for _, y, _ in marks] if known else None,
                [y.high for _, y, _ in marks] if known else None,
                diagram.joined or exact,
            )
        )
    return drawn
