"""A small language model of sentences from movie reviews, which other recipes make positive.

The task is that of Ziegler et al. 2019 (arXiv 1909.08593) and of Rafailov et al. 2023 (arXiv
2305.18290, section 6.1), controlled sentiment: to go on from the first words of a review such that
a classifier takes it for a positive one. The data is Pang and Lee's (2005), sentences with labels,
as one JSON object a line with `text` and `label`. Four commands, on a laptop:

    python configs/sentiment_sft.py movie-review-sentences.jsonl.gz
    python -m jaxpref.main --config=configs/sentiment_sft.py --workdir=runs/sentiment/sft
    python -m jaxpref.main --config=configs/sentiment_reward.py --workdir=runs/sentiment/reward
    python -m jaxpref.main --config=configs/sentiment_rlhf.py:rloo --workdir=runs/sentiment/rloo

The first one writes the sentences in two halves to `runs/sentiment`, one for the classifier and one
for the language model and its prompts, and two tokenizers (byte-level BPE): one of 2,048 tokens for
the language model, and one of 8,192, most of them whole words, for the classifier.

On two CPU cores that other work shared (2026-11-22) the second one took 4 minutes and brought the
held-out loss from 7.65 to 5.00 nats a token: sentences of the right kind, with words that are often
made up.
"""

import gzip
import json
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jaxpref import config as base

FOLDER = Path("runs/sentiment")


def get_config() -> ConfigDict:
    """The recipe."""
    config = base.default("sft")
    config.model.layers = 3
    config.tokenizer.name = str(FOLDER / "tokenizer")
    config.data.path = str(FOLDER / "policy.jsonl")
    # Plain text: here the labels are not read.
    config.data.format = "text"
    config.data.max_length = 128
    config.data.max_prompt_length = 48
    config.data.row_length = 256
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.1
    config.train.epochs = 6.0
    config.train.log_every = 50
    config.train.eval_every = 140
    return config


def prepare(path: str | Path, folder: str | Path = FOLDER) -> None:
    """Writes the two halves of the sentences, and tokenizers that the language model's half makes.

    Args:
      path: a .jsonl.gz file of records with `text` and `label`.
      folder: receives `reward.jsonl`, `policy.jsonl`, `tokenizer/` and `classifier_tokenizer/`.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    halves = {"reward": lines[: len(lines) // 2], "policy": lines[len(lines) // 2 :]}
    for name, half in halves.items():
        (folder / f"{name}.jsonl").write_text("".join(half), encoding="utf-8")
    texts = [json.loads(line)["text"] for line in halves["policy"]]
    for name, size in (("tokenizer", 2048), ("classifier_tokenizer", 8192)):
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            texts, vocab_size=size, special_tokens=["</s>"], show_progress=False
        )
        whole = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")
        whole.save_pretrained(folder / name)


if __name__ == "__main__":
    prepare(sys.argv[1])
