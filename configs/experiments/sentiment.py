"""Controlled sentiment on sentences of movie reviews: reward over KL, reward hacking, gradients.

    python -m jaxpref.experiments --config=configs/experiments/sentiment.py:quick --workdir=W \\
        --config.settings.sentences=movie-review-sentences.jsonl.gz

As figure 2 (left) of Rafailov et al. 2023 (arXiv 2305.18290), section 6.1, with small models that
are trained from nothing on Pang and Lee's (2005) sentences; `configs/sentiment_sft.py` tells the
data. `quick` has fewer of each method's strengths.

On two CPU cores (2026-11-22) `quick` took 15 minutes, and all of it 41 minutes beside other work.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.experiments import Claim, Diagram, Experiment, is_small
from jaxpref.experiments.sentiment_study import CLASSIFIER, START, Recipes, Study
from jaxpref.methods import METHODS

SIZES = ("full", "quick")
_HERE = Path(__file__).parents[1]


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `sentiment_study.Settings`, and the strengths of each method."""
    quick = is_small(size, SIZES)
    return ConfigDict(
        {
            "settings": {
                "sentences": "",
                "train_prompts": 1_024 if quick else 2_048,
                "prompts": 256 if quick else 512,
                "max_new_tokens": 40,
                "best_of": 16 if quick else 64,
                "seed": 0,
            },
            "steps": 60 if quick else 120,
            "alphas": (0.05, 0.5) if quick else (0.05, 0.1, 0.5, 1.0),
            "betas": (0.1, 1.0) if quick else (0.05, 0.1, 1.0, 5.0),
            "kl_targets": (3.0, 9.0) if quick else (3.0, 6.0, 9.0, 12.0),
        }
    ).lock()


def get_recipe(method: str, steps: int, max_new_tokens: int) -> ConfigDict:
    """The config of a run, but for its paths."""
    if method in (START, CLASSIFIER):
        name = {START: "sentiment_sft", CLASSIFIER: "sentiment_reward"}[method]
        config = runpy.run_path(str(_HERE / f"{name}.py"))["get_config"]()
        if method == START:
            config.model.layers = 2
            config.train.eval_every = 0
        return config
    samples = METHODS[method].samples
    config = base.default(method)
    config.model.layers = 2
    config.data.max_prompt_length = 48
    config.data.max_length = 48 + max_new_tokens
    config.data.row_length = 256
    config.data.eval_fraction = 0.05
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 5
    config.train.steps = steps
    config.train.log_every = 1 if samples else 20
    # 64 pairs, or responses, a step.
    config.data.batch_size = 64 // config.sampling.samples if samples else 64
    if samples:
        config.sampling.max_new_tokens = max_new_tokens
        config.data.rows = 8
        config.eval.max_examples = 32
    if method == "ppo":
        config.critic.learning_rate = 3e-4
        # A run has a few thousand responses in all, in which the KL is to come to its target.
        config.algorithm.kl_horizon = 200
    return config


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    prepare = runpy.run_path(str(_HERE / "sentiment_sft.py"))["prepare"]

    def recipe(method: str) -> ConfigDict:
        return get_recipe(method, config.steps, config.settings.max_new_tokens)

    study = Study(Recipes(prepare, recipe), workdir, **config.settings)
    series = ("method", "learns from")
    true, learned = {"learns from": "true reward"}, {"learns from": "learned reward"}
    jobs = [study.classifiers(), study.policy(START), study.best_of()]
    jobs += [study.policy(name) for name in ("preferred_ft", "slic_hf", "rrhf")]
    for alpha in config.alphas:
        jobs.append(study.policy("unlikelihood", {"alpha": alpha}, algorithm__alpha=alpha))
    for beta in config.betas:
        jobs.append(study.policy("dpo", {"beta": beta}, algorithm__beta=beta))
    for target in config.kl_targets:
        for on, labels in (("true", true), ("learned", learned)):
            known = {**labels, "KL target": target}
            jobs.append(study.policy("ppo", known, on=on, algorithm__kl_target=target))
    jobs += [study.policy(name, true) for name in ("reinforce", "remax")]

    def more(text: str, of: dict, than: dict, measure: str = "efficiency") -> Claim:
        return Claim(text, measure, of, than)

    dpo, start = {"method": "dpo"}, {"method": START}
    ppo_true, ppo_learned = {"method": "ppo", **true}, {"method": "ppo", **learned}
    return Experiment(
        title="Controlled sentiment",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), section 6.1 and figure 2 left. "
        "Efficiency is the reward gained per root of the KL; over all strengths of a method.",
        jobs=jobs,
        figure=[
            *(
                Diagram(title, "kl", measure, series=series, joined=False)
                for title, measure in (
                    ("the true reward", "reward"),
                    ("the reward model", "learned_reward"),
                    ("an independent judge", "positive, naive Bayes"),
                )
            ),
            Diagram(
                "gradients", "step", "gradient_norm", {"of": "part of the steps"}, series=series
            ),
        ],
        claims=[
            Claim(
                "The classifiers are right about 0.72 of unseen sentences",
                "accuracy",
                {"method": "true reward"},
                by=0.72,
            ),
            more("DPO is more efficient than PPO on the learned reward", dpo, ppo_learned),
            more("DPO is more efficient than PPO on the true reward", dpo, ppo_true),
            more("DPO is more efficient than Preferred-FT", dpo, {"method": "preferred_ft"}),
            more("DPO is more efficient than unlikelihood", dpo, {"method": "unlikelihood"}),
            more("DPO is more efficient than SLiC-HF", dpo, {"method": "slic_hf"}),
            more("DPO is more efficient than RRHF", dpo, {"method": "rrhf"}),
            more(
                "PPO on the true reward is hacking it: naive Bayes agrees less than before",
                ppo_true,
                start,
                "disagreement",
            ),
            more(
                "The gradients of REINFORCE are larger than those of ReMax",
                {"method": "reinforce", "of": "steps"},
                {"method": "remax", "of": "steps"},
                "gradient_norm",
            ),
        ],
    )
