"""What a policy is worth on held-out data, and how to see it."""

from jaxpref.evaluation.calibration import plot_reliability, reliability
from jaxpref.evaluation.generation import Written, generate_file
from jaxpref.evaluation.held_out import evaluate
from jaxpref.evaluation.report import closing_table, plot_curves, samples_table
from jaxpref.evaluation.rewards import Scored, score_file
from jaxpref.evaluation.truth import reward_recovery

__all__ = [
    "Scored",
    "Written",
    "closing_table",
    "evaluate",
    "generate_file",
    "plot_curves",
    "plot_reliability",
    "reliability",
    "reward_recovery",
    "samples_table",
    "score_file",
]
