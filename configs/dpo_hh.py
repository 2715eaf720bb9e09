"""DPO on Anthropic's HH dialogues, from an SFT checkpoint as policy and frozen reference.

Paper: Rafailov et al. 2023, Direct Preference Optimization (arXiv 2305.18290), section 6
and appendix B: beta 0.1, batches of 64, RMSprop at 1e-6 after a linear warm-up of 150
steps, one epoch. The default is its setting (Pythia-2.8B); `:tiny` goes on from
`configs/sft_hh.py:tiny` in workdir A, on a laptop:

    python -m jaxpref.main --config=configs/dpo_hh.py:tiny --workdir=B \
        --config.data.path=hh-harmless.jsonl.gz

On the 1,734 pairs of harmless-base's test split, `:tiny` took 4 minutes on two CPU cores
(2026-11-21) and reached a preference accuracy of 0.66 on 86 held-out pairs (margin 0.26,
loss 0.639). The paper's setting has not been run here: it needs accelerators.
"""

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    if size not in ("paper", "tiny"):
        raise ValueError(one_of("the recipe's argument", size, ("paper", "tiny")))
    config = base.default("dpo")
    config.algorithm.beta = 0.1
    config.data.format = "hh"
    config.data.on_divergent = "skip"
    config.data.on_empty = "skip"
    config.data.on_long_prompt = "truncate"
    config.train.log_every = 10
    if size == "tiny":
        # The workdir of configs/sft_hh.py:tiny.
        config.model.init_from = "A"
        config.model.width = 128
        config.model.layers = 4
        config.data.max_length = 768
        config.data.max_prompt_length = 384
        config.data.batch_size = 16
        config.optimizer.learning_rate = 1e-4
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
    config.optimizer.learning_rate = 1e-6
    config.optimizer.warmup_steps = 150
    config.optimizer.clip_norm = 10.0
    config.train.eval_every = 300
    config.train.save_every = 300
    return config
