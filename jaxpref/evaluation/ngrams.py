"""A judge of sentences that is no neural network: naive Bayes on words and pairs of words.

It reads texts so differently from a transformer that it is hardly fooled by what a policy has found
to fool one.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float


class NaiveBayes:
    """Log-odds of two classes from which words and pairs of neighbours a text has.

    Formula: $\\log \\frac{p(1)}{p(0)} + \\sum_f \\log \\frac{p(f | 1)}{p(f | 0)}$ over the
    features of a text, with $p(f | c) = (n_{cf} + 1) / (n_c + 2)$ for $n_{cf}$ of the $n_c$ texts
    of a class that have the feature. What no text has had says nothing.

    Source: Manning, Raghavan and Schuetze 2008, Introduction to Information Retrieval, section
    13.3 (the Bernoulli model, of which absent features are left out).
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[bool | int]):
        """Counts.

        Args:
          texts: to learn from.
          labels: 1 or 0.

        Raises:
          ValueError: there are not as many labels, or one class is missing.
        """
        if len(texts) != len(labels) or {bool(x) for x in labels} != {False, True}:
            raise ValueError(
                f"expected a label for each of {len(texts)} texts, of both classes; got "
                f"{len(labels)} labels of the values {sorted(set(map(int, labels)))}."
            )
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        totals = [0, 0]
        for text, label in zip(texts, labels, strict=True):
            counts[bool(label)].update(set(_features(text)))
            totals[bool(label)] += 1
        self._prior = math.log(totals[1] / totals[0])
        self._weights = {
            feature: math.log((counts[1][feature] + 1) / (totals[1] + 2))
            - math.log((counts[0][feature] + 1) / (totals[0] + 2))
            for feature in counts[0].keys() | counts[1].keys()
        }

    def log_odds(self, texts: Iterable[str]) -> Float[np.ndarray, " texts"]:
        """Above 0 for texts that are rather of class 1.

        >>> judge = NaiveBayes(["so good", "so bad"], [1, 0])
        >>> (judge.log_odds(["good", "bad", "new"]) > 0).tolist()
        [True, False, False]
        """
        weights = self._weights
        return np.array(
            [self._prior + sum(weights.get(f, 0.0) for f in set(_features(t))) for t in texts]
        )


def _features(text: str) -> list[str]:
    words = text.lower().split()
    return [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]
