"""Does what is not done of an experiment, and shows all of it."""

import time
from pathlib import Path
from typing import NamedTuple

from jaxpref.errors import UserError
from jaxpref.experiments.claims import Verdict, decide
from jaxpref.experiments.experiment import Experiment
from jaxpref.experiments.points import Point, PointsFile
from jaxpref.experiments.report import draw, in_words, write_table
from jaxpref.terminal import console
from jaxpref.workdir import as_folder

POINTS, TABLE, FIGURE = "points.jsonl", "table.md", "figure.png"


class Outcome(NamedTuple):
    """What an experiment found.

    Attributes:
      points: all of its jobs.
      verdicts: of its claims.
    """

    points: list[Point]
    verdicts: list[Verdict]


def run(experiment: Experiment, workdir: str | Path, settings: str = "") -> Outcome:
    """Does the jobs that are not done; writes points, table and figure into the workdir.

    Args:
      experiment: what is to be done.
      workdir: of this experiment. A job whose settings are those of the workdir's points is not
        done again.
      settings: of the record, in words, for the table.

    Raises:
      UserError: the workdir cannot be written or is another experiment's, or a measurement is not
        finite.
      KeyboardInterrupt: interrupted; the jobs that were done are kept.
    """
    folder = as_folder(workdir, "--workdir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}).") from error
    _check_own(folder, experiment)
    file = PointsFile(folder / POINTS)
    waiting = [job for job in experiment.jobs if job.key not in file.done]
    there = len(experiment.jobs) - len(waiting)
    console.print(f"{experiment.title}: {len(waiting)} jobs to do, {there} done already")
    others = len(file.done) - there
    if others:
        console.print(f"{folder / POINTS} also has {others} jobs of other settings, not shown here")
    for number, job in enumerate(waiting, start=1):
        console.print(f"[{number}/{len(waiting)}] {job.name}")
        begun = time.monotonic()
        try:
            file.add(job, job.points())
        except KeyboardInterrupt as error:
            done = there + number - 1
            raise KeyboardInterrupt(
                f"interrupted: {done} of {len(experiment.jobs)} jobs are done and kept in "
                f"{folder / POINTS}; the same command goes on."
            ) from error
        console.print(f"    {time.monotonic() - begun:.0f} s")
    points = [point for job in experiment.jobs for point in file.done[job.key]]
    verdicts = [decide(claim, points) for claim in experiment.claims]
    write_table(experiment, points, verdicts, folder / TABLE, settings)
    draw(experiment, points, folder / FIGURE)
    for verdict in verdicts:
        console.print(f"{verdict.verdict:>12}: {verdict.claim.text}; {in_words(verdict)}")
    console.print(f"{folder / TABLE}, {folder / FIGURE}")
    return Outcome(points, verdicts)


def _check_own(folder: Path, experiment: Experiment) -> None:
    """Refuses a workdir that another experiment has written, whose table would be lost."""
    table = folder / TABLE
    if table.exists() and table.read_text(encoding="utf-8").partition("\n")[0] != (
        heading := f"# {experiment.title}"
    ):
        raise UserError(
            f"{table}: is of another experiment, and this one would write {heading[2:]!r} in its "
            "place. Give another --workdir."
        )
