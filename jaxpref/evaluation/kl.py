"""KL divergence of a policy from its reference over whole responses, from samples: pure maths."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Estimate(NamedTuple):
    """A mean over prompts, in nats.

    Attributes:
      mean: over prompts, of the mean over a prompt's samples.
      standard_error: of the mean, with prompts as what was drawn.
    """

    mean: float
    standard_error: float


class SequenceKL(NamedTuple):
    """What samples say of KL(policy, reference) of responses.

    Attributes:
      by_log_ratios: from the log-ratio of each response that was sampled.
      by_token_kl: from the exact KL at each position of these responses; None where it is not
        known.
      prompts: how many there are.
      samples: to all prompts together.
      cut: samples that did not come to their end. Their tokens count, so both estimates are of
        responses that are cut at this length, whose KL is lower than that of whole ones.
    """

    by_log_ratios: Estimate
    by_token_kl: Estimate | None
    prompts: int
    samples: int
    cut: int


def sequence_kl(
    log_ratios: Float[np.ndarray, "samples tokens"],
    here: Bool[np.ndarray, "samples tokens"],
    prompts: Int[np.ndarray, " samples"],
    finished: Bool[np.ndarray, " samples"],
    token_kl: Float[np.ndarray, "samples tokens"] | None = None,
) -> SequenceKL:
    """Estimates the KL of responses in two ways, from samples of the policy itself.

    Formulas, for a response $y$ of the policy $\\pi$:
    $\\sum_t \\log \\pi(y_t | y_{<t}) - \\log \\pi_{ref}(y_t | y_{<t})$, and
    $\\sum_t KL(\\pi(\\cdot | y_{<t}), \\pi_{ref}(\\cdot | y_{<t}))$ over the same positions. Both
    have the KL as their mean. The second is never below 0, and has the lower variance unless a
    response's log-ratios so far make up for what its later positions differ by.

    Source: Amini, Vieira and Cotterell 2025 (arXiv 2504.10637).

    Args:
      log_ratios: of each token, policy less reference, in nats; the policy is the distribution that
        was sampled from, with its temperature.
      here: which tokens are there, the end token among them. What stands elsewhere is not read.
      prompts: the number of each sample's prompt, any integers.
      finished: which samples came to their end.
      token_kl: the exact KL of each token's position, see `logprobs.token_kl`.

    Raises:
      ValueError: there are fewer than 2 prompts, which say nothing of a standard error, or a value
        that is read is not finite.

    >>> ratios = np.array([[1.0, 1.0], [3.0, 0.0]])
    >>> here = np.array([[True, True], [True, False]])
    >>> sequence_kl(ratios, here, np.arange(2), np.ones(2, bool)).by_log_ratios
    Estimate(mean=2.5, standard_error=0.5)
    """
    names, place = np.unique(prompts, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"sequence_kl expected samples to at least 2 prompts; got {len(prompts)} to "
            f"{len(names)}."
        )

    def estimate(name: str, values: np.ndarray) -> Estimate:
        counted = np.where(here, values.astype(np.float64), 0)
        if not np.isfinite(counted).all():
            row, column = np.argwhere(~np.isfinite(counted))[0]
            raise ValueError(
                f"{name} should be finite; sample {row} has {counted[row, column]} at {column}."
            )
        means = np.bincount(place, counted.sum(1)) / np.bincount(place)
        error = means.std(ddof=1) / np.sqrt(len(means))
        return Estimate(float(means.mean()), float(error))

    return SequenceKL(
        estimate("log_ratios", log_ratios),
        None if token_kl is None else estimate("token_kl", token_kl),
        len(names),
        len(prompts),
        int((~finished).sum()),
    )
