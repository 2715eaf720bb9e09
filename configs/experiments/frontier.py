"""Reward over KL on the enumerable task, with the exact optimum and the exact best of N.

    python -m jaxpref.experiments --config=configs/experiments/frontier.py:quick --workdir=W

As figure 2 (left) of Rafailov et al. 2023 (arXiv 2305.18290), where the frontier can be known.
`quick` has a set of 2,000 pairs and fresh ones; without it there are three sets.
"""

from ml_collections import ConfigDict

from jaxpref.errors import UserError
from jaxpref.experiments import Claim, Diagram, Experiment, frontier_study, is_small
from jaxpref.experiments.frontier_study import END, EXACT

SIZES = ("full", "quick")


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `frontier_study.jobs`."""
    quick = is_small(size, SIZES)
    return ConfigDict(
        {
            "betas": (0.1, 0.3, 1.0, 3.0),
            "alphas": (0.05, 0.1, 0.5, 1.0),
            "pairs": (2_000, 0) if quick else (2_000, 20_000, 100_000, 0),
            "seeds": 16,
            "steps": 2_000,
            "batch_size": 256,
            "learning_rate": 0.03,
            "checkpoints": 10,
        }
    ).lock()


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    fewest = min((count for count in config.pairs if count), default=0)
    if not fewest:
        raise UserError(f"--config.pairs should have a number above 0; got {config.pairs}.")
    last = {"at": END}
    series = ("method", "learns from")
    on_true = {"method": "ppo", "learns from": "true reward", **last}
    on_learned = {"method": "ppo", "learns from": "learned reward", "pairs": fewest, **last}
    claims = []
    for beta in (0.3, 1.0, 3.0):
        for name, labels in (
            ("DPO on fresh pairs", {"method": "dpo", "pairs": "fresh", **last}),
            ("PPO on the true reward", on_true),
        ):
            claims.append(
                Claim(
                    f"{name} gains at least 98% of what its KL allows, for beta {beta:g}",
                    "gain_share",
                    {**labels, "beta": beta},
                    by=0.98,
                )
            )
    dpo = {"method": "dpo", "pairs": fewest, **last}
    of_set = f"from {fewest:,} pairs"
    for name, other in (
        ("PPO on the reward learned from them", on_learned),
        ("PPO on the true reward", on_true),
        ("Preferred-FT", {"method": "preferred_ft", "pairs": fewest, **last}),
        ("unlikelihood", {"method": "unlikelihood", "pairs": fewest, **last}),
    ):
        text = f"DPO {of_set} gains a larger share of what its KL allows than {name}"
        claims.append(Claim(text, "gain_share", dpo, other))
    return Experiment(
        title="The frontier of reward and KL on the enumerable task",
        source="As Rafailov et al. 2023 (arXiv 2305.18290), figure 2 left.",
        jobs=frontier_study.jobs(**config),
        figure=[
            Diagram("all checkpoints", "kl", "reward", series=series, joined=False),
            Diagram(
                "at the end", "kl", "reward", {"at": (END, EXACT)}, series=series, joined=False
            ),
            Diagram(
                "DPO at the end",
                "beta",
                "gain_share",
                {"method": "dpo", **last},
                series=("pairs",),
                log_x=True,
            ),
        ],
        claims=claims,
        table=last,
    )
