"""RLHF on the quickstart's generated task, whose true reward is known: `rlhf_quickstart.py:METHOD`.

    python -m jaxpref.main --config=configs/rlhf_quickstart.py:ppo --workdir=W

METHOD is ppo, reinforce, remax, rloo, grpo, reinforce_pp, rejection_sampling or online_dpo. The
policy begins with SFT, and learns from a reward model that was trained on preference pairs; both
are made in `W/sft` and `W/reward` first, unless `--config.model.init_from` and
`--config.reward.path` say where they are. `benchmarks/RESULTS.md` has a table of all methods.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import METHODS
from jaxpref.workdir import as_path

# What a method sets otherwise.
SETTINGS = {
    "ppo": {"samples": 2, "learning_rate": 3e-4},
    "reinforce": {"samples": 2},
    "remax": {"samples": 2},
    "reinforce_pp": {"samples": 2},
    "rloo": {},
    "grpo": {},
    # In larger steps these two find what the reward model likes by mistake.
    "rejection_sampling": {"learning_rate": 1e-4},
    "online_dpo": {"learning_rate": 1e-4},
}


def get_config(method: str = "rloo") -> ConfigDict:
    """The recipe of a method."""
    if method not in SETTINGS:
        raise ValueError(one_of("the recipe's argument", method, SETTINGS))
    assert METHODS[method].samples
    config = base.default(method)
    shared = _quickstart("sft")
    config.model.update(shared.model)
    config.data.update(shared.data)
    config.data.batch_size = 32
    config.eval.max_examples = 128
    config.sampling.samples = SETTINGS[method].get("samples", 4)
    config.sampling.max_new_tokens = 56
    config.data.rows = 8
    if "beta" in config.algorithm:
        # With less the policy soon finds what the reward model likes by mistake.
        config.algorithm.beta = 0.2
    config.optimizer.learning_rate = SETTINGS[method].get("learning_rate", 3e-4)
    config.optimizer.warmup_steps = 5
    config.train.steps = 30
    config.train.log_every = 5
    return config


def get_stages(config: ConfigDict, workdir: str) -> list[tuple[ConfigDict, str]]:
    """SFT and the reward model, unless the config says where they are."""
    sft, reward = (str(as_path(workdir) / name) for name in ("sft", "reward"))
    stages = []
    if not config.model.init_from:
        stages.append((_quickstart("sft"), sft))
        config.model.init_from = sft
    if not (config.reward.path or config.reward.function or config.reward.mixture):
        own = _quickstart("reward")
        own.model.init_from = config.model.init_from
        stages.append((own, reward))
        config.reward.path = reward
    return stages


def _quickstart(stage: str) -> ConfigDict:
    """A stage of the quickstart, whose model and data these are."""
    return runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"](stage)
