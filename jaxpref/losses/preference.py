"""Losses on preference pairs: Direct Preference Optimization and its kin."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class DPOOutput(NamedTuple):
    """What a pairwise preference loss returns, one value per pair.

    Attributes:
      losses: the loss of each pair, in nats.
      chosen_rewards: beta times the log-ratio of the chosen response; no gradient.
      rejected_rewards: the same for the rejected response; no gradient.
    """

    losses: Float[Array, "*batch"]
    chosen_rewards: Float[Array, "*batch"]
    rejected_rewards: Float[Array, "*batch"]


def dpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    reference_chosen_logps: Float[Array, "*batch"] | None,
    reference_rejected_logps: Float[Array, "*batch"] | None,
    *,
    beta: float | Float[Array, ""] = 0.1,
    label_smoothing: float | Float[Array, ""] = 0.0,
    reference_free: bool = False,
) -> DPOOutput:
    """Direct Preference Optimization: a logistic loss on the implicit reward margin.

    Formula, with $\\hat r(x, y) = \\beta \\log \\frac{\\pi_\\theta(y|x)}{\\pi_{ref}(y|x)}$,
    $m = \\hat r(x, y_w) - \\hat r(x, y_l)$ and label smoothing $\\epsilon$:
    $L = -(1 - \\epsilon) \\log \\sigma(m) - \\epsilon \\log \\sigma(-m)$.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7. Label smoothing is
    conservative DPO: each label is wrong with probability $\\epsilon$.

    Args:
      policy_chosen_logps: summed log-probability of each chosen response under
        the policy, in nats; any batch shape.
      policy_rejected_logps: the same for the rejected responses.
      reference_chosen_logps: the chosen responses under the frozen reference.
        No gradient flows into it. May be None if `reference_free`.
      reference_rejected_logps: the same for the rejected responses.
      beta: inverse temperature of the implicit reward; the strength of the
        pull towards the reference.
      label_smoothing: probability that a label is wrong, from 0 to below 0.5.
      reference_free: drop the reference, as if it gave every response the same
        probability. The rewards are then beta times the policy's log-probability.

    Returns:
      `DPOOutput(losses, chosen_rewards, rejected_rewards)`, in float32 (float64
      stays float64), each shaped like the inputs. Finite, with finite gradients,
      for any finite inputs.

    Raises:
      ValueError: the shapes differ, or the reference is missing.

    >>> import jax.numpy as jnp
    >>> at_reference = jnp.array([-12.0])
    >>> print(dpo(at_reference, at_reference, at_reference, at_reference).losses)
    [0.6931472]
    """
    if reference_free:
        reference_chosen_logps = jnp.zeros_like(policy_chosen_logps)
        reference_rejected_logps = jnp.zeros_like(policy_rejected_logps)
    if reference_chosen_logps is None or reference_rejected_logps is None:
        raise ValueError(
            "dpo needs the reference's log-probs of both responses; got None. "
            "Pass them, or reference_free=True to do without a reference."
        )
    inputs = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    _check_same_shape("dpo", inputs)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = (
        x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in inputs.values()
    )
    chosen_rewards = beta * (policy_chosen - jax.lax.stop_gradient(reference_chosen))
    rejected_rewards = beta * (policy_rejected - jax.lax.stop_gradient(reference_rejected))
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(
        margins
    ) - label_smoothing * jax.nn.log_sigmoid(-margins)
    return DPOOutput(
        losses, jax.lax.stop_gradient(chosen_rewards), jax.lax.stop_gradient(rejected_rewards)
    )


def _check_same_shape(loss: str, inputs: dict[str, Array]) -> None:
    """Refuses shapes that differ, which broadcasting would turn into a wrong loss."""
    if len({x.shape for x in inputs.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
        raise ValueError(f"{loss} expected inputs of one shape, one value per pair; got {shapes}.")
