"""The batch at step s, as a pure function of (seed, s)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from jaxpref import config as config_lib, models, packing, sharding
from jaxpref.data.dataset import TokenizedDataset
from jaxpref.data.load import Data
from jaxpref.errors import UserError
from jaxpref.packing import Budget, PackedBatch, Planner, Shape

_PREFETCH_THREADS = 2
_PREFETCH_BATCHES = 4


class BatchStream:
    """Batches of a data set, by step.

    There is no iterator state: a run that resumes at step s asks for batch s. Every
    epoch is a permutation of its own, and a batch may span two epochs. Where sources are
    mixed by weight, each source has epochs of its own, with lengths of their own.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        batch_size: int,
        budget: Budget,
        seed: int = 0,
        shape: Shape | None = None,
        extras: dict[str, Float[np.ndarray, "examples ..."]] | None = None,
        weights: Mapping[str, float] | None = None,
        planner: Planner = packing.plan_tree,
    ):
        """Prepares the order of the examples.

        Args:
          dataset: the tokenised examples.
          batch_size: groups a step.
          budget: the shape of a row.
          seed: of the order.
          shape: of micro-batches that a batch is cut into, which are compiled for once (see
            `packing.fixed_shape`). None: one, with as many rows as its groups need.
          extras: further values of each example, for `PackedBatch.extras`; they join those
            that the data set has.
          weights: the share of each of the data set's sources, by name. Without weights every
            example comes once in an epoch.
          planner: how groups are placed in rows, where there is one micro-batch.
        """
        self._dataset = dataset
        self._batch_size = batch_size
        self.budget = budget
        self._shape = shape
        self._extras = {**dataset.extras, **(extras or {})}
        self._planner = planner
        self._order = _order(dataset, seed, weights or {})

    def indices(self, step: int) -> list[int]:
        """The indices of the examples of step `step` (from 0), in order."""
        first = step * self._batch_size
        return [int(self._order[i]) for i in range(first, first + self._batch_size)]

    def batch(self, step: int) -> PackedBatch:
        """The batch of step `step`, with a leading axis of micro-batches."""
        return self._pack(self.indices(step))

    def batches(self, start: int, stop: int) -> Iterator[PackedBatch]:
        """The batches of steps `start` to `stop - 1`, prepared ahead in other threads."""
        return self._prefetched(range(start, stop), self.batch)

    def once(self) -> Iterator[PackedBatch]:
        """Every example once, in order; the last batch is filled up with absent groups."""
        starts = range(0, len(self._dataset), self._batch_size)

        def batch(start: int) -> PackedBatch:
            return self._pack(list(range(start, min(start + self._batch_size, len(self._dataset)))))

        return self._prefetched(starts, batch)

    def _prefetched(self, keys: range, batch: Any) -> Iterator[PackedBatch]:
        options = grain.ReadOptions(
            num_threads=_PREFETCH_THREADS, prefetch_buffer_size=_PREFETCH_BATCHES
        )
        return iter(grain.MapDataset.source(keys).map(batch).to_iter_dataset(options))

    def _pack(self, indices: list[int]) -> PackedBatch:
        groups = [self._dataset.group(index) for index in indices]
        size: dict[str, Any] = {
            "responses": self._dataset.responses,
            "batch_size": self._batch_size,
        }
        if self._shape is None:
            plan = packing.plan(groups, self.budget, self._planner)
            one = packing.materialise(plan, groups, self.budget, **size)
            batch = jax.tree.map(lambda x: x[None], one)
        else:
            batch = packing.pack_micro_batches(groups, self.budget, shape=self._shape, **size)
        extras = {
            name: np.broadcast_to(
                rows := _rows(values, indices, self._batch_size), (len(batch.tokens), *rows.shape)
            )
            for name, values in self._extras.items()
        }
        return dataclasses.replace(batch, extras=extras)


def stream_of(
    config: ConfigDict,
    data: Data,
    side: str,
    mesh: Mesh,
    *,
    training: bool,
    columns: Mapping[str, Float[np.ndarray, "examples ..."]] | None = None,
) -> BatchStream:
    """The batches that a config asks for.

    Args:
      config: a checked config.
      data: its data.
      side: "train" or "held_out".
      mesh: over whose devices the rows are dealt out.
      training: whether it is trained on them, with the sources' weights.
      columns: further values of each example, for `PackedBatch.extras`.

    Raises:
      UserError: a group does not fit a micro-batch.
    """
    budget = budget_of(config, data.train, mesh)
    return BatchStream(
        getattr(data, side),
        batch_size=config.data.batch_size,
        budget=budget,
        seed=config.seed,
        shape=_shape_of(config, data, budget),
        extras=dict(columns or {}),
        weights=data.weights if training else None,
    )


def _shape_of(config: ConfigDict, data: Data, budget: Budget) -> Shape | None:
    """The shape of micro-batches, the same for all of the data, so that it is compiled for once.

    None for methods that want a batch in one, or whose responses are yet to be sampled.
    """
    if not _is_cut(config):
        return None
    sides = [data.train] if data.held_out is None else [data.train, data.held_out]
    responses = max(side.responses for side in sides)

    def table(values: np.ndarray) -> np.ndarray:
        return np.pad(values, [(0, 0), (0, responses - values.shape[1])])

    try:
        return packing.fixed_shape(
            np.concatenate([side.prompt_lengths for side in sides]),
            np.concatenate([table(side.response_lengths) for side in sides]),
            budget,
            batch_size=config.data.batch_size,
            rows=config.data.rows,
            scored_lengths=np.concatenate([table(side.scored_lengths) for side in sides]),
        )
    except ValueError as error:
        raise UserError(f"data.rows is {config.data.rows}: {error}") from error


def _is_cut(config: ConfigDict) -> bool:
    """Whether batches are cut into micro-batches."""
    method = config_lib.method_of(config.algorithm.name)
    return not (method.samples or (method.compares_examples and not config.data.rows))


def budget_of(config: ConfigDict, dataset: TokenizedDataset, mesh: Mesh) -> Budget:
    """The shape of a row that a config asks for, with room for what this data scores of it."""
    row_length = config.data.row_length or config.data.max_length
    shards, own = sharding.batch_shards(mesh), sharding.own_shards(mesh)
    scored_length = config.data.scored_length or packing.scored_budget(
        dataset.prompt_lengths,
        dataset.response_lengths,
        row_length,
        dataset.scored_lengths,
        batch_size=config.data.batch_size,
        rows=config.data.rows,
        shards=shards,
        cut=_is_cut(config),
    )
    aligned = models.alignment(config, mesh)
    return Budget(row_length, scored_length, shards, aligned, own)


def _order(dataset: TokenizedDataset, seed: int, weights: Mapping[str, float]) -> grain.MapDataset:
    """An endless list of indices of examples, in which each epoch is shuffled anew.

    With weights, every source has epochs of its own.
    """
    if not weights:
        return grain.MapDataset.range(len(dataset)).shuffle(seed=seed).repeat()
    sources = [
        grain.MapDataset.source(dataset.sources[name])
        .shuffle(seed=(seed + number) % 2**32)
        .repeat()
        for number, name in enumerate(weights)
    ]
    return grain.MapDataset.mix(sources, list(weights.values()))


def _rows(values: np.ndarray, indices: list[int], size: int) -> np.ndarray:
    """The values of the chosen examples, then zeros up to `size` rows."""
    rows = np.zeros((size, *values.shape[1:]), values.dtype)
    rows[: len(indices)] = values[indices]
    return rows
