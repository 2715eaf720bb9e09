"""Losses on preference pairs that need no reference model.

All losses here take the summed log-probability of the chosen and of the rejected response
under the policy, in nats and of one shape, and return one value per pair.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses.inputs import check_range, check_smoothing, checked, per_token
from jaxpref.losses.pairs import (
    PreferenceOutput,
    Scalar,
    smoothed_logistic,
    without_gradient,
)

# Larger log-probabilities are cut to this: in float32 one minus the probability would be 0.
_ALMOST_ONE = -1e-7


def simpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    chosen_lengths: Int[Array, "*batch"],
    rejected_lengths: Int[Array, "*batch"],
    *,
    beta: Scalar = 2.0,
    margin: Scalar = 1.0,
    label_smoothing: Scalar = 0.0,
) -> PreferenceOutput:
    """SimPO: a logistic loss on the margin of mean log-probabilities, beyond a target.

    Formula, with rewards $r = \\frac{\\beta}{|y|} \\log \\pi_\\theta(y|x)$:
    $L = -\\log \\sigma(r_w - r_l - \\gamma)$, smoothed as in `dpo`.

    Source: Meng et al. 2024 (arXiv 2405.14734), equation 6.

    Args:
      policy_chosen_logps: summed log-probability of each chosen response, in nats.
      policy_rejected_logps: the same for the rejected responses.
      chosen_lengths: tokens of each chosen response.
      rejected_lengths: tokens of each rejected response.
      beta: scale of the reward.
      margin: $\\gamma$, the target margin of rewards (the paper tunes $\\gamma / \\beta$).
      label_smoothing: probability that a label is wrong, from 0 to below 0.5.

    Returns:
      `PreferenceOutput(losses, chosen_rewards, rejected_rewards)` in float32.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("simpo", above=0, beta=beta)
    check_smoothing("simpo", label_smoothing)
    chosen, rejected = _mean_logps(
        "simpo", policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = smoothed_logistic(chosen - rejected - margin, label_smoothing)
    return without_gradient(losses, chosen, rejected)


def orpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    chosen_lengths: Int[Array, "*batch"],
    rejected_lengths: Int[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    nll: Float[Array, "*batch"] | None = None,
) -> PreferenceOutput:
    """ORPO: the SFT loss, and a logistic loss on the log odds ratio of the responses.

    Formula, with $p = \\pi_\\theta(y|x)^{1 / |y|}$ and $odds = \\frac{p}{1 - p}$:
    $L = -\\log p_w - \\lambda \\log \\sigma(\\log \\frac{odds_w}{odds_l})$.

    Source: Hong et al. 2024 (arXiv 2403.07691), equations 6 and 7. In TRL the first term is the
    mean over all tokens of a batch, prompts included; see `nll`.

    Args:
      policy_chosen_logps: summed log-probability of each chosen response, in nats.
      policy_rejected_logps: the same for the rejected responses.
      chosen_lengths: tokens of each chosen response.
      rejected_lengths: tokens of each rejected response.
      beta: $\\lambda$, the weight of the odds ratio.
      nll: the first term of each pair, in place of the paper's mean over the response's
        tokens. If it is the summed negative log-likelihood divided by the batch's mean
        length, the mean over the batch is per token.

    Returns:
      `PreferenceOutput(losses, chosen_rewards, rejected_rewards)` in float32; rewards are
      beta times the mean log-probability.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("orpo", least=0, beta=beta)
    chosen, rejected = _mean_logps(
        "orpo", policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    likelihood = -chosen if nll is None else checked("orpo", chosen=chosen, nll=nll)[1]
    losses = likelihood - beta * jax.nn.log_sigmoid(log_odds)
    return without_gradient(losses, beta * chosen, beta * rejected)


def cpo(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    *,
    beta: Scalar = 0.1,
    nll_weight: Scalar = 1.0,
    label_smoothing: Scalar = 0.0,
    nll: Float[Array, "*batch"] | None = None,
) -> PreferenceOutput:
    """CPO: DPO's loss with a uniform reference, and the SFT loss.

    Formula: $L = -\\log \\sigma(\\beta (\\log \\pi_\\theta(y_w|x) - \\log \\pi_\\theta(y_l|x)))
    - \\alpha \\log \\pi_\\theta(y_w|x)$, the first term smoothed as in `dpo`.

    Source: Xu et al. 2024 (arXiv 2401.08417), equations 3 and 5. The paper's second term is
    of the whole response; in TRL it is the mean over all response tokens of a batch, see `nll`.

    Args:
      policy_chosen_logps: summed log-probability of each chosen response, in nats.
      policy_rejected_logps: the same for the rejected responses.
      beta: inverse temperature.
      nll_weight: $\\alpha$, the weight of the SFT loss.
      label_smoothing: probability that a label is wrong, from 0 to below 0.5.
      nll: stands in each pair's second term in place of the paper's
        $-\\log \\pi_\\theta(y_w|x)$. If it is that value divided by the batch's mean length
        of a chosen response, the mean over the batch is the one of TRL.

    Returns:
      `PreferenceOutput(losses, chosen_rewards, rejected_rewards)` in float32.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("cpo", above=0, beta=beta)
    check_range("cpo", least=0, nll_weight=nll_weight)
    check_smoothing("cpo", label_smoothing)
    chosen, rejected = checked(
        "cpo", policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    likelihood = -chosen if nll is None else checked("cpo", chosen=chosen, nll=nll)[1]
    losses = smoothed_logistic(beta * (chosen - rejected), label_smoothing)
    losses += nll_weight * likelihood
    return without_gradient(losses, beta * chosen, beta * rejected)


def slic_hf(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    *,
    margin: Scalar = 1.0,
    nll_weight: Scalar = 1.0,
) -> PreferenceOutput:
    """SLiC-HF: a hinge on the margin of log-probabilities, and the SFT loss.

    Formula: $L = \\max(0, \\delta - \\log \\pi_\\theta(y_w|x) + \\log \\pi_\\theta(y_l|x))
    - \\lambda \\log \\pi_\\theta(y_w|x)$, with the chosen response as the target of SFT.

    Source: Zhao et al. 2023 (arXiv 2305.10425), equation 1.

    Args:
      policy_chosen_logps: summed log-probability of each chosen response, in nats.
      policy_rejected_logps: the same for the rejected responses.
      margin: $\\delta$, in nats.
      nll_weight: $\\lambda$, the weight of the SFT loss.

    Returns:
      `PreferenceOutput(losses, chosen_rewards, rejected_rewards)` in float32; rewards are
      the log-probabilities.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("slic_hf", least=0, margin=margin, nll_weight=nll_weight)
    chosen, rejected = checked(
        "slic_hf",
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
    )
    losses = jax.nn.relu(margin - chosen + rejected) - nll_weight * chosen
    return without_gradient(losses, chosen, rejected)


def unlikelihood(
    policy_chosen_logps: Float[Array, "*batch"],
    policy_rejected_logps: Float[Array, "*batch"],
    *,
    alpha: Scalar = 1.0,
) -> PreferenceOutput:
    """Unlikelihood: raises the chosen log-probability and lowers the rejected one.

    Formula: $L = -\\log \\pi_\\theta(y_w|x) + \\alpha \\log \\pi_\\theta(y_l|x)$, which has no
    lower bound.

    Source: the baseline of Rafailov et al. 2023 (arXiv 2305.18290), section 6 ("optional
    coefficient alpha on the unlikelihood term"), after Welleck et al. 2019 (1908.04319).

    Args:
      policy_chosen_logps: summed log-probability of each chosen response, in nats.
      policy_rejected_logps: the same for the rejected responses.
      alpha: weight of the rejected term, from 0 (SFT) to 1.

    Returns:
      `PreferenceOutput(losses, chosen_rewards, rejected_rewards)` in float32; rewards are
      the log-probabilities.

    Raises:
      ValueError: the shapes differ, or a parameter is out of range.
    """
    check_range("unlikelihood", least=0, alpha=alpha)
    chosen, rejected = checked(
        "unlikelihood",
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
    )
    return without_gradient(alpha * rejected - chosen, chosen, rejected)


def _mean_logps(
    loss: str, chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array
) -> tuple[Array, Array]:
    """Log-probabilities per token of the chosen and of the rejected responses."""
    chosen, rejected, chosen_lengths, rejected_lengths = checked(
        loss,
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return per_token(chosen, chosen_lengths), per_token(rejected, rejected_lengths)


def _log_odds(logps: Array) -> Array:
    """$\\log \\frac{p}{1 - p}$ of log-probabilities."""
    logps = jnp.minimum(logps, _ALMOST_ONE)
    return logps - jnp.log(-jnp.expm1(logps))
