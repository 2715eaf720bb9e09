"""Losses on single responses that are labelled as desirable or not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses.inputs import check_range, checked
from jaxpref.losses.pairs import Scalar


class UnpairedOutput(NamedTuple):
    """What a loss on single responses returns, one value per response.

    Attributes:
      losses: the loss of each response.
      rewards: beta times the log-ratio of each response; no gradient.
    """

    losses: Float[Array, "*batch"]
    rewards: Float[Array, "*batch"]


def kto(
    policy_logps: Float[Array, "*batch"],
    reference_logps: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    kl: Scalar,
    *,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> UnpairedOutput:
    """KTO: the value that prospect theory gives a response, with the KL as reference point.

    Formula, with $r = \\log \\frac{\\pi_\\theta(y|x)}{\\pi_{ref}(y|x)}$:
    $L = \\lambda_D (1 - \\sigma(\\beta (r - z_0)))$ for a desirable response and
    $L = \\lambda_U (1 - \\sigma(\\beta (z_0 - r)))$ for an undesirable one.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), equation 8.

    Args:
      policy_logps: summed log-probability of each response under the policy, in nats.
      reference_logps: the same under the frozen reference; no gradient.
      desirable: the label of each response.
      kl: $z_0$ in nats, from `kto_kl`; no gradient.
      beta: how quickly the value saturates.
      desirable_weight: $\\lambda_D$.
      undesirable_weight: $\\lambda_U$. The paper recommends weights for which
        $\\lambda_D n_D / \\lambda_U n_U$ is between 1 and 3/2, where $n_D$ and $n_U$ are the
        numbers of desirable and of undesirable responses.

    Returns:
      `UnpairedOutput(losses, rewards)` in float32 (float64 stays float64).

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("kto", above=0, beta=beta)
    check_range(
        "kto", least=0, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    policy, reference, sign = checked(
        "kto",
        policy_logps=policy_logps,
        reference_logps=reference_logps,
        desirable=_sign(desirable, policy_logps),
    )
    ratios = policy - jax.lax.stop_gradient(reference)
    weights = jnp.where(desirable, desirable_weight, undesirable_weight).astype(ratios.dtype)
    losses = weights * jax.nn.sigmoid(-sign * beta * (ratios - jax.lax.stop_gradient(kl)))
    return UnpairedOutput(losses, jax.lax.stop_gradient(beta * ratios))


def kto_kl(
    policy_logps: Float[Array, "*batch"],
    reference_logps: Float[Array, "*batch"],
    *,
    where: Bool[Array, "*batch"] | None = None,
) -> Float[Array, ""]:
    """KTO's reference point: the KL from the reference to the policy, from mismatched pairs.

    Formula: $z_0 = \\max(0, \\frac1m \\sum_i \\log \\frac{\\pi_\\theta(y'_i|x_i)}
    {\\pi_{ref}(y'_i|x_i)})$, where $y'_i$ answers another prompt than $x_i$.

    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1. The mean is over the
    whole batch, also where the batch is split over several devices.

    Args:
      policy_logps: summed log-probabilities of the mismatched responses, in nats.
      reference_logps: the same under the reference.
      where: True for the responses that count; if none does, the estimate is 0.

    Returns:
      $z_0$ in nats, without gradient.

    Raises:
      ValueError: the shapes differ.
    """
    policy, reference = checked(
        "kto_kl", policy_logps=policy_logps, reference_logps=reference_logps
    )
    ratios = policy - reference
    count = ratios.size if where is None else where.sum()
    total = ratios.sum() if where is None else jnp.where(where, ratios, 0.0).sum()
    return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1), 0.0))


def bco_unpaired(
    policy_logps: Float[Array, "*batch"],
    reference_logps: Float[Array, "*batch"],
    desirable: Bool[Array, "*batch"],
    *,
    shift: Scalar,
    beta: Scalar = 0.1,
) -> UnpairedOutput:
    """Binary Classifier Optimization of single responses.

    Formula, with $\\hat r = \\beta \\log \\frac{\\pi_\\theta(y|x)}{\\pi_{ref}(y|x)}$:
    $L = -\\log \\sigma(\\hat r - \\delta)$ for a desirable response and
    $L = -\\log \\sigma(\\delta - \\hat r)$ for an undesirable one.

    Source: Jung et al. 2024 (arXiv 2404.04656), equation 13; `bco` is its pairwise form.

    Args:
      policy_logps: summed log-probability of each response under the policy, in nats.
      reference_logps: the same under the frozen reference; no gradient.
      desirable: the label of each response.
      shift: $\\delta$, the mean reward of all steps so far; no gradient.
      beta: inverse temperature of the implicit reward.

    Returns:
      `UnpairedOutput(losses, rewards)` in float32 (float64 stays float64).

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("bco_unpaired", above=0, beta=beta)
    policy, reference, sign = checked(
        "bco_unpaired",
        policy_logps=policy_logps,
        reference_logps=reference_logps,
        desirable=_sign(desirable, policy_logps),
    )
    rewards = beta * (policy - jax.lax.stop_gradient(reference))
    losses = -jax.nn.log_sigmoid(sign * (rewards - jax.lax.stop_gradient(shift)))
    return UnpairedOutput(losses, jax.lax.stop_gradient(rewards))


def _sign(desirable: Array, logps: Array) -> Array:
    """1 for desirable responses and -1 for undesirable ones."""
    return jnp.where(desirable, 1, -1).astype(logps.dtype)
