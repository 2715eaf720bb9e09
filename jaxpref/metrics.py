"""Where measurements go: `metrics.jsonl`, TensorBoard and the terminal's live line."""

import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxpref import sharding, workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.measurements import Mean, Metric
from jaxpref.terminal import console
from jaxpref.workdir import AnyPath

# After so many first steps with a gradient of exactly zero the user is told of it, and after so
# many the run stops at the latest: a few steps may have nothing to learn.
_ZERO_TOLD, _ZERO_STOPPED = 3, 100

# The measurements that the terminal's line shows, in this order.
_SHOWN = (
    *("loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin"),
    *("true_reward", "objective/scores", "objective/kl", "win_rate"),
    *("grad_norm", "perf/pairs_per_second"),
)


class Writer:
    """Writes measurements on the first process; on the others it does nothing.

    Used as a context, which shows the live line:

        with Writer(workdir, start=0, steps=100) as writer:
            writer.write(10, {"loss": 0.69})
    """

    def __init__(self, workdir: AnyPath, *, start: int, steps: int):
        """Opens the files, and drops what an interrupted run measured after step `start`."""
        self._main = jax.process_index() == 0
        self._steps, self._start = steps, start
        self._began = time.monotonic()
        if not self._main:
            return
        self._path = workdir / "metrics.jsonl"
        # Without a checkpoint even step 0 is measured again.
        kept = start if start else -1
        _drop_after(self._path, kept)
        # Without a buffer it is known what a full disk did not take, which is written later.
        self._file = workdir_lib.append(self._path)
        self._unwritten, self._told = b"", False
        self._board: _Board | None = _Board(workdir / "tensorboard", kept + 1)
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=10),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            # This column is the last, since a narrow terminal cuts the end.
            TextColumn("{task.fields[shown]}"),
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
        if not self._main:
            return
        self._progress.stop()
        failed = self._append(b"", now=True)
        self._file.close()
        self._show(lambda board: board.close())
        if failed is not None and kind is None:
            count = self._unwritten.count(b"\n")
            lines = f"{count} lines" if count else "lines"
            reason = failed.strerror or failed
            raise UserError(f"{self._path}: its last {lines} could not be written ({reason}).")

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
        self._append(json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n")
        self._show(lambda board: board.write(step, values))
        shown = "  ".join(
            f"{prefix}{name.rpartition('/')[2]} {values[prefix + name]:.4g}"
            for prefix in ("", "eval/")
            for name in _SHOWN
            if prefix + name in values
        )
        self._progress.update(self._task, shown=shown)
        if shown and (not console.is_terminal or "eval/" in shown):
            left = self._left(step)
            console.print(f"step {step}/{self._steps}  {shown}{left}")

    def flush(self) -> None:
        """Writes what a bucket has not yet; before a checkpoint, since nobody measures it again."""
        if self._main:
            self._append(b"", now=True)
            self._show(lambda board: board.copy())

    def _append(self, line: bytes, *, now: bool = False) -> OSError | None:
        """Adds to the file; what it does not take now is tried again with the next line.

        Args:
          line: empty to try again only.
          now: also what grows in a bucket is written to its end.

        Returns:
          What was wrong if not all is written.
        """
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]
            if now:
                self._file.flush()
        except OSError as error:
            if not self._told:
                reason = error.strerror or error
                console.print(f"{self._path}: {reason}; measurements wait in memory")
            self._told = True
            return error
        return None

    def _show(self, action: "Callable[[_Board], None]") -> None:
        """Acts on TensorBoard's file, as long as it can be written."""
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            self._board = None
            reason = error.strerror or error
            console.print(f"TensorBoard's file: {reason}; it ends here, metrics.jsonl not")

    def _left(self, step: int) -> str:
        done = step - self._start
        if done <= 0 or step >= self._steps:
            return ""
        seconds = (time.monotonic() - self._began) / done * (self._steps - step)
        return f"  ETA {_clock(seconds)}"


class _Board:
    """TensorBoard's event file; that of a workdir in a bucket is written here and copied whole.

    tensorboardX's own writer is not used: its thread dies of a full disk, after which the run
    would wait for it without end.
    """

    def __init__(self, folder: AnyPath, first: int):
        """Opens a new file, which replaces all that earlier ones say of steps from `first` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        self._folder, self._pace = folder, workdir_lib.Pace()
        local = folder if isinstance(folder, Path) else workdir_lib.temporary_folder()
        local.mkdir(exist_ok=True)
        self._local, self._file = local, EventsWriter(str(local / "events"))
        self._add(first, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds the values of a step."""
        points = [
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._add(step, summary=self._summary(value=points))
        if self._pace.due():
            self.copy()

    def close(self) -> None:
        """Writes what is buffered."""
        self.copy()
        self._file.close()

    def copy(self) -> None:
        """Copies the file into the bucket, if it belongs there."""
        if self._folder == self._local:
            return
        self._file.flush()
        began = time.monotonic()
        for path in self._local.iterdir():
            # What a bucket does not take now it is given again, whole, with all that follows.
            with suppress(OSError):
                workdir_lib.write(self._folder / path.name, path.read_bytes())
        self._pace.took(time.monotonic() - began)

    def _add(self, step: int, **parts: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **parts))


class Log:
    """Reads what a step measured after the next one is dispatched, and writes the means."""

    def __init__(
        self,
        writer: Writer,
        *,
        every: int,
        steps: int,
        patience: int,
        kept: Callable[[], str],
        resumed: bool = False,
    ):
        """Starts with nothing measured.

        Args:
          writer: where the means go.
          every: how many steps a mean is of.
          steps: after which the run ends.
          patience: steps after which a run without any gradient is given up, within bounds.
          kept: says in words what the run leaves, should it have to stop before.
          resumed: whether the run has trained before.
        """
        self._writer, self._every, self._steps, self._kept = writer, every, steps, kept
        self._patience = min(max(patience, _ZERO_TOLD), _ZERO_STOPPED)
        self._pending: _Step | None = None
        self._mean = Mean()
        self._shapes: set[tuple[int, ...]] = set()
        self._trained, self._moved, self._skipped = 0, resumed, 0
        self._learning_rate = 0.0
        self._since = time.monotonic()

    def dispatching(self, step: int, shape: tuple[int, ...], tokens: int, groups: int) -> None:
        """Notes the work of a step; a new shape means a compilation, which is not timed.

        Args:
          step: its number.
          shape: of its batches' tokens, `(micro-batches, rows, length)`.
          tokens: that are trained on.
          groups: prompts with their responses.
        """
        compiles = shape not in self._shapes
        if compiles:
            self.settle()
            self._shapes.add(shape)
            count, rows, length = shape
            console.print(
                f"step {step}: compiling for {'micro-batches of ' if count > 1 else ''}{rows} rows "
                f"of {length} tokens (shape {len(self._shapes)})"
            )
        self._next = _Step(step, {}, tokens, groups, timed=not compiles)

    def dispatched(self, step: int, measured: dict[str, Metric]) -> None:
        """Takes over a step's measurements, and settles those of the step before."""
        self.settle()
        self._pending = self._next._replace(measured=measured)
        if not self._pending.timed or step == self._steps:
            self.settle()

    def settle(self) -> None:
        """Waits for the pending step; checks, adds up, and writes if it is time."""
        if self._pending is None:
            return
        done, self._pending = self._pending, None
        sums = sharding.fetch(done.measured)
        now = time.monotonic()
        if done.timed:
            seconds = now - self._since
            self._mean.add("perf/step_seconds", seconds, 1)
            self._mean.add("perf/tokens_per_second", done.tokens, seconds)
            self._mean.add("perf/pairs_per_second", done.groups, seconds)
        self._since = now
        values = {name: float(m.values) / float(m.weights or 1) for name, m in sums.items()}
        require_finite(done.number, values, self._kept)
        if "grad_norm" in values:
            self._require_gradient(done.number, values["grad_norm"])
        for name, metric in sums.items():
            self._mean.add(name, float(metric.values), float(metric.weights))
        if "loss" in sums and not sums["loss"].weights:
            self._skipped += 1
            console.print(f"step {done.number}: no example has a weight, so nothing is updated")
        self._learning_rate = values.get("learning_rate", 0.0)
        self._writer.step(done.number)
        if done.number in (1, self._steps) or done.number % self._every == 0:
            self.flush(done.number)

    def saving(self, step: int) -> None:
        """Writes all up to a step that is saved: a run that resumes writes the lines after it."""
        self.flush(step)
        self._writer.flush()

    def flush(self, step: int) -> None:
        """Writes what has been added up since the last time."""
        self.settle()
        values = self._mean.result()
        if self._skipped:
            values["skipped_steps"] = float(self._skipped)
        if values:
            self._writer.write(step, {**values, "learning_rate": self._learning_rate})
        self._mean, self._skipped = Mean(), 0

    def pause(self) -> None:
        """Leaves what happened since the last step out of the next one's time."""
        self._since = time.monotonic()

    def _require_gradient(self, step: int, norm: float) -> None:
        self._trained += 1
        self._moved |= norm > 0
        if self._moved:
            return
        found = (
            f"step {step}: the gradient was exactly zero everywhere in all {self._trained} steps "
            "so far, so nothing trains. Are chosen and rejected the same text, do all samples of a "
            "prompt get the same reward, or is every parameter frozen?"
        )
        if self._trained >= self._patience or step == self._steps:
            raise UserError(found)
        if self._trained == _ZERO_TOLD:
            console.print(f"{found} The run stops if it goes on like this.")


class _Step(NamedTuple):
    """A dispatched step: its measurements (still being computed) and its work."""

    number: int
    measured: dict[str, Metric]
    tokens: int
    groups: int
    timed: bool


def require_finite(step: int, values: dict[str, float], kept: Callable[[], str]) -> None:
    """Stops the run at a NaN or an infinity; `kept` says in words what it leaves.

    Raises:
      UserError: naming the metrics and the step.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        listed = ", ".join(f"{name} = {value}" for name, value in bad.items())
        raise UserError(
            f"step {step}: {listed}. Stopped; {kept()}. A lower optimizer.learning_rate or "
            "optimizer.clip_norm, or model.dtype float32, may help."
        )


def read(path: AnyPath) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`.

    A last line that was cut short is left out, and so are damaged ones, which the terminal counts.
    """
    *texts, last = (workdir_lib.read(path) or b"").split(b"\n")
    lines = [_parse(text) for text in texts]
    whole = [line for line in lines if line is not None]
    if len(whole) < len(lines):
        console.print(f"{path}: {len(lines) - len(whole)} damaged lines are left out")
    unfinished = _parse(last)
    return whole if unfinished is None else [*whole, unfinished]


def _parse(text: bytes) -> dict[str, float] | None:
    try:
        line = json.loads(text.decode())
        return line if math.isfinite(line["step"]) else None
    except (ValueError, TypeError, KeyError):
        return None


def _drop_after(path: AnyPath, step: int) -> None:
    kept = [line for line in read(path) if line["step"] <= step]
    workdir_lib.write(path, "".join(json.dumps(line) + "\n" for line in kept))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
