"""Best of N on the generated task: reward and win rate over N, chosen by the reward model.

    python -m jaxpref.experiments --config=configs/experiments/best_of_n.py:quick --workdir=W \\
        --config.runs=V

V is the workdir of `temperatures.py`, whose runs are used; without it they are trained in W.

As in the dialogue experiment of Rafailov et al. 2023 (arXiv 2305.18290), section 6.2, which samples
up to 128 responses; beside it what could be had if the true reward chose.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.experiments import Claim, Diagram, Experiment, is_small
from jaxpref.experiments.baselines import Generated
from jaxpref.experiments.win_rate_study import BEST_OF, USUAL, Study

SIZES = ("full", "quick")
# The generated task's runs are those of the win rates over temperatures.
_RUNS = runpy.run_path(str(Path(__file__).with_name("temperatures.py")))


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `win_rate_study.Settings`, and the numbers of samples."""
    quick = is_small(size, SIZES)
    most = 16 if quick else 128
    settings = {**_RUNS["get_config"](size).settings, "best_of": most}
    numbers = tuple(2**k for k in range(8) if 2**k <= most)
    return ConfigDict({"settings": settings, "runs": "", "numbers": numbers}).lock()


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    runs = config.runs or workdir
    recipes = _RUNS["get_recipes"](80, runs)
    study = Study(recipes, runs, {USUAL: Generated()}, **config.settings)
    model, truth = {"chosen by": "reward model"}, {"chosen by": "true reward"}
    one, most = min(config.numbers), max(config.numbers)
    middle = sorted(config.numbers)[len(config.numbers) // 2]

    def more(text: str, measure: str, of: dict, than: dict) -> Claim:
        return Claim(text, measure, {"method": BEST_OF, **of}, {"method": BEST_OF, **than})

    return Experiment(
        title="Best of N on the generated task",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), section 6.2.",
        jobs=[study.over_n(config.numbers)],
        figure=[
            Diagram("chosen of N samples", "n", measure, series=("chosen by",), log_x=True)
            for measure in ("reward", "win_rate", "learned_reward")
        ],
        claims=[
            more(
                f"The best of {most} by the reward model has a higher true reward than one sample",
                "reward",
                {**model, "n": most},
                {**model, "n": one},
            ),
            more(
                f"The true reward still rises from the best of {middle} to that of {most}",
                "reward",
                {**model, "n": most},
                {**model, "n": middle},
            ),
            more(
                f"The reward model's choice of {most} has a lower true reward than the best one",
                "reward",
                {**truth, "n": most},
                {**model, "n": most},
            ),
        ],
    )
