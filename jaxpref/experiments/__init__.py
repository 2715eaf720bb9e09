"""The papers' experiments: what is measured, what is claimed of it, and whether that held.

An experiment is a record in `configs/experiments/`. It consists of *jobs*, of which each gives
*points*: what was measured under some labels, such as a method and a beta, with one value for each
of many seeds or prompts. *Claims* compare points by confidence intervals, and end as *held*, *did
not hold* or *not resolved*. `python -m jaxpref.experiments` does the jobs that are not done, and
writes `points.jsonl`, `table.md` and `figure.png`.

The studies, from which the jobs come, are modules here: `bandit_study` and `frontier_study`.
"""

from jaxpref.experiments.claims import Claim, Verdict, decide
from jaxpref.experiments.experiment import Diagram, Experiment, Published, is_small
from jaxpref.experiments.points import Estimate, Job, Point, estimate, select
from jaxpref.experiments.run import Outcome, run

__all__ = [
    "Claim",
    "Diagram",
    "Estimate",
    "Experiment",
    "Job",
    "Outcome",
    "Point",
    "Published",
    "Verdict",
    "decide",
    "estimate",
    "is_small",
    "run",
    "select",
]
