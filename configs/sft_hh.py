"""SFT on the chosen responses of Anthropic's HH dialogues: the model that DPO starts from.

Paper: Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290), section 6.
The default is its setting (Pythia-2.8B); `:tiny` is a 1M-parameter byte-level decoder from
scratch, for a laptop:

    python -m jaxpref.main --config=configs/sft_hh.py:tiny --workdir=A \
        --config.data.path=hh-harmless.jsonl.gz

On the 1,734 pairs of harmless-base's test split, `:tiny` took 2 minutes on two CPU cores
(2026-11-21) and brought the held-out loss from 5.88 to 2.45 nats a byte. The paper's
setting has not been run here: it needs accelerators.
"""

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    if size not in ("paper", "tiny"):
        raise ValueError(one_of("the recipe's argument", size, ("paper", "tiny")))
    config = base.default("sft")
    config.data.format = "hh"
    config.data.on_divergent = "skip"
    config.data.on_empty = "skip"
    config.data.on_long_prompt = "truncate"
    config.train.log_every = 10
    if size == "tiny":
        config.model.width = 128
        config.model.layers = 4
        config.data.max_length = 768
        config.data.max_prompt_length = 384
        config.data.batch_size = 16
        config.optimizer.learning_rate = 2e-3
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup_steps = 10
        return config
    config.model.init_from = "EleutherAI/pythia-2.8b"
    config.model.dtype = "bfloat16"
    config.data.path = "Anthropic/hh-rlhf"
    config.data.eval_split = "test"
    config.eval.max_examples = 256
    config.data.batch_size = 64
    config.optimizer.name = "rmsprop"
    config.optimizer.b1 = 0.0
    config.optimizer.b2 = 0.99
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 10.0
    config.train.eval_every = 300
    config.train.save_every = 300
    return config
