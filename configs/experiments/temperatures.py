"""Win rates over temperatures and over steps on the generated task, with the true reward as judge.

    python -m jaxpref.experiments --config=configs/experiments/temperatures.py:quick --workdir=W

As figure 2 (right) and figure 3 of Rafailov et al. 2023 (arXiv 2305.18290): how often the responses
of SFT, Preferred-FT, DPO, PPO and best-of-N are better than the chosen ones of test pairs.
"""

import json
import runpy
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref.data import synthetic
from jaxpref.experiments import Claim, Diagram, Experiment, is_small
from jaxpref.experiments.baselines import Generated
from jaxpref.experiments.win_rate_study import BEST_OF, USUAL, Recipes, Study

SIZES = ("full", "quick")
# The seed of the data that runs train on; test pairs have another one.
_TRAINING = 0


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `win_rate_study.Settings`, and what is varied."""
    quick = is_small(size, SIZES)
    return ConfigDict(
        {
            "settings": {
                "prompts": 128 if quick else 512,
                "samples": 4,
                "best_of": 16 if quick else 128,
                "best_of_prompts": 64 if quick else 128,
                "max_new_tokens": 56,
                "seed": 0,
            },
            # Where the runs are, or shall be; empty: in the workdir.
            "runs": "",
            "temperatures": (0.0, 0.5, 1.0) if quick else (0.0, 0.25, 0.5, 0.75, 1.0),
            "steps": (20, 80) if quick else (10, 20, 40, 80),
        }
    ).lock()


def get_recipes(steps: int, workdir: str) -> Recipes:
    """The quickstart's runs; methods on pairs have the same steps and a constant rate."""
    here = Path(__file__).parents[1]
    offline = runpy.run_path(str(here / "quickstart.py"))["get_config"]
    sft = offline("sft")
    # It sees both responses of every pair, twice as many as the quickstart's.
    sft.train.steps = 480
    sft.data.format = "sft"
    sft.data.path = str(Path(workdir).resolve() / "data" / "sft.jsonl")
    preferred_ft, dpo = offline("sft"), offline("dpo")
    preferred_ft.optimizer.learning_rate = dpo.optimizer.learning_rate
    for config in (preferred_ft, dpo):
        config.optimizer.schedule = "constant"
        config.train.steps = steps
        config.train.eval_every = 0
    ppo = runpy.run_path(str(here / "rlhf_quickstart.py"))["get_config"]("ppo")
    configs = {
        "sft": sft,
        "preferred_ft": preferred_ft,
        "dpo": dpo,
        "reward": offline("reward"),
        "ppo": ppo,
    }
    for config in configs.values():
        config.train.log_every = 20
    pairs = sft.data.synthetic_pairs
    return Recipes(configs, prepare=partial(write_sft, Path(sft.data.path), pairs))


def write_sft(path: Path, pairs: int) -> None:
    """Both responses of every pair: SFT is to know the task, not which response is better."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"prompt": pair.prompt, "completion": response})
        for pair in synthetic.generate(pairs, _TRAINING)
        for response in pair.responses
    ]
    path.write_text("".join(f"{line}\n" for line in lines))


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    runs = config.runs or workdir
    recipes = get_recipes(max(config.steps), runs)
    study = Study(recipes, runs, {USUAL: Generated()}, **config.settings)
    jobs = [
        study.at_temperatures(method, config.temperatures, steps=steps)
        for method in ("preferred_ft", "dpo")
        for steps in sorted(config.steps)
    ]
    jobs += [study.at_temperatures(m, config.temperatures) for m in ("sft", "ppo", BEST_OF)]
    last = {"prompts": USUAL, "step": (max(config.steps), "all")}
    hot, cold = max(config.temperatures), min(config.temperatures)

    def of(method: str, temperature: float) -> dict:
        return {**last, "method": method, "temperature": temperature}

    over_steps = {"temperature": hot, "step": tuple(config.steps)}

    def better(text: str, method: str, other: str, temperature: float) -> Claim:
        return Claim(text, "win_rate", of(method, temperature), of(other, temperature))

    return Experiment(
        title="Win rates on the generated task against the chosen responses",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), figures 2 right and 3.",
        jobs=jobs,
        figure=[
            Diagram("at the end", "temperature", "win_rate", where=last),
            Diagram(f"at temperature {hot:g}", "step", "win_rate", over_steps),
        ],
        claims=[
            better(f"DPO wins more often than PPO at temperature {cold:g}", "dpo", "ppo", cold),
            better(f"DPO wins more often than PPO at temperature {hot:g}", "dpo", "ppo", hot),
            better(
                f"DPO wins more often than Preferred-FT at temperature {hot:g}",
                "dpo",
                "preferred_ft",
                hot,
            ),
            better(f"PPO wins more often than SFT at temperature {hot:g}", "ppo", "sft", hot),
            better(
                f"DPO wins more often than the best of {config.settings.best_of} at temperature "
                f"{hot:g}",
                "dpo",
                BEST_OF,
                hot,
            ),
            Claim(
                f"From temperature {cold:g} to {hot:g} the win rate of PPO falls more than DPO's",
                "fall",
                of("ppo", hot),
                of("dpo", hot),
            ),
        ],
    )
