"""RLHF on the quickstart's generated task, whose true reward is known: `rlhf_quickstart.py:METHOD`.

    python -m jaxpref.main --config=configs/rlhf_quickstart.py:ppo --workdir=W

METHOD is ppo, reinforce, remax, rloo, grpo, reinforce_pp, rejection_sampling or online_dpo.
"""

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import METHODS

# What a method sets otherwise.
SETTINGS = {
    "ppo": {"samples": 2, "learning_rate": 3e-4},
    "reinforce": {"samples": 2},
    "remax": {"samples": 2},
    "reinforce_pp": {"samples": 2},
    "rloo": {},
    "grpo": {},
    "rejection_sampling": {},
    "online_dpo": {},
}


def get_config(method: str = "rloo") -> ConfigDict:
    """The recipe of a method."""
    if method not in SETTINGS:
        raise ValueError(one_of("the recipe's argument", method, SETTINGS))
    assert METHODS[method].samples
    config = base.default(method)
    config.model.width = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.head_dim = 32
    config.model.feed_forward = 384
    config.model.init_from = "runs/quickstart/sft"
    config.data.format = "synthetic"
    config.data.synthetic_pairs = 5600
    config.data.eval_fraction = 0.1
    config.data.batch_size = 32
    config.data.max_length = 128
    config.data.max_prompt_length = 64
    config.data.row_length = 256
    config.eval.max_examples = 128
    config.sampling.samples = SETTINGS[method].get("samples", 4)
    config.sampling.max_new_tokens = 56
    config.sampling.rows = 8
    config.reward.path = "runs/quickstart/reward"
    if "beta" in config.algorithm:
        config.algorithm.beta = 0.05
    config.optimizer.learning_rate = SETTINGS[method].get("learning_rate", 3e-4)
    config.optimizer.warmup_steps = 5
    config.train.steps = 40
    config.train.log_every = 5
    config.train.eval_every = 20
    return config
