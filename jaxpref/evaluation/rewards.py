"""The rewards that a trained reward model gives a file's responses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import (
    checkpoint,
    config as config_lib,
    data as data_lib,
    reference,
    sharding,
    weights,
)
from jaxpref.algorithms import response_scalars
from jaxpref.data import BatchStream, Example
from jaxpref.data.chat import Chat
from jaxpref.errors import UserError
from jaxpref.models import Decoder, huggingface, packed
from jaxpref.packing import PackedBatch
from jaxpref.terminal import progress


class Scored(NamedTuple):
    """What became of a file.

    Attributes:
      prompts: records scored, each a line of the output.
      counts: records left out and texts cut, by reason.
    """

    prompts: int
    counts: dict[str, int]


def score_file(
    model: str | Path,
    path: str,
    output: str | Path,
    *,
    data_format: str = "auto",
    batch_size: int = 64,
    max_length: int = 0,
    chat_template: str = "",
) -> Scored:
    """Writes the rewards of all responses of a file, with progress in the terminal.

    The responses of a record are in its order, of a pair the chosen one first. Records with an
    empty response, or whose dialogues have no common prompt, are left out and counted.

    Args:
      model: the workdir of a run of algorithm `reward`, or a Hugging Face directory or hub
        name with a sequence classifier that has one label.
      path: what is scored; see `data.path`.
      output: receives one JSON object a record: `where`, `prompt`, `responses`, `rewards`.
      data_format: see `data.format`.
      batch_size: prompts scored at a time.
      max_length: tokens of a prompt with a response; a prompt that has to be cut keeps half of
        them. 0: the run's own `data.max_length` and `data.max_prompt_length`, or 1,024.
      chat_template: see `tokenizer.chat_template`; empty for the run's own.

    Raises:
      UserError: there is no reward model, or the input cannot be read.
    """
    output = Path(output)
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"{output}: should be a file to write, in a directory that exists.")
    config = _config(model, max_length)
    config.tokenizer.chat_template = chat_template or config.tokenizer.chat_template
    workdir = Path(model)
    source, tokenizer, decoder = weights.open_run(config, workdir)
    trained = checkpoint.read_run(workdir) is not None
    if not trained and not source.has_scalar_head(decoder):
        raise UserError(
            f"{model}: has no scalar head ('score.weight'), so it is not a reward model."
        )
    with progress("tokenising", "prompts") as tell:
        examples, dataset, counts = data_lib.load_file(
            config, tokenizer, path, data_format, progress=tell
        )
    mesh = sharding.make_mesh(**config.mesh)
    abstract = huggingface.abstract_params(decoder, mesh)
    if trained:
        params, _ = checkpoint.restore_params(workdir, abstract)
    else:
        params = weights.read(source, decoder, abstract)
    stream = BatchStream(
        dataset, batch_size=batch_size, budget=data_lib.budget_of(config, dataset, mesh)
    )
    rewards_of = _rewards_of(decoder)
    with sharding.use(mesh), progress(f"scoring {len(dataset):,} prompts", "done") as tell:
        rewards = reference.precompute(
            lambda batch: rewards_of(params, sharding.put_batch(mesh, batch)),
            stream.once(),
            len(dataset),
            tell,
        )
    if not jax.process_index():
        lines = (_line(example, row) for example, row in zip(examples, rewards, strict=True))
        with output.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return Scored(len(examples), counts)


def _config(model: str | Path, max_length: int) -> ConfigDict:
    described = checkpoint.read_run(Path(model))
    if described is None:
        config = config_lib.default("reward")
        config.model.init_from = str(model)
        max_length = max_length or 1024
    else:
        config = config_lib.from_flat(described)
        if config.algorithm.name != "reward":
            raise UserError(f"{model}: is a run of {config.algorithm.name}, not of a reward model.")
        if checkpoint.latest_step(Path(model)) is None:
            raise UserError(f"{model}: that run has no complete checkpoint yet.")
    if max_length == 1:
        raise UserError("max_length is 1; a prompt and a response need 2 tokens at least.")
    if max_length:
        config.data.max_length = max_length
        config.data.max_prompt_length = max_length // 2
        config.data.row_length = 0
    # What a row has to hold follows from the file that is scored.
    config.data.scored_length = 0
    # Every record gets its rewards.
    config.data.on_long_prompt = "truncate"
    return config


def _rewards_of(
    decoder: Decoder,
) -> Callable[[Any, PackedBatch], Float[Array, "groups responses"]]:
    model = packed(decoder)

    @jax.jit
    def rewards(params: Any, batch: PackedBatch) -> Float[Array, "groups responses"]:
        whole = jax.tree.map(lambda x: x[0], batch)
        return response_scalars(model(params, whole), whole)

    return rewards


def _line(example: Example, rewards: Float[np.ndarray, " _"]) -> dict[str, Any]:
    prompt, responses = example.prompt, example.responses
    return {
        "where": example.where,
        "prompt": list(prompt.messages) if isinstance(prompt, Chat) else prompt,
        "responses": list(responses),
        "rewards": [round(float(reward), 6) for reward in rewards[: len(responses)]],
    }
