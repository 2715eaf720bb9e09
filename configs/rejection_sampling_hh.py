"""Rejection sampling on Anthropic's HH dialogues: SFT on the best of ten responses.

Paper: Touvron et al. 2023, Llama 2 (arXiv 2307.09288), section 3.2.3: of 10 to 100 responses to a
prompt the reward model's best is learned from as in SFT, and the best ones of all rounds stay;
section 3.1: learning rate 2e-5 with a cosine, weight decay 0.1, batches of 64. The default is its
setting with 10 responses and four passes over the prompts as rounds. Llama 2 samples anew for
each round, this recipe for each step; and at temperature 1, since `sampling.temperature` is that
of what is learned, too, where Llama 2 has up to 1.3. `:tiny` goes on from workdirs A and R on a
laptop, which `configs/rlhf_hh.py` tells how to make:

    python -m jaxpref.main --config=configs/rejection_sampling_hh.py:tiny --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

In 10 of its 20 steps (2026-11-22) the mean reward of what is sampled rose from -0.04 to 0.74
(`rlhf_hh.py` says what that is worth).

The paper's setting has not been run here: it needs accelerators.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    shared = runpy.run_path(str(Path(__file__).parent / "rlhf_hh.py"))["get_config"]
    config = shared(f"rejection_sampling,{size}")
    if size == "tiny":
        return config
    config.algorithm.pool = True
    config.sampling.samples = 10
    config.data.batch_size = 64
    config.train.epochs = 4.0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.1
    return config
