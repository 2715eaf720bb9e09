"""Whether a reward model is right as often as it says."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Reliability(NamedTuple):
    """Pairs by the probability that the Bradley-Terry model gives its own choice.

    Attributes:
      confidence: mean probability of the pairs in each bin, from 0.5 to 1.
      accuracy: share of them whose chosen response has the higher reward.
      pairs: how many they are.
    """

    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]
    pairs: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error: the bins' mean gap, weighted by their pairs.

        Source: Guo et al. 2017 (arXiv 1706.04599), equation 3.
        """
        gaps = np.abs(self.accuracy - self.confidence)
        return float((gaps * self.pairs).sum() / max(self.pairs.sum(), 1))


def reliability(margins: Float[np.ndarray, " pairs"], bins: int = 10) -> Reliability:
    """Bins held-out pairs by confidence, $\\sigma(|r_w - r_l|)$.

    Args:
      margins: reward of each chosen response less that of the rejected one; a tie counts
        as half right.
      bins: of equal width from 0.5 to 1; those without pairs are left out.

    >>> sure = np.full(100, 10.0)
    >>> round(reliability(sure).error, 3), round(reliability(-sure).error, 3)
    (0.0, 1.0)
    """
    probability = 1 / (1 + np.exp(-np.abs(np.asarray(margins, np.float64))))
    right = (1 + np.sign(margins)) / 2
    index = np.minimum(((probability - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins).astype(np.float64)
    used = count > 0
    confidence, accuracy = (
        np.bincount(index, values, minlength=bins)[used] / count[used]
        for values in (probability, right)
    )
    return Reliability(confidence, accuracy, count[used])
