"""GRPO on Anthropic's HH dialogues, from an SFT policy and a reward model.

Paper: Shao et al. 2024, DeepSeekMath (arXiv 2402.03300), section 4.2: 64 responses to each of 16
prompts, one update after each sampling, learning rate 1e-6, KL coefficient 0.04 in the loss (k3
of tokens, equation 4), 1,024 tokens in all. The default is its setting, on dialogues in place of
mathematics. `:tiny` goes on from workdirs A and R on a laptop, which `configs/rlhf_hh.py` tells
how to make; it has the KL in the reward:

    python -m jaxpref.main --config=configs/grpo_hh.py:tiny --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

On two CPU cores that other work shared (2026-11-22) `:tiny` took 2.6 minutes. The mean reward of 64
held-out prompts rose from 0.17 to 0.78, at a KL of 3.2 nats (`rlhf_hh.py` says what that is worth).

The paper's setting has not been run here: it needs accelerators.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    shared = runpy.run_path(str(Path(__file__).parent / "rlhf_hh.py"))["get_config"]
    config = shared(f"grpo,{size}")
    if size == "tiny":
        return config
    config.algorithm.beta = 0.04
    config.algorithm.kl_in = "loss"
    config.algorithm.kl_estimator = "k3"
    config.algorithm.scale = "group"
    config.algorithm.aggregation = "response"
    config.sampling.samples = 64
    config.data.batch_size = 1024 // config.sampling.samples
    config.data.max_prompt_length = 512
    config.data.max_length = 1024
    config.sampling.max_new_tokens = 512
    config.optimizer.learning_rate = 1e-6
    return config
