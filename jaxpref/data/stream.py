"""The batch at step s, as a pure function of (seed, s)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Float

from jaxpref import packing
from jaxpref.data.dataset import TokenizedDataset
from jaxpref.packing import Budget, PackedBatch, Planner

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
        micro_batches: int = 1,
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
          micro_batches: how many parts a batch has, stacked along a leading axis.
          extras: further values of each example, for `PackedBatch.extras`; they join those
            that the data set has.
          weights: the share of each of the data set's sources, by name. Without weights every
            example comes once in an epoch.
          planner: how groups are placed in rows.
        """
        self._dataset = dataset
        self._batch_size = batch_size
        self.budget = budget
        self._micro_batches = micro_batches
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
        size = self._batch_size // self._micro_batches
        parts = [indices[i * size : (i + 1) * size] for i in range(self._micro_batches)]
        groups = [[self._dataset.group(i) for i in part] for part in parts]
        plans = [packing.plan(part, self.budget, self._planner) for part in groups]
        rows = max(map(len, plans))
        micro = [
            packing.materialise(
                packing.widen(plan, rows, self.budget.shards),
                part,
                self.budget,
                responses=self._dataset.responses,
                batch_size=size,
            )
            for plan, part in zip(plans, groups, strict=True)
        ]
        micro = [
            dataclasses.replace(
                batch, extras={k: _rows(x, part, size) for k, x in self._extras.items()}
            )
            for batch, part in zip(micro, parts, strict=True)
        ]
        return jax.tree.map(lambda *xs: np.stack(xs), *micro)


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
