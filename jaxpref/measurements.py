"""Measurements as sums: values with weights, which are divided once, at the end."""

from collections import defaultdict
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Metric(NamedTuple):
    """Values with the weights that they have in a mean."""

    values: Float[Array | np.ndarray, "*groups"]
    weights: Float[Array | np.ndarray, "*groups"]


def total(metric: Metric) -> Metric:
    """The sum of the weighted values, and the sum of the weights."""
    # A value without weight may be anything, NaN too.
    weighted = jnp.where(metric.weights > 0, metric.values * metric.weights, 0)
    return Metric(weighted.sum(), jnp.asarray(metric.weights).sum())


def mean(sums: Metric) -> Float[Array, ""]:
    """The mean that `total` gives the parts of; 0 where there is no weight."""
    return jnp.asarray(sums.values / jnp.maximum(sums.weights, 1e-8))


class Mean:
    """Weighted means over several steps: sums of weighted values over sums of weights."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, weighted_sum: float, weight: float) -> None:
        """Adds the sum of some weighted values, and the sum of their weights."""
        self._sums[name] += weighted_sum
        self._weights[name] += weight

    def result(self) -> dict[str, float]:
        """The means; a quantity whose weights are all 0 is left out."""
        return with_margin(
            {name: self._sums[name] / weight for name, weight in self._weights.items() if weight}
        )


def with_margin(means: dict[str, float]) -> dict[str, float]:
    """The means with the margin between those of the rewards, where examples are not pairs."""
    chosen, rejected = (means.get(f"rewards/{side}") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or "rewards/margins" in means:
        return means
    return {**means, "rewards/margins": chosen - rejected}
