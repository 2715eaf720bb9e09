"""Losses that compare quantiles of a batch instead of one response with another: AOT."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpref.losses.inputs import check_range, check_smoothing, checked
from jaxpref.losses.pairs import (
    PreferenceOutput,
    Scalar,
    implicit_rewards,
    smoothed_logistic,
    without_gradient,
)


def aot(
    policy_chosen_logps: Float[Array, "*batch pairs"],
    policy_rejected_logps: Float[Array, "*batch pairs"],
    reference_chosen_logps: Float[Array, "*batch pairs"],
    reference_rejected_logps: Float[Array, "*batch pairs"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    where: Bool[Array, "*batch pairs"] | None = None,
) -> PreferenceOutput:
    """AOT for pairs: the policy's margins dominate the reference's, quantile by quantile.

    Formula, with margins $h = \\log \\pi(y_w|x) - \\log \\pi(y_l|x)$ of a batch and
    $h_{(k)}$ the k-th smallest: $L_{(k)} = -\\log \\sigma(\\beta (h_{\\theta (k)}
    - h_{ref (k)}))$, smoothed as in `dpo`. A loss belongs to the pair that has the
    policy's k-th margin.

    Source: Melnyk et al. 2024 (arXiv 2406.05882), equation 8 (paired, logistic).

    Args:
      policy_chosen_logps: see `dpo`, as are the three that follow; the last axis is the
        batch whose quantiles are compared.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature.
      label_smoothing: probability that a label is wrong, from 0 to below 0.5.
      where: True for the pairs that count; the others give loss 0.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("aot", above=0, beta=beta)
    check_smoothing("aot", label_smoothing)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = checked(
        "aot",
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=jax.lax.stop_gradient(reference_chosen_logps),
        reference_rejected_logps=jax.lax.stop_gradient(reference_rejected_logps),
    )
    differences = _quantile_differences(
        policy_chosen - policy_rejected, reference_chosen - reference_rejected, where
    )
    losses = smoothed_logistic(beta * differences, label_smoothing)
    return without_gradient(
        losses if where is None else jnp.where(where, losses, 0.0),
        beta * (policy_chosen - reference_chosen),
        beta * (policy_rejected - reference_rejected),
    )


def aot_unpaired(
    policy_chosen_logps: Float[Array, "*batch pairs"],
    policy_rejected_logps: Float[Array, "*batch pairs"],
    reference_chosen_logps: Float[Array, "*batch pairs"],
    reference_rejected_logps: Float[Array, "*batch pairs"],
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    where: Bool[Array, "*batch pairs"] | None = None,
) -> PreferenceOutput:
    """AOT for unpaired data: chosen log-ratios dominate rejected ones, quantile by quantile.

    Formula, with rewards as in `dpo`, the chosen ones sorted and the rejected ones sorted:
    $L_{(k)} = -\\log \\sigma(\\hat r_{w (k)} - \\hat r_{l (k)})$. A loss belongs to the pair
    that has the k-th chosen reward.

    Source: Melnyk et al. 2024 (arXiv 2406.05882), equation 10 (unpaired, logistic).

    Args:
      policy_chosen_logps: see `aot`, as is all that follows.
      policy_rejected_logps: of the rejected responses.
      reference_chosen_logps: under the reference.
      reference_rejected_logps: under the reference.
      beta: inverse temperature of the implicit reward.
      label_smoothing: probability that a label is wrong, from 0 to below 0.5.
      where: True for the pairs that count; the others give loss 0.

    Returns:
      See `dpo`.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_smoothing("aot_unpaired", label_smoothing)
    chosen, rejected = implicit_rewards(
        "aot_unpaired",
        beta,
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    losses = smoothed_logistic(_quantile_differences(chosen, rejected, where), label_smoothing)
    losses = losses if where is None else jnp.where(where, losses, 0.0)
    return without_gradient(losses, chosen, rejected)


def _quantile_differences(a: Array, b: Array, where: Array | None) -> Array:
    """The k-th smallest `a` less the k-th smallest `b`, at the place of the k-th `a`."""
    # Pairs that do not count are sorted to the end of both, so that the others have the same
    # ranks in both.
    last = 0.0 if where is None else jnp.where(where, 0.0, jnp.inf)
    if where is not None:
        # The value of a pair that does not count may be anything, even NaN.
        a, b = jnp.where(where, a, 0.0), jnp.where(where, b, 0.0)
    by_a, by_b = (jnp.argsort(jax.lax.stop_gradient(x) + last, axis=-1) for x in (a, b))
    differences = jnp.take_along_axis(a, by_a, -1) - jnp.take_along_axis(b, by_b, -1)
    return jnp.take_along_axis(differences, jnp.argsort(by_a, axis=-1), -1)
