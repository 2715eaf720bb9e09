"""SFT, then DPO, on generated pairs whose true reward is known; no files, no network.

    make quickstart

which is

    python -m jaxpref.main --config=configs/quickstart.py:sft --workdir=runs/quickstart/sft
    python -m jaxpref.main --config=configs/quickstart.py:dpo --workdir=runs/quickstart/dpo

On two CPU cores (2026-11-22) both take less than two minutes; on held-out pairs DPO reaches a
preference accuracy of 0.809 (the true reward: 0.807) and a rank correlation of 0.95 with the
true reward. Its policy answers 128 held-out prompts at each evaluation. In the place of `dpo`
any other method on data can stand, such as `reward` or `ipo`; `configs/rlhf_quickstart.py` has
those that sample.
"""

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import OFFLINE


def get_config(stage: str = "sft") -> ConfigDict:
    """The config of one stage, "sft" or a method that goes on from it."""
    if stage not in OFFLINE:
        raise ValueError(one_of("the recipe's argument", stage, OFFLINE))
    config = base.default(stage)
    config.model.width = 128
    config.model.layers = 3
    config.model.heads = 4
    config.model.kv_heads = 2
    config.model.head_dim = 32
    config.model.feed_forward = 384
    config.data.format = "synthetic"
    config.data.synthetic_pairs = 5600
    config.data.eval_fraction = 0.1
    config.data.batch_size = 64
    config.data.max_length = 128
    config.data.max_prompt_length = 64
    config.data.row_length = 256
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 10
    config.train.log_every = 10
    if stage == "sft":
        config.optimizer.learning_rate = 3e-3
        config.train.steps = 160
    else:
        config.model.init_from = "runs/quickstart/sft"
        if stage == "dpo":
            config.algorithm.beta = 0.3
            config.eval.win_rate_prompts = 128
        config.optimizer.learning_rate = 3e-4
        config.train.steps = 80
        config.train.eval_every = 40
    return config
