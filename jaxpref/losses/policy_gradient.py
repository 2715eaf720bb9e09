"""Policy gradients: losses of what a policy has sampled, and of the critic beside it.

One value for each token (`gspo`: for each response), no reduction: how tokens are weighed against
each other is the caller's choice, and part of the method; `aggregate` says which choices there are.
What `where` leaves out may hold anything, NaN too: its loss is 0 and no gradient reaches it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses.inputs import check_range, checked, in_float32, per_token


class PolicyOutput(NamedTuple):
    """What a policy-gradient loss returns, one value a token (`gspo`: a response).

    Attributes:
      losses: the loss of each.
      ratios: probability under the policy over that under the one that sampled; no gradient.
      clipped: where clipping leaves no gradient.
    """

    losses: Float[Array, "*batch"]
    ratios: Float[Array, "*batch"]
    clipped: Bool[Array, "*batch"]


class ValueOutput(NamedTuple):
    """What a critic's loss returns, one value a token.

    Attributes:
      losses: the loss of each.
      clipped: where clipping leaves no gradient.
    """

    losses: Float[Array, "*batch"]
    clipped: Bool[Array, "*batch"]


class Aggregated(NamedTuple):
    """A loss of each response, and what it counts.

    The loss of a batch is `sum(values * weights) / sum(weights)`, with both sums over all of it.

    Attributes:
      values: of each response.
      weights: of each response; no gradient.
    """

    values: Float[Array, "*batch"]
    weights: Float[Array, "*batch"]


def aggregate(
    sums: Float[Array, "*batch"],
    lengths: Int[Array, "*batch"],
    *,
    how: str,
    longest: int,
) -> Aggregated:
    """How the losses of tokens are added up to that of a batch.

    Formula, with the sum $S_i$ of the losses of a response's $n_i$ tokens, and $N$ responses:

    - `"sum"`: $\\frac1N \\sum_i S_i$. The gradient of the objective, since a response's log-prob is
      the sum of its tokens'.
    - `"response"`: $\\frac1N \\sum_i S_i / n_i$, as in GRPO (Shao et al. 2024, arXiv 2402.03300,
      equation 3). Biased: a token counts the less the longer its response is, so that of good
      responses short ones gain most, and of bad ones long ones lose least.
    - `"token"`: $\\sum_i S_i / \\sum_i n_i$, as in DAPO (Yu et al. 2025, arXiv 2503.14476, equation
      8, there over a group's tokens, here over those of the whole batch). Biased, since the divisor
      depends on the samples: the less, the larger the batch. Its limit is that of `"sum"` over the
      mean length.
    - `"constant"`: $\\frac1N \\sum_i S_i / n_{max}$, as in Dr. GRPO (Liu et al. 2025, arXiv
      2503.20783, section 3). `"sum"` in another unit.

    The losses of `gspo`, which has one a response, go in times the lengths: with `"response"`, as
    in its paper, their mean comes out.

    Args:
      sums: the losses of each response's tokens, added up. Those of absent responses may be
        anything.
      lengths: tokens of each response; 0 for an absent one, which has the value and weight 0.
      how: one of the four.
      longest: $n_{max}$, the most tokens that a response can have, at least 1; `"constant"` alone
        reads it.

    Returns:
      `Aggregated(values, weights)` in float32 (float64 stays float64). Their sums may be taken in
      parts: the loss does not depend on which responses share a micro-batch, or a device.

    Raises:
      ValueError: the shapes differ, there is no such `how`, or `longest` is below 1.

    >>> sums, lengths = jnp.array([2.0, 6.0]), jnp.array([1, 3])
    >>> for how in ("sum", "response", "token", "constant"):
    ...     values, weights = aggregate(sums, lengths, how=how, longest=4)
    ...     print(how, float((values * weights).sum() / weights.sum()))
    sum 4.0
    response 2.0
    token 2.0
    constant 1.0
    """
    ways = ("sum", "response", "token", "constant")
    if how not in ways:
        raise ValueError(f"aggregate expected how to be one of {', '.join(ways)}; got {how!r}.")
    check_range("aggregate", least=1, longest=longest)
    if sums.shape != lengths.shape:
        raise ValueError(
            "aggregate expected one sum and one length a response; got sums "
            f"{tuple(sums.shape)} and lengths {tuple(lengths.shape)}."
        )
    here = lengths > 0
    sums = jnp.where(here, in_float32(sums), 0)
    weights = (lengths if how == "token" else here).astype(sums.dtype)
    if how == "sum":
        return Aggregated(sums, weights)
    if how == "constant":
        return Aggregated(sums / longest, weights)
    return Aggregated(per_token(sums, lengths), weights)


def reinforce(
    policy_logps: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """The score-function estimator, for tokens that the policy itself has just sampled.

    Formula: $L = -A \\log \\pi_\\theta(y_t | x, y_{<t})$.

    Source: Williams 1992, REINFORCE; for language models Ahmadian et al. 2024 (arXiv 2402.14740),
    equation 5. With ReMax's advantage (`advantages.against_greedy`) it is ReMax.

    A baseline that does not depend on the sample changes only the variance. Without one, or while a
    moving average has not followed the rewards yet, the variance grows with the square of their
    mean. ReMax's and RLOO's variance does not, and is the smaller one from a mean of a few
    deviations on. Centred rewards may order them otherwise: then the plain estimator can have the
    least, since the greedy response's reward is not the mean, and the mean of the other responses
    is noisy itself.

    Args:
      policy_logps: of each token, in nats.
      advantages: of each token; no gradient.
      where: which tokens are there; None for all.

    Returns:
      The losses in float32 (float64 stays float64).

    Raises:
      ValueError: the shapes differ.
    """
    logps, advantages, here = _masked("reinforce", where, logps=policy_logps, advantages=advantages)
    return jnp.where(here, -jax.lax.stop_gradient(advantages) * logps, 0)


def ppo(
    policy_logps: Float[Array, "*batch"],
    old_logps: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    where: Bool[Array, "*batch"] | None = None,
) -> PolicyOutput:
    """PPO's clipped surrogate, which GRPO takes too.

    Formula, with $\\rho = \\pi_\\theta / \\pi_{old}$ of a token:
    $L = \\max(-A \\rho, -A \\, \\mathrm{clip}(\\rho, 1 - \\epsilon, 1 + \\epsilon_h))$.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; a higher bound of its own is DAPO's
    clip-higher (Yu et al. 2025, arXiv 2503.14476, equation 8).

    Args:
      policy_logps: of each token, in nats.
      old_logps: under the policy that sampled; no gradient.
      advantages: of each token; no gradient.
      clip: $\\epsilon$.
      clip_high: $\\epsilon_h$; None for $\\epsilon$.
      where: which tokens are there; None for all.

    Returns:
      `PolicyOutput(losses, ratios, clipped)` in float32 (float64 stays float64). Where the policy
      is still the old one all ratios are 1, and the gradient is that of `reinforce`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.

    >>> out = ppo(jnp.log(jnp.array([0.6])), jnp.log(jnp.array([0.4])), jnp.array([1.0]))
    >>> round(float(out.losses[0]), 4), bool(out.clipped[0])
    (-1.2, True)
    """
    check_range("ppo", above=0, clip=clip, clip_high=clip if clip_high is None else clip_high)
    logps, old, advantages, here = _masked(
        "ppo", where, logps=policy_logps, old=old_logps, advantages=advantages
    )
    ratios = jnp.exp(logps - jax.lax.stop_gradient(old))
    return _clipped(ratios, advantages, clip, clip_high, here)


def gspo(
    policy_logps: Float[Array, "*batch"],
    old_logps: Float[Array, "*batch"],
    lengths: Int[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    clip: float = 3e-4,
    clip_high: float | None = 4e-4,
    where: Bool[Array, "*batch"] | None = None,
) -> PolicyOutput:
    """PPO's surrogate with one ratio a response, to the power of one over its length.

    Formula, with $s = (\\pi_\\theta(y|x) / \\pi_{old}(y|x))^{1 / |y|}$:
    $L = \\max(-A s, -A \\, \\mathrm{clip}(s, 1 - \\epsilon, 1 + \\epsilon_h))$.

    Source: GSPO (Zheng et al. 2025, arXiv 2507.18071), equations 5 and 7; the bounds are those of
    its section 5.1.

    Args:
      policy_logps: summed over each response, in nats.
      old_logps: the same under the policy that sampled; no gradient.
      lengths: tokens of each response; 0 counts as 1.
      advantages: of each response; no gradient.
      clip: $\\epsilon$.
      clip_high: $\\epsilon_h$; None for $\\epsilon$.
      where: which responses are there; None for all.

    Returns:
      `PolicyOutput(losses, ratios, clipped)`, one value a response.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("gspo", above=0, clip=clip, clip_high=clip if clip_high is None else clip_high)
    logps, old, advantages, here = _masked(
        "gspo", where, logps=policy_logps, old=old_logps, advantages=advantages
    )
    ratios = jnp.exp(per_token(logps - jax.lax.stop_gradient(old), lengths))
    return _clipped(ratios, advantages, clip, clip_high, here)


def cispo(
    policy_logps: Float[Array, "*batch"],
    old_logps: Float[Array, "*batch"],
    advantages: Float[Array, "*batch"],
    *,
    largest: float = 5.0,
    where: Bool[Array, "*batch"] | None = None,
) -> PolicyOutput:
    """REINFORCE with importance weights that have an upper bound: no token loses its gradient.

    Formula, with $\\rho = \\pi_\\theta / \\pi_{old}$ and no gradient through the weight:
    $L = -A \\min(\\rho, c) \\log \\pi_\\theta$.

    Source: CISPO (MiniMax 2025, arXiv 2506.13585), equations 4 and 5, which has no lower bound in
    practice, as in TRL.

    Args:
      policy_logps: of each token, in nats.
      old_logps: under the policy that sampled; no gradient.
      advantages: of each token; no gradient.
      largest: $c$, the largest weight.
      where: which tokens are there; None for all.

    Returns:
      `PolicyOutput(losses, ratios, clipped)`; `clipped` says where the weight is at its bound.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("cispo", above=0, largest=largest)
    logps, old, advantages, here = _masked(
        "cispo", where, logps=policy_logps, old=old_logps, advantages=advantages
    )
    ratios = jax.lax.stop_gradient(jnp.exp(logps - old))
    weights = jnp.minimum(ratios, largest) * jax.lax.stop_gradient(advantages)
    return PolicyOutput(jnp.where(here, -weights * logps, 0), ratios, here & (ratios > largest))


def clipped_value(
    values: Float[Array, "*batch"],
    old_values: Float[Array, "*batch"],
    returns: Float[Array, "*batch"],
    *,
    clip: float = 0.2,
    where: Bool[Array, "*batch"] | None = None,
) -> ValueOutput:
    """The critic's squared error, which gains nothing beyond a distance from the old value.

    Formula: $L = \\frac12 \\max((V - R)^2, (\\mathrm{clip}(V, V_{old} - \\epsilon,
    V_{old} + \\epsilon) - R)^2)$.

    Source: the code of Schulman et al. 2017 (OpenAI baselines), as in Ziegler et al. 2019 (arXiv
    1909.08593) and TRL.

    Args:
      values: the critic's, read before each token.
      old_values: the same when the responses were sampled; no gradient.
      returns: of each token, see `advantages.gae`; no gradient.
      clip: $\\epsilon$; infinity for the plain squared error.
      where: which tokens are there; None for all.

    Returns:
      `ValueOutput(losses, clipped)` in float32 (float64 stays float64).

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("clipped_value", above=0, clip=clip)
    values, old, returns, here = _masked(
        "clipped_value", where, values=values, old=old_values, returns=returns
    )
    old, returns = jax.lax.stop_gradient((old, returns))
    plain = jnp.square(values - returns)
    bounded = jnp.square(jnp.clip(values, old - clip, old + clip) - returns)
    losses = jnp.where(here, jnp.maximum(plain, bounded) / 2, 0)
    return ValueOutput(losses, here & (bounded > plain))


def _masked(loss: str, where: Array | None, **inputs: Array) -> tuple[Array, ...]:
    """The inputs with 0 for what is not there, and what is."""
    arrays = checked(loss, **inputs)
    here = jnp.ones(arrays[0].shape, bool) if where is None else where
    return *(jnp.where(here, x, 0) for x in arrays), here


def _clipped(
    ratios: Array, advantages: Array, clip: float, clip_high: float | None, here: Array
) -> PolicyOutput:
    advantages = jax.lax.stop_gradient(advantages)
    bounded = jnp.clip(ratios, 1 - clip, 1 + (clip if clip_high is None else clip_high))
    plain, held = -advantages * ratios, -advantages * bounded
    losses = jnp.where(here, jnp.maximum(plain, held), 0)
    return PolicyOutput(losses, jax.lax.stop_gradient(ratios), here & (held > plain))
