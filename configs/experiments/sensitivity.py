"""DPO and PPO over learning rate and beta, on the enumerable task: reward and KL.

    python -m jaxpref.experiments --config=configs/experiments/sensitivity.py:quick --workdir=W

Rafailov et al. 2023 (arXiv 2305.18290) say of DPO that it needs little tuning (abstract), and tune
beta alone. Both methods learn from the same number of pairs, over five seeds.
"""

from ml_collections import ConfigDict

from jaxpref.experiments import Claim, Diagram, Experiment, frontier_study, is_small
from jaxpref.experiments.frontier_study import END

SIZES = ("full", "quick")


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `frontier_study.sensitivity`."""
    quick = is_small(size, SIZES)
    return ConfigDict(
        {
            "betas": (0.1, 0.3, 1.0, 3.0),
            "learning_rates": (1e-3, 1e-2, 1e-1) if quick else (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
            "pairs": 20_000,
            "seeds": 5,
            "steps": 1_000 if quick else 2_000,
            "batch_size": 256,
            "checkpoints": 1,
        }
    ).lock()


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    dpo, ppo = ({"method": method, "at": END} for method in ("dpo", "ppo"))
    lowest, highest = min(config.learning_rates), max(config.learning_rates)
    middle = sorted(config.learning_rates)[len(config.learning_rates) // 2]
    claims = [
        Claim(
            "Over all learning rates and betas DPO gains a larger share of what its KL allows",
            "gain_share",
            dpo,
            ppo,
        ),
        *(
            Claim(
                f"DPO has a higher value than PPO at learning rate {rate:g}, over all betas",
                "value",
                {**dpo, "learning rate": rate},
                {**ppo, "learning rate": rate},
            )
            for rate in (lowest, middle, highest)
        ),
    ]
    return Experiment(
        title="DPO and PPO over learning rate and beta on the enumerable task",
        source="Rafailov et al. 2023 (arXiv 2305.18290), abstract and appendix B.",
        jobs=frontier_study.sensitivity(**config),
        figure=[
            Diagram(
                f"beta {beta:g}",
                "learning rate",
                measure,
                {"beta": beta, "at": END},
                log_x=True,
            )
            for beta in (min(config.betas), sorted(config.betas)[len(config.betas) // 2])
            for measure in ("reward", "kl")
        ],
        claims=claims,
        table={"at": END},
    )
