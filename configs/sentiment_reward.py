"""A sentiment classifier of sentences from movie reviews: a reward model of labels 0 and 1.

`configs/sentiment_sft.py` tells the data and the commands before and after this one. The classifier
begins as the language model, but is trained on the other half of the sentences, each read as its
first words and the rest, as it will be when the first words are a prompt. Its reward is the
log-odds that the sentence is positive.

    python -m jaxpref.main --config=configs/sentiment_reward.py --workdir=runs/sentiment/reward

On two CPU cores that other work shared (2026-11-22) it took 2 minutes and was right about 0.67 of
477 held-out sentences. The held-out loss is lowest after the first pass (0.62); at the end it is
0.80, so the log-odds are too sure of themselves.
"""

from ml_collections import ConfigDict

from jaxpref import config as base


def get_config() -> ConfigDict:
    """The recipe."""
    config = base.default("reward")
    config.algorithm.ranking = "binary"
    config.model.init_from = "runs/sentiment/sft"
    config.tokenizer.name = "runs/sentiment/tokenizer"
    config.model.layers = 3
    config.data.path = "runs/sentiment/reward.jsonl"
    config.data.format = "imdb"
    config.data.max_length = 128
    config.data.max_prompt_length = 48
    config.data.row_length = 256
    config.data.eval_fraction = 0.1
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.1
    config.train.epochs = 3.0
    config.train.log_every = 20
    config.train.eval_every = 67
    return config
