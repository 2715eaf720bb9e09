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

POINTS, TABLE, FIGURE = "points.jsonl", "table.md", "figure.png"


class Outcome(NamedTuple):
    """What an experiment found.

    Attributes:
      points: all of its jobs.
      verdicts: of its claims.
    """

    points: list[Point]
    verdicts: list[Verdict]


def run(experiment: Experiment, workdir: str | Path) -> Outcome:
    """Does the jobs that are not done; writes points, table and figure into the workdir.

    Args:
      experiment: what is to be done.
      workdir: of this experiment. A job whose settings are those of the workdir's points is not
        done again.

    Raises:
      UserError: the workdir cannot be written, a measurement is not finite, or a claim reads what
        was not measured.
    """
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}).") from error
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
        file.add(job, job.points())
        console.print(f"    {time.monotonic() - begun:.0f} s")
    points = [point for job in experiment.jobs for point in file.done[job.key]]
    verdicts = [decide(claim, points) for claim in experiment.claims]
    write_table(experiment, points, verdicts, folder / TABLE)
    draw(experiment, points, folder / FIGURE)
    for verdict in verdicts:
        console.print(f"{verdict.verdict:>12}: {verdict.claim.text}; {in_words(verdict)}")
    console.print(f"{folder / TABLE}, {folder / FIGURE}")
    return Outcome(points, verdicts)
