"""One pass over held-out examples: per-example values, then one division."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpref import sharding
from jaxpref.algorithms import Objective
from jaxpref.evaluation.calibration import Reliability, reliability
from jaxpref.evaluation.truth import reward_recovery
from jaxpref.measurements import Metric, with_margin
from jaxpref.packing import PackedBatch

# The learned margin of a pair, whatever the method calls it.
_MARGINS = ("rewards/margins", "margin")


class HeldOut(NamedTuple):
    """What a model is worth on held-out examples.

    Attributes:
      values: by name, each with the prefix `eval/`.
      reliability: of a reward model's choices; None for other models.
    """

    values: dict[str, float]
    reliability: Reliability | None


def evaluate(
    eval_step: Callable[[PackedBatch], Objective],
    batches: Iterable[PackedBatch],
    true_rewards: Float[np.ndarray, "examples responses"] | None,
    sources: Mapping[str, Int[np.ndarray, " _"]] | None = None,
) -> HeldOut:
    """Weighted means of the loss and of every metric over all examples.

    Args:
      eval_step: per-example loss and metrics of a batch.
      batches: every example once, in order; absent groups only at the end.
      true_rewards: of the examples' responses; None if not known. With them the values of
        `reward_recovery` are added.
      sources: the examples of each source, if there are several; their values have the prefix
        `eval/SOURCE/`.
    """
    objectives = [sharding.fetch(eval_step(batch)) for batch in batches]
    named = [{"loss": objective.loss, **objective.metrics} for objective in objectives]
    metrics = {
        name: Metric(
            np.concatenate([values[name].values for values in named]),
            np.concatenate([values[name].weights for values in named]),
        )
        for name in named[0]
    }
    results = _means(metrics)
    learned = next((metrics[name] for name in _MARGINS if name in metrics), None)
    if true_rewards is not None and learned is not None:
        margins = np.asarray(learned.values[: len(true_rewards)]).reshape(len(true_rewards))
        results |= reward_recovery(margins, true_rewards)
    for source, examples in (sources or {}).items():
        part = {
            name: Metric(metric.values[examples], metric.weights[examples])
            for name, metric in metrics.items()
        }
        results |= {f"{source}/{name}": value for name, value in _means(part).items()}
    found = None
    if "margin" in metrics:
        margins, weights = (np.asarray(x) for x in metrics["margin"])
        found = reliability(margins[weights > 0])
        results["calibration_error"] = found.error
    return HeldOut({f"eval/{name}": value for name, value in results.items()}, found)


def _means(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Weighted means; what has no weight at all is left out."""
    return with_margin(
        {
            # A value without weight may be anything, NaN too.
            name: float(np.average(np.where(weights > 0, values, 0), weights=weights))
            for name, (values, weights) in metrics.items()
            if weights.sum()
        }
    )
