"""Best of N: what the best of N samples is worth, for every N, from one set of samples."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def expected_best(
    rewards: Float[np.ndarray, "prompts samples"],
    n: int,
    proxy: Float[np.ndarray, "_ _"] | None = None,
) -> Float[np.ndarray, " prompts"]:
    """The expected reward of the best of n samples of each prompt.

    It is the mean over all choices of n of the samples that there are, hence without bias for any
    n up to their number.

    Formula, for N samples in the order of the proxy: $\\sum_k \\binom{k-1}{n-1} / \\binom{N}{n} \\;
    r_{(k)}$; samples that the proxy likes alike share their weights.

    Source: Nakano et al. 2021, WebGPT (arXiv 2112.09332).

    Args:
      rewards: what is reported.
      n: how many samples the best is chosen of.
      proxy: what it is chosen by; None for the rewards themselves.

    Raises:
      ValueError: n is no number from 1 to the number of samples, or the shapes differ.

    >>> expected_best(np.array([[0.0, 1.0, 2.0]]), 2)
    array([1.66666667])
    """
    rewards = np.asarray(rewards, float)
    chosen_by = rewards if proxy is None else np.asarray(proxy, float)
    if rewards.ndim != 2 or rewards.shape != chosen_by.shape:
        raise ValueError(
            "expected rewards and proxy of the same shape [prompts, samples]; got "
            f"{rewards.shape} and {chosen_by.shape}."
        )
    samples = rewards.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"n should be from 1 to the {samples} samples of a prompt; got {n}.")
    choices = math.comb(samples, n)
    # The chance that the best is among the k lowest; as fractions, since the numbers are large.
    below = np.array([math.comb(k, n) / choices for k in range(samples + 1)])
    ordered = np.sort(chosen_by, axis=1)
    best = np.empty(len(rewards))
    for prompt, (values, of_prompt, order) in enumerate(
        zip(rewards, chosen_by, ordered, strict=True)
    ):
        lower, upper = (np.searchsorted(order, of_prompt, side) for side in ("left", "right"))
        best[prompt] = (values * (below[upper] - below[lower]) / (upper - lower)).sum()
    return best


def kl_bound(n: int) -> float:
    """What the KL of best-of-n to the policy it samples from is at most, in nats.

    Formula: $\\log n - (n - 1) / n$. It is often reported as the KL, which it only bounds: the KL
    is far lower where few responses are probable.

    Source: Beirami et al. 2024 (arXiv 2401.01879).

    Args:
      n: how many samples the best is chosen of.

    Raises:
      ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n should be at least 1; got {n}.")
    return math.log(n) - (n - 1) / n


def exact_best_of_n(
    logps: Float[Array | np.ndarray, " responses"],
    proxy: Float[Array | np.ndarray, " responses"],
    n: int,
) -> Float[Array, " responses"]:
    """Log-probs of all responses under best-of-n, where they can be listed.

    Of samples that the proxy likes alike any is as probable as under the policy.

    Args:
      logps: of all responses under the policy that is sampled, in nats.
      proxy: what the best is chosen by.
      n: how many samples it is chosen of.

    Raises:
      ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n should be at least 1; got {n}.")
    logps, proxy = jnp.asarray(logps), jnp.asarray(proxy)
    chances = jnp.exp(logps)
    below = (chances[None] * (proxy[None] < proxy[:, None])).sum(1)
    alike = (chances[None] * (proxy[None] == proxy[:, None])).sum(1)
    # (below + alike)^n - below^n, without losing what is small beside 1.
    upto = jnp.minimum(below + alike, 1)
    log_upto = n * jnp.log(upto)
    log_below = n * jnp.log(jnp.where(below > 0, below, 1))
    gained = jnp.where(below > 0, jnp.log1p(-jnp.exp(log_below - log_upto)), 0)
    return logps - jnp.log(alike) + log_upto + gained
