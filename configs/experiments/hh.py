"""Dialogues: win rates against the preferred responses of HH's test set, by a judge at an endpoint.

    python -m jaxpref.experiments --config=configs/experiments/hh.py --workdir=W \\
        --config.judge.name=endpoint:MODEL

As figure 3 of Rafailov et al. 2023 (arXiv 2305.18290): dialogues of one question, over temperatures
and over the steps of DPO. The runs are those of `configs/sft_hh.py` (Preferred-FT), `dpo_hh.py` and
`methods_hh.py:reward`: Pythia-2.8B, which needs accelerators. This has not been run here. `:tiny`
does the same with byte-level decoders of 1M parameters, on a file of HH's pairs and with any
endpoint:

    python -m jaxpref.experiments --config=configs/experiments/hh.py:tiny --workdir=W \\
        --config.pairs=hh-harmless.jsonl.gz --config.test.path=hh-harmless.jsonl.gz \\
        --config.judge.name=endpoint:MODEL --config.judge.base_url=http://localhost:8000/v1
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.data import Example
from jaxpref.experiments import Claim, Diagram, Experiment, is_small
from jaxpref.experiments.baselines import Judged
from jaxpref.experiments.win_rate_study import BEST_OF, USUAL, Recipes, Study

SIZES = ("paper", "tiny")
START = "preferred_ft"


def get_config(size: str = "paper") -> ConfigDict:
    """The data, the judge, the settings of `win_rate_study.Settings`, and what is varied."""
    tiny = is_small(size, SIZES)
    return ConfigDict(
        {
            "size": size,
            "pairs": "" if tiny else "Anthropic/hh-rlhf",
            "test": {
                "path": "" if tiny else "Anthropic/hh-rlhf",
                "subset": "",
                "split": "train" if tiny else "test",
                "format": "hh",
            },
            "judge": {
                "name": "",
                "base_url": "",
                "template": "dialogue",
                "max_requests": 0,
            },
            "settings": {
                "prompts": 16 if tiny else 256,
                "samples": 1,
                "best_of": 4 if tiny else 128,
                "best_of_prompts": 16 if tiny else 256,
                "max_new_tokens": 48 if tiny else 256,
                "seed": 0,
            },
            # Where the runs are, or shall be; empty: in the workdir.
            "runs": "",
            "temperatures": (0.0, 1.0) if tiny else (0.25, 0.5, 0.75, 1.0),
            "steps": (10, 20) if tiny else (300, 600, 1_200, 2_400),
        }
    ).lock()


def get_recipes(config: ConfigDict) -> Recipes:
    """The runs, with their data."""
    arguments = {
        START: ("sft_hh", config.size),
        "dpo": ("dpo_hh", config.size),
        "reward": ("methods_hh", "reward" if config.size == "tiny" else "reward,paper"),
    }
    configs = {}
    for name, (recipe, argument) in arguments.items():
        path = Path(__file__).parents[1] / f"{recipe}.py"
        configs[name] = runpy.run_path(str(path))["get_config"](argument)
        configs[name].data.path = config.pairs
    configs["dpo"].train.steps = max(config.steps)
    return Recipes(configs, start=START)


def is_one_question(example: Example) -> bool:
    """Whether a dialogue is one question and its answer."""
    return str(example.prompt).count("\n\nHuman:") == 1


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    baselines = {USUAL: Judged(workdir, {**config.judge}, {**config.test}, keep=is_one_question)}
    study = Study(get_recipes(config), config.runs or workdir, baselines, **config.settings)
    *early, last = sorted(config.steps)
    jobs = [study.at_temperatures("dpo", config.temperatures, steps=steps) for steps in early]
    jobs += [study.at_temperatures("dpo", config.temperatures, steps=last)]
    jobs += [study.at_temperatures(method, config.temperatures) for method in (START, BEST_OF)]
    where = {"step": (last, "all")}
    hot = {"temperature": max(config.temperatures)}
    dpo = {"method": "dpo", **where, **hot}
    return Experiment(
        title="Dialogues against the preferred responses of HH",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), figure 3.",
        jobs=jobs,
        figure=[
            Diagram("at the end", "temperature", "win_rate", where),
            Diagram(
                f"at temperature {max(config.temperatures):g}",
                "step",
                "win_rate",
                {**hot, "step": tuple(config.steps)},
            ),
        ],
        claims=[
            Claim("DPO is preferred to the preferred responses", "win_rate", dpo, by=0.5),
            Claim(
                "DPO wins more often than Preferred-FT",
                "win_rate",
                dpo,
                {"method": START, **hot},
            ),
            Claim(
                f"DPO wins more often than the best of {config.settings.best_of}",
                "win_rate",
                dpo,
                {"method": BEST_OF, **hot},
            ),
        ],
    )
