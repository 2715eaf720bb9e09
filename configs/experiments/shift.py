"""Prompts in other words and about unseen topics: win rates on the generated task.

    python -m jaxpref.experiments --config=configs/experiments/shift.py:quick --workdir=W \\
        --config.runs=V

V is the workdir of `temperatures.py`, whose runs are used; without it they are trained in W.

As table 1 of Rafailov et al. 2023 (arXiv 2305.18290), where policies trained on TL;DR summarise
articles of CNN/DailyMail at temperatures 0 and 0.25. Here guests are named in other words, and ask
about dishes that no training prompt has named.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.experiments import Claim, Diagram, Experiment
from jaxpref.experiments.baselines import Generated
from jaxpref.experiments.win_rate_study import USUAL, Study

# The generated task's runs are those of the win rates over temperatures.
_RUNS = runpy.run_path(str(Path(__file__).with_name("temperatures.py")))
METHODS = ("sft", "dpo", "ppo")
SHIFTED = "other words and topics"


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `win_rate_study.Settings`, and the temperatures."""
    settings = _RUNS["get_config"](size).settings
    return ConfigDict({"settings": settings, "runs": "", "temperatures": (0.0, 0.25)}).lock()


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    runs = config.runs or workdir
    recipes = _RUNS["get_recipes"](80, runs)
    baselines = {USUAL: Generated(), SHIFTED: Generated(shifted=True)}
    study = Study(recipes, runs, baselines, **config.settings)
    claims = []
    for temperature in config.temperatures:
        at = {"temperature": temperature}
        for prompts in (USUAL, SHIFTED):
            where = {**at, "prompts": prompts}
            claims.append(
                Claim(
                    f"DPO wins more often than PPO at temperature {temperature:g}, prompts "
                    f"{prompts}",
                    "win_rate",
                    {"method": "dpo", **where},
                    {"method": "ppo", **where},
                )
            )
        claims.append(
            Claim(
                f"DPO wins less often on shifted prompts, at temperature {temperature:g}",
                "win_rate",
                {"method": "dpo", **at, "prompts": USUAL},
                {"method": "dpo", **at, "prompts": SHIFTED},
            )
        )
    return Experiment(
        title="Shifted prompts on the generated task",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), table 1.",
        jobs=[
            study.at_temperatures(method, config.temperatures, prompts=prompts)
            for prompts in baselines
            for method in METHODS
        ],
        figure=[
            Diagram(
                f"temperature {temperature:g}",
                "prompts",
                "win_rate",
                {"temperature": temperature},
                joined=False,
            )
            for temperature in config.temperatures
        ],
        claims=claims,
    )
