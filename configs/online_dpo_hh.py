"""Online DPO on Anthropic's HH dialogues: a reward model ranks two responses of the policy.

Paper: Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback (arXiv
2402.04792), section 4: beta 0.1, batches of 128, learning rate 5e-7 after a warm-up of 150 steps,
temperature 0.9. The default is its setting, with a reward model in place of its annotator, which
is a prompted language model. `:tiny` goes on from workdirs A and R on a laptop, which
`configs/rlhf_hh.py` tells how to make:

    python -m jaxpref.main --config=configs/online_dpo_hh.py:tiny --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

The paper's setting has not been run here: it needs accelerators.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    shared = runpy.run_path(str(Path(__file__).parent / "rlhf_hh.py"))["get_config"]
    config = shared(f"online_dpo,{size}")
    if size == "tiny":
        return config
    config.algorithm.beta = 0.1
    config.sampling.samples = 2
    config.sampling.temperature = 0.9
    config.data.batch_size = 128
    config.optimizer.learning_rate = 5e-7
    config.optimizer.warmup_steps = 150
    return config
