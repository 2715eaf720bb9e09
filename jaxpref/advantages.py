"""Advantages and what they are made of: returns, baselines, whitening, KL estimates. Pure maths.

A token's *value* is read before the token: `values[t]` is what the critic expects when it has seen
the prompt and the response's tokens before `t`. A response ends with its last token, whether it
stopped there or was cut: nothing is expected after it. Every function takes a mask of what is
there; what is not there may hold anything, NaN too, and gets 0.

An advantage is unbiased if what is subtracted from the rewards depends neither on the token itself
nor on what follows it: the gradient of `losses.reinforce`, summed over tokens, then has that of the
objective as its mean. So it is with `leave_one_out`, `against_greedy`, and `gae` with `lam=1` or an
exact critic; with `group` and `scale="none"` but for a factor. Biased are `group` with another
scale, `whiten`, `reinforce_pp`, and `gae` with a smaller `lam` and a critic that errs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses.inputs import check_range, checked, in_float32


class Advantages(NamedTuple):
    """What `gae` gives, for each token.

    Attributes:
      advantages: how much better the token is than what the critic expected.
      returns: what the critic should have expected: advantages plus values.
    """

    advantages: Float[Array, "*batch tokens"]
    returns: Float[Array, "*batch tokens"]


def token_rewards(
    scores: Float[Array, "*batch tokens"],
    policy_logps: Float[Array, "*batch tokens"],
    reference_logps: Float[Array, "*batch tokens"],
    ends: Bool[Array, "*batch tokens"],
    *,
    beta: float | Float[Array, ""],
    where: Bool[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch tokens"]:
    """The reward of each token: the response's score at its last one, and everywhere the KL as k1.

    Formula: $r_t = 1[t = T] \\, s - \\beta \\log \\frac{\\pi(y_t | x, y_{<t})}
    {\\pi_{ref}(y_t | x, y_{<t})}$.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2; Ouyang et al. 2022 (arXiv
    2203.02155), equation 2. The policy gradient of these rewards is that of the objective with its
    KL; see `kl_estimates` for other estimates.

    Args:
      scores: of the responses, read at their last tokens alone; elsewhere they may be anything.
      policy_logps: of each token under the policy that sampled it, in nats; no gradient.
      reference_logps: of the same under the reference; no gradient.
      ends: see `gae`.
      beta: the coefficient of the KL, at least 0.
      where: which tokens are there; None for all.

    Returns:
      The rewards in float32 (float64 stays float64), 0 where no token is.

    Raises:
      ValueError: the shapes differ, or beta is below 0.

    >>> last = jnp.array([False, True])
    >>> found = token_rewards(
    ...     jnp.ones(2), jnp.array([-1.0, -2.0]), jnp.array([-2.0, -2.5]), last, beta=0.1
    ... )
    >>> [round(float(x), 4) for x in found]
    [-0.1, 0.95]
    """
    check_range("token_rewards", least=0, beta=beta)
    scores, policy, reference = checked(
        "token_rewards", scores=scores, policy_logps=policy_logps, reference_logps=reference_logps
    )
    rewards = jnp.where(ends, scores, 0) - beta * (policy - reference)
    here = jnp.ones(ends.shape, bool) if where is None else where
    return jax.lax.stop_gradient(jnp.where(here, rewards, 0))


def gae(
    rewards: Float[Array, "*batch tokens"],
    values: Float[Array, "*batch tokens"],
    ends: Bool[Array, "*batch tokens"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    where: Bool[Array, "*batch tokens"] | None = None,
) -> Advantages:
    """Generalised advantage estimation.

    Formula, with $\\delta_t = r_t + \\gamma V_{t+1} - V_t$ and $V = 0$ after the last token:
    $A_t = \\delta_t + \\gamma \\lambda A_{t+1}$, $R_t = A_t + V_t$.

    Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16. With `lam=1` it is the discounted
    return less the value, unbiased for any critic. With a smaller `lam` it is unbiased only if the
    critic is exact: with errors $e_t$ of the values, without a discount, a token's advantage is off
    by $(1 - \\lambda) \\sum_{l \\ge 0} \\lambda^l e_{t+l+1}$, and by a baseline.

    Args:
      rewards: of each token.
      values: the critic's, read before each token; no gradient flows into them.
      ends: which tokens are the last of a response. Several responses may follow each other
        along `tokens`, as in the table of a packed batch; nothing passes over an end.
      gamma: discount of a token, from 0 to 1.
      lam: lambda, from 0 to 1.
      where: which tokens are there; None for all. What is not there comes after an end.

    Returns:
      `Advantages(advantages, returns)` in float32 (float64 stays float64), 0 where no token is.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.

    >>> found = gae(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.25]), jnp.array([False, True]))
    >>> [round(float(x), 4) for x in found.advantages]
    [0.4625, 0.75]
    """
    check_range("gae", least=0, most=1, gamma=gamma, lam=lam)
    rewards, values = checked("gae", rewards=rewards, values=values)
    here = jnp.ones(rewards.shape, bool) if where is None else where
    rewards, values = (jnp.where(here, x, 0) for x in (rewards, jax.lax.stop_gradient(values)))
    goes_on = here & ~ends
    after = jnp.where(goes_on, jnp.roll(values, -1, axis=-1), 0)
    surprise = jnp.where(here, rewards + gamma * after - values, 0)
    advantages = _discounted(surprise, jnp.where(goes_on, gamma * lam, 0.0).astype(surprise.dtype))
    return Advantages(advantages, jnp.where(here, advantages + values, 0))


def discounted_returns(
    rewards: Float[Array, "*batch tokens"],
    ends: Bool[Array, "*batch tokens"],
    *,
    gamma: float = 1.0,
    where: Bool[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch tokens"]:
    """The rewards from each token on: $G_t = r_t + \\gamma G_{t+1}$ up to the response's end.

    Args:
      rewards: of each token.
      ends: see `gae`.
      gamma: discount of a token, from 0 to 1.
      where: which tokens are there; None for all.

    Raises:
      ValueError: the discount is out of range.
    """
    check_range("discounted_returns", least=0, most=1, gamma=gamma)
    here = jnp.ones(rewards.shape, bool) if where is None else where
    rewards = jnp.where(here, in_float32(rewards), 0)
    return _discounted(rewards, jnp.where(here & ~ends, gamma, 0.0).astype(rewards.dtype))


def _discounted(values: Array, factors: Array) -> Array:
    """`x[t] = values[t] + factors[t] * x[t + 1]`, in as many steps as the length's logarithm."""

    def join(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        (late_factor, late), (factor, value) = later, earlier
        # Not a product with 0, which a NaN behind an end would survive.
        return factor * late_factor, value + jnp.where(factor > 0, factor * late, 0)

    _, sums = jax.lax.associative_scan(join, (factors, values), axis=values.ndim - 1, reverse=True)
    return sums


def leave_one_out(
    rewards: Float[Array, "*batch responses"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch responses"]:
    """Each response's reward less the mean of the others' to the same prompt.

    Formula: $A_i = r_i - \\frac{1}{K - 1} \\sum_{j \\ne i} r_j$.

    Source: RLOO (Ahmadian et al. 2024, arXiv 2402.14740), section 3.1. The baseline does not depend
    on the response itself, so that the policy gradient is unbiased.

    Args:
      rewards: of the K responses to each prompt.
      where: which responses are there; None for all. A response without others gets 0.

    Returns:
      The advantages in float32 (float64 stays float64).
    """
    rewards, here, count = _of_group(rewards, where)
    others = jnp.maximum(count - 1, 1)
    advantages = (count * rewards - rewards.sum(-1, keepdims=True)) / others
    return jnp.where(here & (count > 1), advantages, 0)


def against_greedy(
    rewards: Float[Array, "*batch responses"],
    greedy_rewards: Float[Array, "*batch"],
    *,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch responses"]:
    """Each response's reward less that of the policy's greedy response to the same prompt.

    Formula: $A_i = r_i - r(\\bar y)$ with $\\bar y_t = \\arg\\max_v \\pi(v | x, \\bar y_{<t})$.

    Source: ReMax (Li et al. 2023, arXiv 2310.10505), equation 5. The greedy response is not
    sampled, so that the policy gradient is unbiased; it is never trained on, and a sample that
    equals it gives no gradient.

    Args:
      rewards: of the responses to each prompt.
      greedy_rewards: of the greedy response to each prompt.
      where: which responses are there; None for all.

    Returns:
      The advantages in float32 (float64 stays float64), 0 where no response is.

    >>> against_greedy(jnp.array([[1.0, 3.0]]), jnp.array([2.0])).tolist()
    [[-1.0, 1.0]]
    """
    rewards, here, _ = _of_group(rewards, where)
    return jnp.where(here, rewards - in_float32(greedy_rewards)[..., None], 0)


def group(
    rewards: Float[Array, "*batch responses"],
    *,
    scale: str = "group",
    epsilon: float = 1e-4,
    where: Bool[Array, "*batch responses"] | None = None,
) -> Float[Array, "*batch responses"]:
    """Each response's reward less its group's mean, over a standard deviation.

    Formula: $A_i = (r_i - \\bar r) / (s + \\epsilon)$, with the unbiased standard deviation s.

    Source: GRPO (Shao et al. 2024, arXiv 2402.03300), section 4.1.2; without the division, Dr. GRPO
    (Liu et al. 2025, arXiv 2503.20783). The mean holds the response itself, which makes the policy
    gradient (K - 1) / K of the exact one. The division biases it, towards prompts whose rewards
    differ little; of two responses it leaves little more than which one is better.

    Args:
      rewards: of the K responses to each prompt.
      scale: the deviation that is divided by: that of the "group", of the whole "batch", or "none".
      epsilon: added to the deviation.
      where: which responses are there; None for all.

    Returns:
      The advantages in float32 (float64 stays float64); 0 for a response by itself.

    Raises:
      ValueError: there is no such scale.
    """
    scales = ("group", "batch", "none")
    if scale not in scales:
        raise ValueError(f"group expected scale to be one of {', '.join(scales)}; got {scale!r}.")
    rewards, here, count = _of_group(rewards, where)
    mean = rewards.sum(-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(here, rewards - mean, 0)
    if scale == "none":
        return centred
    if scale == "group":
        squares, number = jnp.square(centred).sum(-1, keepdims=True), count
    else:
        number = here.sum()
        of_all = jnp.where(here, rewards - rewards.sum() / jnp.maximum(number, 1), 0)
        squares = jnp.square(of_all).sum()
    deviation = jnp.sqrt(squares / jnp.maximum(number - 1, 1))
    return centred / (deviation + epsilon)


def _of_group(rewards: Array, where: Array | None) -> tuple[Array, Array, Array]:
    """The rewards with 0 for what is not there, what is there, and how many of each group are."""
    here = jnp.ones(rewards.shape, bool) if where is None else where
    rewards = jnp.where(here, in_float32(rewards), 0)
    return rewards, here, here.sum(-1, keepdims=True)


def whiten(
    values: Float[Array, "*batch"],
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Values with mean 0 and variance 1 over all that is there, of the whole batch.

    Formula: $(x - \\bar x) / \\sqrt{s^2 + \\epsilon}$, with the unbiased variance $s^2$. It biases
    the policy gradient, since mean and scale depend on the samples themselves; the larger the
    batch, the less.

    Args:
      values: of the whole batch, on all devices: a part of it has another mean.
      shift_mean: False leaves the mean as it is.
      epsilon: added to the variance.
      where: which values are there; None for all.

    Returns:
      The values in float32 (float64 stays float64), 0 where none is.
    """
    here = jnp.ones(values.shape, bool) if where is None else where
    values = jnp.where(here, in_float32(values), 0)
    count = here.sum()
    mean = values.sum() / jnp.maximum(count, 1)
    variance = jnp.square(jnp.where(here, values - mean, 0)).sum() / jnp.maximum(count - 1, 1)
    whitened = (values - mean) * jax.lax.rsqrt(variance + epsilon) + (0 if shift_mean else mean)
    return jnp.where(here, whitened, 0)


def reinforce_pp(
    rewards: Float[Array, "*batch tokens"],
    ends: Bool[Array, "*batch tokens"],
    *,
    gamma: float = 1.0,
    epsilon: float = 1e-8,
    where: Bool[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch tokens"]:
    """REINFORCE++'s advantages: the rewards from each token on, whitened over the whole batch.

    Formula: $A_t = (G_t - \\bar G) / \\sqrt{s^2 + \\epsilon}$ with $G_t = r_t + \\gamma G_{t+1}$,
    mean and variance over all tokens of all responses to all prompts.

    Source: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), with `token_rewards`, whose KL is that
    of the tokens from $t$ on. Its variant with a baseline subtracts the group's mean from the
    scores first, as `group` with `scale="none"` does. Biased as `whiten` is.

    Args:
      rewards: of each token, see `token_rewards`, on all devices.
      ends: see `gae`.
      gamma: discount of a token, from 0 to 1.
      epsilon: added to the variance.
      where: which tokens are there; None for all.

    Returns:
      The advantages in float32 (float64 stays float64), 0 where no token is.

    Raises:
      ValueError: the discount is out of range.

    >>> last = jnp.array([[True, False], [False, True]])
    >>> here = jnp.array([[True, False], [True, True]])
    >>> found = reinforce_pp(jnp.array([[1.0, 9.0], [0.0, 4.0]]), last, where=here)
    >>> [[round(float(x), 4) for x in row] for row in found]
    [[-1.1547, 0.0], [0.5774, 0.5774]]
    """
    returns = discounted_returns(rewards, ends, gamma=gamma, where=where)
    return whiten(returns, epsilon=epsilon, where=where)


class KlEstimates(NamedTuple):
    """Estimates of a KL divergence from one sample each; their means over samples estimate it.

    Attributes:
      k1: the log-ratio: unbiased, and negative for many samples.
      k2: half its square: biased, never negative. A response's has the KL's gradient.
      k3: ratio less 1 less its logarithm: unbiased, never negative.
    """

    k1: Float[Array, "*batch"]
    k2: Float[Array, "*batch"]
    k3: Float[Array, "*batch"]


def kl_estimates(
    policy_logps: Float[Array, "*batch"], other_logps: Float[Array, "*batch"]
) -> KlEstimates:
    """Estimates of KL(policy, other) from what the policy has sampled.

    Formula, with $x = \\log \\frac{\\pi(y)}{\\pi_o(y)}$: $k_1 = x$, $k_2 = x^2 / 2$,
    $k_3 = e^{-x} - 1 + x$.

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    An unbiased estimate need not have the KL's gradient. In a loss the mean gradient is:

    - k1: 0.
    - k2: that of KL(policy, other), if the samples are responses. Of tokens it is that of the
      tokens' KL with the prefixes as sampled: biased, since no token answers for what follows it.
    - k3: the same with KL(other, policy): biased.

    In the reward it is that of the estimate's mean, less the one in a loss: exact for k1, of tokens
    and of responses alike, and biased for k2 and k3.

    Args:
      policy_logps: of each sample, a token or a response, under the policy that sampled it.
      other_logps: of the same under the reference, or under an older policy.

    Returns:
      `KlEstimates(k1, k2, k3)` in float32 (float64 stays float64), in nats.

    Raises:
      ValueError: the shapes differ.
    """
    policy, other = checked("kl_estimates", policy_logps=policy_logps, other_logps=other_logps)
    ratio = policy - other
    return KlEstimates(ratio, jnp.square(ratio) / 2, jnp.expm1(-ratio) + ratio)
