"""Summaries of Reddit posts: win rates against those that people wrote, by a judge at an endpoint.

    python -m jaxpref.experiments --config=configs/experiments/tldr.py --workdir=W \\
        --config.judge.name=endpoint:MODEL

As figure 2 (right) of Rafailov et al. 2023 (arXiv 2305.18290), where GPT-4 prefers DPO's summaries
in 61% of cases and PPO's in 57%, each at temperature 0. The runs are those of `configs/tldr.py`:
GPT-J, which needs accelerators. This has not been run here. `:tiny` does the same with byte-level
decoders of 1M parameters, on data of your own and with any endpoint:

    python -m jaxpref.experiments --config=configs/experiments/tldr.py:tiny --workdir=W \\
        --config.sft=SFT.jsonl --config.pairs=PAIRS.jsonl --config.test.path=TEST.jsonl \\
        --config.judge.name=endpoint:MODEL --config.judge.base_url=http://localhost:8000/v1
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.experiments import Claim, Diagram, Experiment, is_small
from jaxpref.experiments.baselines import Judged
from jaxpref.experiments.win_rate_study import BEST_OF, USUAL, Recipes, Study

SIZES = ("paper", "tiny")


def get_config(size: str = "paper") -> ConfigDict:
    """The data, the judge, the settings of `win_rate_study.Settings`, and the temperatures."""
    tiny = is_small(size, SIZES)
    return ConfigDict(
        {
            "size": size,
            "sft": "" if tiny else "trl-lib/tldr",
            "pairs": "" if tiny else "trl-lib/tldr-preference",
            "test": {
                "path": "" if tiny else "trl-lib/tldr",
                "subset": "",
                "split": "train" if tiny else "test",
            },
            "judge": {
                "name": "",
                "base_url": "",
                "template": "summary_concise",
                "max_requests": 0,
            },
            "settings": {
                "prompts": 16 if tiny else 256,
                "samples": 1,
                "best_of": 4 if tiny else 128,
                "best_of_prompts": 16 if tiny else 256,
                "max_new_tokens": 32 if tiny else 64,
                "seed": 0,
            },
            # Where the runs are, or shall be; empty: in the workdir.
            "runs": "",
            "temperatures": (0.0, 1.0) if tiny else (0.0, 0.25, 0.5, 0.75, 1.0),
        }
    ).lock()


def get_recipes(config: ConfigDict) -> Recipes:
    """The runs, with their data."""
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "tldr.py"))["get_config"]
    names = {"sft": "sft", "preferred_ft": "sft", "dpo": "dpo", "reward": "reward", "ppo": "ppo"}
    configs = {name: recipe(f"{method},{config.size}") for name, method in names.items()}
    for name, run in configs.items():
        run.data.path = config.sft if name == "sft" else config.pairs
    return Recipes(configs)


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    baselines = {USUAL: Judged(workdir, {**config.judge}, {**config.test})}
    study = Study(get_recipes(config), config.runs or workdir, baselines, **config.settings)
    methods = ("sft", "preferred_ft", "dpo", "ppo", BEST_OF)
    hot, cold = max(config.temperatures), min(config.temperatures)
    dpo, ppo, best = {"method": "dpo"}, {"method": "ppo"}, {"method": BEST_OF}
    at_cold, at_hot = {"temperature": cold}, {"temperature": hot}
    return Experiment(
        title="Summaries of Reddit posts against those that people wrote",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), figure 2 right.",
        jobs=[study.at_temperatures(method, config.temperatures) for method in methods],
        figure=[Diagram(f"the judge is {config.judge.name}", "temperature", "win_rate")],
        claims=[
            Claim(
                f"DPO wins more often than PPO at temperature {cold:g}",
                "win_rate",
                {**dpo, **at_cold},
                {**ppo, **at_cold},
            ),
            Claim(
                f"From temperature {cold:g} to {hot:g} the win rate of PPO falls more than DPO's",
                "fall",
                {**ppo, **at_hot},
                {**dpo, **at_hot},
            ),
            Claim(
                f"DPO at temperature {cold:g} wins more often than the best of "
                f"{config.settings.best_of} at temperature {hot:g}",
                "win_rate",
                {**dpo, **at_cold},
                {**best, **at_hot},
            ),
        ],
    )
