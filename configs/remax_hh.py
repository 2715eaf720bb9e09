"""ReMax on Anthropic's HH dialogues, from an SFT policy and a reward model.

Paper: Li et al. 2023, ReMax (arXiv 2310.10505); the default has the settings of its authors'
code for Llama-2-7B on HH: learning rate 1e-6 with a cosine, weight decay 0.1, KL coefficient
0.05, discount 0.99, rewards clipped at 5, losses averaged over tokens, prompts and responses of
256 tokens, one epoch. They sample with top-p 0.9, which is left out here, since the policy would
be trained on what it would not say; their batch depends on their GPUs, and 64 is ours. `:tiny`
goes on from workdirs A and R on a laptop, which `configs/rlhf_hh.py` tells how to make:

    python -m jaxpref.main --config=configs/remax_hh.py:tiny --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

In 13 of its 20 steps (2026-11-22) the mean reward of what is sampled rose from 0.03 to 0.75, at a
KL of 3.6 nats (`rlhf_hh.py` says what that is worth).

The paper's setting has not been run here: it needs accelerators.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    shared = runpy.run_path(str(Path(__file__).parent / "rlhf_hh.py"))["get_config"]
    config = shared(f"remax,{size}")
    if size == "tiny":
        return config
    config.algorithm.beta = 0.05
    config.algorithm.gamma = 0.99
    config.algorithm.aggregation = "token"
    config.reward.clip = 5.0
    config.data.batch_size = 64
    config.data.max_prompt_length = 256
    config.data.max_length = 512
    config.sampling.max_new_tokens = 256
    config.optimizer.learning_rate = 1e-6
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.1
    return config
