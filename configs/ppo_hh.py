"""PPO on Anthropic's HH dialogues, from an SFT policy and a reward model.

Paper: Huang et al. 2024, The N+ Implementation Details of RLHF with PPO (arXiv 2403.17031), whose
settings for Pythia from 1B to 6.9B are the default here: learning rate 3e-6, falling to 0;
batches of 512; 4 epochs of one minibatch; beta 0.05; lambda 0.95; clips of 0.2; temperature 0.7;
Adam's epsilon 1e-5; the critic begins as the reward model. Theirs are summaries of 53 tokens,
which get a reward of -1 if they are cut; here dialogues have up to 256, and 1 is subtracted.
`:tiny` goes on from workdirs A and R on a laptop, which `configs/rlhf_hh.py` tells how to make:

    python -m jaxpref.main --config=configs/ppo_hh.py:tiny --workdir=W \
        --config.data.path=hh-harmless.jsonl.gz

On two CPU cores that other work shared (2026-11-22) 15 of its 20 steps took 5 minutes. The mean
reward of what is sampled rose from 0.03 to 0.83, at a KL of 3.5 nats (`rlhf_hh.py` says what that
is worth).

The paper's setting has not been run here: it needs accelerators.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    """The recipe at a size, "paper" or "tiny"."""
    shared = runpy.run_path(str(Path(__file__).parent / "rlhf_hh.py"))["get_config"]
    config = shared(f"ppo,{size}")
    if size == "tiny":
        return config
    config.algorithm.beta = 0.05
    config.algorithm.epochs = 4
    config.algorithm.minibatches = 1
    config.algorithm.clip = 0.2
    config.algorithm.value_clip = 0.2
    config.algorithm.gamma = 1.0
    config.algorithm.lam = 0.95
    config.algorithm.whiten = True
    config.critic.init_from = "R"
    config.critic.learning_rate = 3e-6
    config.data.batch_size = 512
    config.sampling.temperature = 0.7
    config.reward.truncation_penalty = 1.0
    config.optimizer.learning_rate = 3e-6
    config.optimizer.schedule = "linear"
    config.optimizer.epsilon = 1e-5
    return config
