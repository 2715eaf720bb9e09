"""RLOO on Anthropic's HH dialogues, from an SFT policy and a reward model.

Paper: Ahmadian et al. 2024, Back to Basics (arXiv 2402.14740), appendix C: beta 0.10 on HH,
learning rate 1e-6, 512 responses sampled at a time and learned from in two updates of 256; 4
responses a prompt (it has 2, too). The default is its setting, with Pythia-2.8B in place of 6.9B.
`:tiny` goes on from workdirs A and R on a laptop, which `configs/rlhf_hh.py` tells how to make:

    python -m jaxpref.main --config=configs/rloo_hh.py:tiny --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

On two CPU cores that other work shared (2026-11-22) `:tiny` took 3 minutes. The mean reward of 64
held-out prompts rose from 0.05 to 0.79, at a KL of 3.6 nats (`rlhf_hh.py` says what that is worth).

The paper's setting has not been run here: it needs accelerators.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    shared = runpy.run_path(str(Path(__file__).parent / "rlhf_hh.py"))["get_config"]
    config = shared(f"rloo,{size}")
    if size == "tiny":
        return config
    config.algorithm.beta = 0.1
    config.algorithm.minibatches = 2
    config.sampling.samples = 4
    config.data.batch_size = 512 // config.sampling.samples
    config.optimizer.learning_rate = 1e-6
    return config
