"""What gives responses rewards by reading them, and how the responses are laid out for it."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from jaxpref import models, packing, sharding, weights
from jaxpref.errors import UserError
from jaxpref.packing import Budget, Group, PackedBatch
from jaxpref.workdir import AnyPath, as_path

# Prompts whose rows are planned together.
_WINDOW = 256


class Scorer(abc.ABC):
    """What scores responses, with weights that are still to be loaded.

    Attributes:
      name: what it was opened by.
      workdir: the same as a path, which may be no workdir but a Hugging Face directory or hub name.
      config: its run's, or the defaults; lengths and the tokenizer's settings count.
      opened: its model, before any weights are read.
      tokenizer: a `transformers` tokenizer.
      mesh: over which it is sharded.
    """

    def __init__(
        self,
        path: str | AnyPath,
        config: ConfigDict,
        max_length: int,
        chat_template: str,
        mesh: Mesh | None,
    ):
        """Opens it, before any weights are read.

        Args:
          path: a workdir, or a Hugging Face directory or hub name.
          config: its run's, or the defaults; changed to read what is scored.
          max_length: tokens of a prompt with a response, of which a prompt that has to be cut
            keeps half; 0 for the config's.
          chat_template: see `tokenizer.chat_template`; empty for its own.
          mesh: over which it is sharded; None for the one that its config says.

        Raises:
          UserError: `max_length` is 1, or see `weights.open_run`.
        """
        if max_length == 1:
            raise UserError("max_length is 1; a prompt and a response need 2 tokens at least.")
        if max_length:
            config.data.max_length = max_length
            config.data.max_prompt_length = max_length // 2
            config.data.row_length = 0
        # What a row has to hold follows from what is scored.
        config.data.scored_length = 0
        # Every response gets its reward.
        config.data.on_long_prompt = "truncate"
        config.tokenizer.chat_template = chat_template or config.tokenizer.chat_template
        self.name, self.workdir, self.config = str(path), as_path(path), config
        self.opened = weights.open_run(config, self.workdir)
        self.tokenizer = self.opened.tokenizer
        self.mesh = mesh or sharding.make_mesh(**config.mesh)

    @property
    def row_length(self) -> int:
        """Tokens of a row, and so of the longest prompt with a response."""
        return self.config.data.row_length or self.config.data.max_length

    @abc.abstractmethod
    def load(self, dtype: str = "float32") -> Any:
        """Its parameters in a dtype, but for those that its run keeps in four bits."""

    @abc.abstractmethod
    def rewards(self, params: Any, batch: PackedBatch) -> Float[Array, "groups responses"]:
        """The rewards of a batch with one micro-batch, under parameters from `load`."""

    def score(
        self,
        params: Any,
        groups: Sequence[Group],
        *,
        rows: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Float[np.ndarray, " responses"]:
        """The rewards of all responses, in the order of groups and of responses in them.

        Args:
          params: from `load`.
          groups: prompts with their responses; none longer than a row.
          rows: how many are scored at a time, at most.
          progress: called with the number of groups done so far.
        """
        shards, own = sharding.batch_shards(self.mesh), sharding.own_shards(self.mesh)
        aligned = models.alignment(self.config, self.mesh)
        budget = Budget(self.row_length, self.row_length, shards, aligned, own)
        with sharding.use(self.mesh):
            return score(
                lambda batch: self.rewards(params, sharding.put_batch(self.mesh, batch)),
                groups,
                budget,
                rows=rows,
                progress=progress,
            )


def score(
    rewards: Callable[[PackedBatch], Float[Array, "groups responses"]],
    groups: Sequence[Group],
    budget: Budget,
    *,
    rows: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, " responses"]:
    """The rewards of all responses, in blocks of rows that all have one shape.

    So `rewards` compiles once for a number of responses, whatever their lengths are.

    Args:
      rewards: of a batch with one micro-batch.
      groups: prompts with their responses.
      budget: the shape of a row; all of its tokens may be scored.
      rows: of a block, at most.
      progress: called with the number of groups done so far.

    Returns:
      One value a response, in the order of groups and of responses in them.
    """
    counts = np.asarray([len(group.responses) for group in groups])
    # A table of rewards is of one size too.
    size = min(int(counts.sum()), _WINDOW * int(counts.max()))
    rows = -(-min(rows, int(counts.sum())) // budget.shards) * budget.shards
    parts = []
    for start in range(0, len(groups), _WINDOW):
        window = groups[start : start + _WINDOW]
        blocks = _blocks(window, budget, rows, size)
        # A response is in one block alone, and has 0 in the others.
        found = sum(sharding.fetch([rewards(block) for block in blocks]))
        parts.append(np.asarray(found)[: counts[start : start + _WINDOW].sum(), 0])
        progress(start + len(window))
    return np.concatenate(parts)


def _blocks(groups: Sequence[Group], budget: Budget, rows: int, size: int) -> Iterator[PackedBatch]:
    """Batches of `rows` rows, in whose tables each response is a group of its own."""
    plan = [row for row in packing.plan(groups, budget._replace(shards=1)) if row]
    width = max(len(group.responses) for group in groups)
    # From a place in a table of groups and responses to the number of the response.
    present = np.arange(width) < np.asarray([len(group.responses) for group in groups])[:, None]
    number = np.append(np.where(present.ravel(), np.cumsum(present) - 1, size), size)
    for start in range(0, len(plan), rows):
        block = plan[start : start + rows]
        block += [[] for _ in range(rows - len(block))]
        batch = packing.materialise(block, groups, budget, responses=width)
        lengths = np.zeros((size, 1), np.int32)
        lengths[number[:-1][present.ravel()], 0] = batch.lengths[present]
        response = number[batch.response].astype(np.int32)
        batch = dataclasses.replace(batch, response=response, lengths=lengths)
        yield jax.tree.map(lambda x: x[None], batch)
