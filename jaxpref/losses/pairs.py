"""What losses on preference pairs share: their output, implicit rewards, the logistic loss."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from jaxpref.losses.inputs import check_range, checked

Scalar = float | Float[Array, ""]


class PreferenceOutput(NamedTuple):
    """What a pairwise preference loss returns, one value per pair.

    Attributes:
      losses: the loss of each pair.
      chosen_rewards: the implicit reward of the chosen response, for most losses beta
        times its log-ratio; no gradient.
      rejected_rewards: the same for the rejected response; no gradient.
    """

    losses: Float[Array, "*batch"]
    chosen_rewards: Float[Array, "*batch"]
    rejected_rewards: Float[Array, "*batch"]


def without_gradient(
    losses: Float[Array, "*batch"],
    chosen_rewards: Float[Array, "*batch"],
    rejected_rewards: Float[Array, "*batch"],
) -> PreferenceOutput:
    """The output of a loss, with rewards that carry no gradient."""
    stop = jax.lax.stop_gradient
    return PreferenceOutput(losses, stop(chosen_rewards), stop(rejected_rewards))


def smoothed_logistic(
    margins: Float[Array, "*batch"], label_smoothing: Scalar = 0.0
) -> Float[Array, "*batch"]:
    """$-(1 - \\epsilon) \\log \\sigma(m) - \\epsilon \\log \\sigma(-m)$ of margins, in nats."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margins
    ) - label_smoothing * jax.nn.log_sigmoid(-margins)


def log_ratios(
    loss: str, policy_chosen: Array, policy_rejected: Array, chosen: Array, rejected: Array
) -> tuple[Array, Array]:
    """Log-ratios of policy to reference, of the chosen and of the rejected responses."""
    policy_chosen, policy_rejected, chosen, rejected = checked(
        loss,
        policy_chosen_logps=policy_chosen,
        policy_rejected_logps=policy_rejected,
        reference_chosen_logps=chosen,
        reference_rejected_logps=rejected,
    )
    stop = jax.lax.stop_gradient
    return policy_chosen - stop(chosen), policy_rejected - stop(rejected)


def implicit_rewards(loss: str, beta: Scalar, *logps: Array) -> tuple[Array, Array]:
    """Implicit rewards of the chosen and of the rejected responses."""
    check_range(loss, above=0, beta=beta)
    chosen, rejected = log_ratios(loss, *logps)
    return beta * chosen, beta * rejected
