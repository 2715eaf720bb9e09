"""Articles of CNN and the Daily Mail for policies that have learned to summarise Reddit posts.

    python -m jaxpref.experiments --config=configs/experiments/cnn_dailymail.py --workdir=W \\
        --config.runs=V --config.judge.name=endpoint:MODEL

V is the workdir of `tldr.py`, whose runs are used; without it they are trained in W. As table 1 of
Rafailov et al. 2023 (arXiv 2305.18290), where by GPT-4 DPO wins 36% and 31% against the articles'
own highlights at temperatures 0 and 0.25, and PPO 26% and 23%. This has not been run here. `:tiny`
is that of `tldr.py`, with articles of your own in `--config.test.path=TEST.jsonl`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.experiments import Claim, Diagram, Experiment
from jaxpref.experiments.baselines import Judged
from jaxpref.experiments.win_rate_study import USUAL, Study

_TLDR = runpy.run_path(str(Path(__file__).with_name("tldr.py")))


def get_config(size: str = "paper") -> ConfigDict:
    """As for TL;DR, with articles to summarise."""
    config = _TLDR["get_config"](size)
    with config.unlocked():
        if size == "paper":
            config.test = {"path": "abisee/cnn_dailymail", "subset": "3.0.0", "split": "test"}
        config.temperatures = (0.0, 0.25)
    return config


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    baselines = {USUAL: Judged(workdir, {**config.judge}, {**config.test})}
    recipes = _TLDR["get_recipes"](config)
    study = Study(recipes, config.runs or workdir, baselines, **config.settings)
    return Experiment(
        title="Articles of CNN and the Daily Mail against their highlights",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), table 1.",
        jobs=[study.at_temperatures(method, config.temperatures) for method in ("dpo", "ppo")],
        figure=[Diagram(f"the judge is {config.judge.name}", "temperature", "win_rate")],
        claims=[
            Claim(
                f"DPO wins more often than PPO at temperature {temperature:g}",
                "win_rate",
                {"method": "dpo", "temperature": temperature},
                {"method": "ppo", "temperature": temperature},
            )
            for temperature in config.temperatures
        ],
    )
