"""Every figure, as a PNG."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpref.evaluation.calibration import Reliability
from jaxpref.workdir import AnyPath

_DPI = 110
_COLORS, _MARKS = 10, "os^Dv"
# More series have one legend for all panels; more panels are in two rows.
_IN_A_LEGEND, _IN_A_ROW = 6, 3
# What is measured of a reward model, in one panel of its curves.
_REWARDS = ("mean_reward", "min_reward", "max_reward", "good_reward", "bad_reward", "margin")


class Series(NamedTuple):
    """What one label of a legend stands for.

    Attributes:
      label: in the legend.
      x: places; names stand side by side.
      y: values.
      low: lower ends of the values' intervals; None for no band.
      high: upper ends.
      line: whether the points are joined; otherwise they are marks with error bars.
    """

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    line: bool = True


class Panel(NamedTuple):
    """One diagram of a figure.

    Attributes:
      title: above it.
      x: what its places are.
      y: what its values are.
      series: what is drawn, in the order of the legend; the same label has the same color in all
        panels, unless they have too many in all.
      log_x: whether places are drawn by their logarithm.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False


def plot_panels(panels: Sequence[Panel], path: AnyPath, title: str) -> None:
    """Draws panels side by side, with one legend for all of them where there are many series.

    Args:
      panels: at least one.
      path: the PNG to write.
      title: of the figure.
    """
    rows = 1 if len(panels) <= _IN_A_ROW else 2
    figure, axes = _subplots(len(panels), height=4.0, width=5.0, rows=rows)
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    most = max(len(panel.series) for panel in panels)
    together = _IN_A_LEGEND < len(labels) == most
    drawn: dict[str, Any] = {}
    for axis, panel in zip(axes, panels, strict=True):
        for number, series in enumerate(panel.series):
            # With more series than colours, those of the same colour have other marks; panels that
            # have little in common have colours of their own.
            place = labels.index(series.label) if together or len(labels) <= _COLORS else number
            color, mark = f"C{place % _COLORS}", _MARKS[place // _COLORS % len(_MARKS)]
            drawn.setdefault(series.label, _draw(axis, series, color, mark))
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        if panel.log_x:
            _log_places(axis, panel)
        axis.grid(alpha=0.3)
        if not together:
            axis.legend(fontsize=7)
    if together:
        figure.legend(drawn.values(), drawn, fontsize=8, loc="outside right center")
    figure.suptitle(title)
    _save(figure, path)


def _log_places(axis: Any, panel: Panel) -> None:
    """A logarithmic axis of places; where they are few, these are its marks."""
    axis.set_xscale("log")
    places = sorted({x for series in panel.series for x in series.x})
    if len(places) <= _COLORS:
        axis.set_xticks(places, [f"{x:g}" for x in places])
        axis.minorticks_off()


def _draw(axis: Any, series: Series, color: str, mark: str) -> Any:
    """Draws a series, and gives what stands for it in a legend."""
    style = {"color": color, "label": series.label, "marker": mark}
    if series.line:
        (line,) = axis.plot(series.x, series.y, **style, markersize=3)
        if series.low is not None and series.high is not None:
            axis.fill_between(series.x, series.low, series.high, color=color, alpha=0.2)
        return line
    y = np.asarray(series.y)
    errors = None
    if series.low is not None and series.high is not None:
        errors = np.stack([y - np.asarray(series.low), np.asarray(series.high) - y])
    return axis.errorbar(series.x, y, errors, **style, linestyle="", markersize=4, alpha=0.8)


def _subplots(
    count: int, *, height: float = 3.4, width: float = 4.2, rows: int = 1
) -> tuple[Any, list[Any]]:
    """A figure without a window, and its diagrams, in rows."""
    # Matplotlib takes half a second to load, which commands that draw nothing need not wait for.
    from matplotlib.figure import Figure

    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def plot_reliability(found: Reliability, path: AnyPath, title: str) -> None:
    """Draws accuracy against confidence; the diagonal is perfect calibration.

    Args:
      found: from `reliability`.
      path: the PNG to write.
      title: of the figure.
    """
    figure, (axis,) = _subplots(1, height=4.2)
    axis.plot([0.5, 1], [0.5, 1], "--", color="0.6", label="perfect")
    share = found.pairs / found.pairs.sum()
    axis.plot(found.confidence, found.accuracy, color="C0")
    axis.scatter(found.confidence, found.accuracy, s=20 + 400 * share, color="C0", alpha=0.6)
    axis.set_xlabel("probability that the model gives its choice")
    axis.set_ylabel("share of choices that are the label")
    axis.set_title(f"{title}\nexpected calibration error {found.error:.3f}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)


def plot_curves(lines: list[dict[str, float]], path: AnyPath, title: str) -> None:
    """Draws the loss, and for preference methods accuracy, margin and rewards, over steps.

    Args:
      lines: the run's measurements.
      path: the PNG to write.
      title: of the figure.
    """
    known = {name for line in lines for name in line}
    sampled = "eval/objective/scores" in known
    panels = [
        panel
        for panel in (
            ("loss (nats)", ("loss",)),
            ("accuracy", ("rewards/accuracies", "rewards/best_accuracy", "accuracy")),
            ("implicit reward", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
            ("reward", _REWARDS),
            ("win rate against the reference", ("win_rate",)),
            ("reward of a sample", ("objective/scores", "objective/rlhf_reward", "true_reward")),
            ("KL to the reference (nats)", ("objective/kl",)),
            # A method that samples has these in the two panels before.
            ("reward of a sample, held out", () if sampled else ("samples/reward",)),
            ("KL to the reference, held out (nats)", () if sampled else ("samples/kl",)),
            ("gradient norm", ("grad_norm",)),
        )
        if any(prefix + name in known for name in panel[1] for prefix in ("", "eval/"))
    ]
    figure, axes = _subplots(len(panels))
    for axis, (label, names) in zip(axes, panels, strict=True):
        for color, name in enumerate(names):
            short = name.rpartition("/")[2].replace("_", " ")
            for prefix, style in (("", "-"), ("eval/", "o--")):
                points = [
                    (line["step"], line[prefix + name]) for line in lines if prefix + name in line
                ]
                if points:
                    legend = f"{short}, held out" if prefix else short
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{color}",
                        label=legend,
                        markersize=4,
                        alpha=1.0 if prefix else 0.6,
                    )
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    _save(figure, path)


def _save(figure: Any, path: AnyPath) -> None:
    with path.open("wb") as file:
        figure.savefig(file, dpi=_DPI, format="png")
