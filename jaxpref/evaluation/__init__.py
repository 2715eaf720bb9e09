"""What a policy is worth on held-out data, and how to see it."""

from jaxpref.evaluation import reward_bench
from jaxpref.evaluation.best_of_n import exact_best_of_n, expected_best, kl_bound
from jaxpref.evaluation.calibration import reliability
from jaxpref.evaluation.frontier import best_reward, gain_share
from jaxpref.evaluation.generation import Written, generate_file
from jaxpref.evaluation.held_out import evaluate
from jaxpref.evaluation.judges import Judged, judge_files
from jaxpref.evaluation.kl import sequence_kl
from jaxpref.evaluation.plots import plot_curves, plot_reliability
from jaxpref.evaluation.report import closing_table, samples_table
from jaxpref.evaluation.rewards import Scored, score_file
from jaxpref.evaluation.truth import reward_recovery
from jaxpref.evaluation.win_rates import (
    agreement,
    both_orders,
    difference,
    length_controlled,
    win_rate,
)

__all__ = [
    "Judged",
    "Scored",
    "Written",
    "agreement",
    "best_reward",
    "both_orders",
    "closing_table",
    "difference",
    "evaluate",
    "exact_best_of_n",
    "expected_best",
    "gain_share",
    "generate_file",
    "judge_files",
    "kl_bound",
    "length_controlled",
    "plot_curves",
    "plot_reliability",
    "reliability",
    "reward_bench",
    "reward_recovery",
    "samples_table",
    "score_file",
    "sequence_kl",
    "win_rate",
]
