"""Positive movie reviews, by any method that samples: `sentiment_rlhf.py:METHOD`.

    python -m jaxpref.main --config=configs/sentiment_rlhf.py:rloo --workdir=runs/sentiment/rloo

`configs/sentiment_sft.py` tells the data and the commands before this one. The prompts are the
first 2 to 8 words of sentences (Rafailov et al. 2023, arXiv 2305.18290, appendix C.1), the reward
is the classifier's log-odds of a positive one. Every method samples 64 responses in a step.

On two CPU cores that other work shared (2026-11-22) `:rloo` took 3 minutes. Of 128 held-out prompts
the mean reward rose from -0.12 to 2.50 and the share that the classifier takes for positive ones
from 0.48 to 0.82, at a KL of 9.6 nats, with 127 different responses of 32 tokens (25 before). They
end in words such as "compelling" or "powerful", and are no better English than before. The other
methods have not been run here.
"""

from ml_collections import ConfigDict

from jaxpref import config as base
from jaxpref.knobs import one_of
from jaxpref.methods import METHODS

ONLINE = tuple(name for name, method in METHODS.items() if method.samples)
RESPONSES = 64


def get_config(method: str = "rloo") -> ConfigDict:
    """The recipe of a method."""
    if method not in ONLINE:
        raise ValueError(one_of("the recipe's argument", method, ONLINE))
    config = base.default(method)
    config.model.init_from = "runs/sentiment/sft"
    config.tokenizer.name = "runs/sentiment/tokenizer"
    config.model.layers = 3
    config.reward.path = "runs/sentiment/reward"
    # The classifier has seen whole sentences alone.
    config.reward.truncation_penalty = 1.0
    config.data.path = "runs/sentiment/policy.jsonl"
    config.data.format = "imdb"
    config.data.max_prompt_length = 48
    config.data.max_length = 112
    config.data.row_length = 256
    config.data.batch_size = RESPONSES // config.sampling.samples
    config.sampling.max_new_tokens = 64
    config.data.rows = 8
    # All held-out prompts that are used are shown, since their rewards' signs are of interest.
    config.sampling.shown = 128
    config.eval.max_examples = 128
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 5
    if method == "ppo":
        config.critic.learning_rate = 3e-4
    config.train.steps = 60
    config.train.log_every = 5
    config.train.eval_every = 30
    return config
