"""Whether a reward model is right as often as it says."""

from pathlib import Path
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


def plot_reliability(found: Reliability, path: Path, title: str) -> None:
    """Draws accuracy against confidence; the diagonal is perfect calibration.

    Args:
      found: from `reliability`.
      path: the PNG to write.
      title: of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    axis.plot([0.5, 1], [0.5, 1], "--", color="0.6", label="perfect")
    share = found.pairs / found.pairs.sum()
    axis.plot(found.confidence, found.accuracy, color="C0")
    axis.scatter(found.confidence, found.accuracy, s=20 + 400 * share, color="C0", alpha=0.6)
    axis.set_xlabel("probability that the model gives its choice")
    axis.set_ylabel("share of choices that are the label")
    axis.set_title(f"{title}\nexpected calibration error {found.error:.3f}", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
