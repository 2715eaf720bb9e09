"""What becomes of a reward before it is learned from: running moments, clipping, penalties."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int


class Moments(NamedTuple):
    """Number, mean and sum of squared deviations of all values so far, in float64 or float32.

    It is no more than three numbers, which belong into a checkpoint of the run.
    """

    count: Float[np.ndarray | Array, ""] | np.floating  # type: ignore[assignment]
    mean: Float[np.ndarray | Array, ""] | np.floating
    m2: Float[np.ndarray | Array, ""] | np.floating

    @property
    def variance(self) -> np.floating:
        """The unbiased variance; 0 for fewer than two values."""
        return np.float64(self.m2) / max(float(self.count) - 1, 1)


def no_moments(dtype: type[np.floating] = np.float64) -> Moments:
    """The moments of no values."""
    return Moments(dtype(0), dtype(0), dtype(0))


def update(moments: Moments, values: Float[np.ndarray, " _"]) -> Moments:
    """The moments with further values.

    Formula, with $\\delta = \\bar x_B - \\bar x_A$: $\\bar x = \\bar x_A + \\delta n_B / n$ and
    $M = M_A + M_B + \\delta^2 n_A n_B / n$.

    Source: Chan, Golub and LeVeque 1983 (The American Statistician 37), equations 2.1: it does not
    cancel, and the result does not depend on how the values were divided.

    Args:
      moments: of the values before; the result has their dtype.
      values: the further ones; may be none.

    >>> update(no_moments(), np.array([1.0, 3.0])).mean
    np.float64(2.0)
    """
    if not len(values):
        return moments
    before, mean, m2 = (np.float64(x) for x in moments)
    further = np.asarray(values, np.float64)
    count = before + len(further)
    difference = further.mean() - mean
    mean = mean + difference * len(further) / count
    m2 = m2 + np.square(further - further.mean()).sum()
    m2 = m2 + np.square(difference) * before * len(further) / count
    dtype = np.dtype(moments.mean.dtype).type
    return Moments(dtype(count), dtype(mean), dtype(m2))


def normalise(
    values: Float[np.ndarray, " responses"], moments: Moments, *, epsilon: float = 1e-8
) -> Float[np.ndarray, " responses"]:
    """Values less the mean, over the standard deviation: $(x - \\bar x) / \\sqrt{s^2 + \\epsilon}$.

    Args:
      values: rewards.
      moments: of all rewards so far, these included.
      epsilon: added to the variance.
    """
    scale = np.sqrt(moments.variance + epsilon)
    return ((values - np.float64(moments.mean)) / scale).astype(values.dtype)


def clip(values: Float[np.ndarray, " responses"], limit: float) -> Float[np.ndarray, " responses"]:
    """Values between `-limit` and `limit`; as they are if it is 0."""
    return np.clip(values, -limit, limit) if limit else values


def penalised(
    values: Float[np.ndarray, " responses"],
    lengths: Int[np.ndarray, " responses"],
    finished: Bool[np.ndarray, " responses"],
    *,
    length_penalty: float = 0.0,
    truncation_penalty: float = 0.0,
) -> Float[np.ndarray, " responses"]:
    """Rewards less what a response costs by its length, and by its being cut.

    Formula: $r - c_1 n - c_2 [\\text{cut}]$ for a response of n tokens.

    Args:
      values: rewards.
      lengths: tokens of each response, with the one that ended it.
      finished: whether each response came to its end. This alone says whether it was cut: a token
        that equals EOS inside a prompt, or a padding token that is EOS, has no part in it.
      length_penalty: $c_1$, what a token costs.
      truncation_penalty: $c_2$, what being cut by length costs.
    """
    costs = length_penalty * lengths + np.where(finished, 0.0, truncation_penalty)
    return (values - costs).astype(values.dtype)
