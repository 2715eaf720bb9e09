"""One pass over held-out examples: per-example values, then one division."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxpref.algorithms import Objective
from jaxpref.evaluation.calibration import Reliability, reliability
from jaxpref.evaluation.truth import reward_recovery
from jaxpref.metrics import Metric
from jaxpref.packing import PackedBatch


class HeldOut(NamedTuple):
    """What a model is worth on held-out examples.

    Attributes:
      values: by name, each with the prefix `eval/`.
      reliability: of a reward model's choices; None for other models.
    """

    values: dict[str, float]
    reliability: Reliability | None


def evaluate(
    score: Callable[[PackedBatch], Objective],
    batches: Iterable[PackedBatch],
    scores: Float[np.ndarray, "examples responses"] | None,
) -> HeldOut:
    """Weighted means of the loss and of every metric over all examples.

    Args:
      score: per-example loss and metrics of a batch.
      batches: every example once, in order; absent groups only at the end.
      scores: true rewards of the examples, if known; adds `reward_recovery`.
    """
    objectives = [jax.device_get(score(batch)) for batch in batches]
    named = [{"loss": objective.loss, **objective.metrics} for objective in objectives]
    metrics = {
        name: Metric(
            np.concatenate([values[name].values for values in named]),
            np.concatenate([values[name].weights for values in named]),
        )
        for name in named[0]
    }
    results = {
        name: float(np.average(metric.values, weights=metric.weights))
        for name, metric in metrics.items()
    }
    if scores is not None and "rewards/chosen" in metrics:
        rewards = np.stack(
            [metrics[f"rewards/{which}"].values[: len(scores)] for which in ("chosen", "rejected")],
            axis=1,
        )
        results |= reward_recovery(rewards, scores)
    found = None
    if "margin" in metrics:
        margins, weights = metrics["margin"]
        found = reliability(margins[weights > 0])
        results["calibration_error"] = found.error
    return HeldOut({f"eval/{name}": value for name, value in results.items()}, found)
