"""Where measurements go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import math
import time
from collections import defaultdict
from pathlib import Path
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxpref.errors import UserError

# What the terminal's line shows, in this order, of what a run measures.
_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "perf/pairs_per_second")

# A log file has no width to wrap at.
console = Console(highlight=False, markup=False, soft_wrap=True)


class Mean:
    """Weighted means over several steps: sums of weighted values over sums of weights."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, weighted_sum: float, weight: float) -> None:
        """Adds the sum of some weighted values, and the sum of their weights."""
        self._sums[name] += weighted_sum
        self._weights[name] += weight

    def result(self) -> dict[str, float]:
        """The means; a quantity whose weights are all 0 is left out."""
        return {name: self._sums[name] / weight for name, weight in self._weights.items() if weight}


class Writer:
    """Writes measurements on the first process; on the others it does nothing.

    Used as a context, which shows the live line:

        with Writer(workdir, start=0, steps=100) as writer:
            writer.write(10, {"loss": 0.69})
    """

    def __init__(self, workdir: Path, *, start: int, steps: int):
        """Opens the files, and drops what an interrupted run measured after step `start`."""
        self._main = jax.process_index() == 0
        self._steps, self._start = steps, start
        self._began = time.monotonic()
        if not self._main:
            return
        import tensorboardX

        self._path = workdir / "metrics.jsonl"
        # Without a checkpoint even step 0 is measured again.
        kept = start if start else -1
        _drop_after(self._path, kept)
        self._file = self._path.open("a", buffering=1)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=kept + 1)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[shown]}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, shown="", rate="")

    def __enter__(self) -> "Writer":
        if self._main:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._main:
            self._progress.stop()
            self._file.close()
            self._board.close()

    def step(self, step: int) -> None:
        """Moves the live line to `step`."""
        if self._main:
            elapsed = time.monotonic() - self._began
            rate = (step - self._start) / elapsed if elapsed > 0 else 0.0
            self._progress.update(self._task, completed=step, rate=f"{rate:.2f} steps/s")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step, and shows the chief ones."""
        if not self._main or not values:
            return
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        shown = "  ".join(
            f"{prefix}{name.rpartition('/')[2]} {values[prefix + name]:.4g}"
            for prefix in ("", "eval/")
            for name in _SHOWN
            if prefix + name in values
        )
        self._progress.update(self._task, shown=shown)
        if not console.is_terminal or any(name.startswith("eval/") for name in values):
            left = self._left(step)
            console.print(f"step {step}/{self._steps}  {shown}{left}")

    def _left(self, step: int) -> str:
        done = step - self._start
        if done <= 0 or step >= self._steps:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._steps - step)
        return f"  ETA {_clock(seconds)}"


def require_finite(step: int, values: dict[str, float]) -> None:
    """Stops the run at a NaN or an infinity.

    Raises:
      UserError: naming the metrics and the step.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise UserError(
            f"step {step}: {listed}. Stopped; the last good checkpoint is kept. A lower "
            "optimizer.learning_rate or optimizer.clip_norm, or model.dtype float32, may help."
        )


def read(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line that was cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _drop_after(path: Path, step: int) -> None:
    kept = [line for line in read(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
