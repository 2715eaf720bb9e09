"""The rewards that a trained reward model, or a policy, gives a file's responses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxpref import data as data_lib
from jaxpref.data import Example, TokenizedDataset
from jaxpref.data.chat import Chat
from jaxpref.errors import UserError
from jaxpref.evaluation import reward_bench
from jaxpref.rewards import Scorer, open_scorer
from jaxpref.terminal import progress
from jaxpref.workdir import AnyPath, as_folder


class Scored(NamedTuple):
    """What became of a file.

    Attributes:
      prompts: records scored, each a line of the output.
      counts: records left out and texts cut, by reason.
      benchmark: what the rewards are worth, if the file was read as one of RewardBench.
    """

    prompts: int
    counts: dict[str, int]
    benchmark: reward_bench.Results | None = None


def score_file(
    model: str | AnyPath,
    path: str,
    output: str | Path,
    *,
    data_format: str = "auto",
    batch_size: int = 16,
    max_length: int = 0,
    chat_template: str = "",
) -> Scored:
    """Writes the rewards of all responses of a file, with progress in the terminal.

    A line of the output is a record with all of its columns and, beside them, `prompt`,
    `responses` and `scores`; so it is read as format `ranked`, and may be scored again. Scores
    that the record had are replaced. `where` is the record's place, unless it says one itself.

    The responses of a record are in its order, of a pair the chosen one first. Records with an
    empty response that was not sampled (see `jaxpref.data.formats.responses`), or whose dialogues
    have no common prompt, are left out and counted.

    Args:
      model: the workdir of a run of algorithm `reward`, or of a method that compares a policy with
        a reference, for its implicit reward (see `jaxpref.rewards.ImplicitReward`); or a Hugging
        Face directory or hub name with a sequence classifier that has one label.
      path: what is scored; see `data.path`.
      output: receives one JSON object a record.
      data_format: see `data.format`; of "reward_bench" the result is summed up too.
      batch_size: rows of tokens scored at a time.
      max_length: tokens of a prompt with a response; a prompt that has to be cut keeps half of
        them. 0: the run's own `data.max_length` and `data.max_prompt_length`, or 1,024.
      chat_template: see `tokenizer.chat_template`; empty for the run's own.

    Raises:
      UserError: nothing there gives rewards, the input cannot be read, or a reward is not finite.
    """
    output = as_folder(output, "--output")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output}: should be a file to write, in a directory that exists.")
    scorer = open_scorer(model, max_length=max_length, chat_template=chat_template)
    with progress("tokenising", "prompts") as tell:
        examples, dataset, counts = data_lib.load_file(
            scorer.config, scorer.tokenizer, path, data_format, progress=tell
        )
    asked = reward_bench.questions(examples) if data_format == "reward_bench" else []
    scores = score_examples(scorer, examples, dataset, batch_size=batch_size)
    lines = [_line(example, values) for example, values in zip(examples, scores, strict=True)]
    if not jax.process_index():
        with output.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    found = reward_bench.results(asked, scores) if asked else None
    return Scored(len(examples), counts, found)


def score_examples(
    model: Scorer, examples: Sequence[Example], dataset: TokenizedDataset, *, batch_size: int
) -> list[Float[np.ndarray, " responses"]]:
    """The rewards of each example's responses, with progress in the terminal.

    Args:
      model: whose weights are loaded here.
      examples: prompts with responses.
      dataset: the same, tokenised.
      batch_size: rows of tokens scored at a time.

    Raises:
      UserError: a reward is not finite.
    """
    params = model.load()
    groups = [dataset.group(index) for index in range(len(dataset))]
    with progress(f"scoring {len(groups):,} prompts", "done") as tell:
        scores = model.score(params, groups, rows=batch_size, progress=tell)
    ends = np.cumsum([len(example.responses) for example in examples])
    parts = np.split(scores, ends[:-1])
    for example, values in zip(examples, parts, strict=True):
        if not np.isfinite(values).all():
            raise UserError(
                f"{example.where}: the reward model gives {', '.join(map(str, values))}, which are "
                "not all finite numbers. Did its training diverge?"
            )
    return parts


def _line(example: Example, scores: Float[np.ndarray, " responses"]) -> dict[str, Any]:
    prompt, record = example.prompt, example.record
    said: dict[str, Any] = {
        "prompt": list(prompt.messages) if isinstance(prompt, Chat) else prompt,
        "responses": list(example.responses),
    }
    if not example.ordered and said.keys() <= record.keys():
        # The record has them in this form already, perhaps as texts that are read as messages.
        said = {name: record[name] for name in said}
    return {
        "where": example.where,
        **record,
        **said,
        "scores": [round(float(score), 6) for score in scores],
    }
