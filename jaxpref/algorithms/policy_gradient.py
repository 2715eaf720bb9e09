"""Policy gradients on what the policy has sampled: PPO, REINFORCE, ReMax, RLOO, GRPO, REINFORCE++.

They differ in their advantages, and in nothing else: once these are known, every token has the
same loss, in one or in several updates. `Rollout` is all that is known of the sampled tokens of a
step, `learned` makes advantages of it, and the loss trains on them, a micro-batch at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from jaxpref import advantages as advantages_lib, losses, packing
from jaxpref.algorithms.base import Algorithm, LossInputs, Objective
from jaxpref.algorithms.online import Controls, Learned, Online, Rollout, Tokens
from jaxpref.logprobs import LMHead, token_logprobs_and_entropy
from jaxpref.measurements import Metric
from jaxpref.models.protocol import ModelOutput, ScalarHead
from jaxpref.packing import PackedBatch

# Names among the values that a batch has of its tokens.
OLD, SAMPLED, REFERENCE = "old_logps", "sampled_logps", "reference_logps"
ADVANTAGES, RETURNS, VALUES = "advantages", "returns", "old_values"
# Names among the numbers that a run carries from step to step.
BETA, BASELINE, BASELINE_WEIGHT = "kl_coefficient", "baseline", "baseline_weight"


def build(config: ConfigDict) -> Online:
    """The method that a checked config names."""
    knobs = config.algorithm
    find = _ADVANTAGES[knobs.name]

    def learned(rollout: Rollout, controls: Controls) -> Learned:
        beta = controls[BETA] * (knobs.kl_in == "reward")
        kl = rollout.summed(rollout.log_ratios)
        found = find(knobs, rollout, beta, controls)
        carried = {**controls, **found.controls}
        if knobs.kl_target:
            error = jnp.clip(kl.mean() / knobs.kl_target - 1, -0.2, 0.2)
            carried[BETA] = controls[BETA] * (1 + error * kl.size / knobs.kl_horizon)
        return found._replace(
            advantages=jax.lax.stop_gradient(jnp.where(rollout.where, found.advantages, 0)),
            controls=carried,
            metrics={**_measured(rollout, kl, controls[BETA]), **found.metrics},
        )

    controls = {BETA: knobs.beta}
    if knobs.name == "reinforce":
        controls |= {BASELINE: 0.0, BASELINE_WEIGHT: 0.0}
    return Online(
        policy=Algorithm(_policy_loss(config)),
        critic=Algorithm(_critic_loss(knobs)) if knobs.name == "ppo" else None,
        learned=learned,
        controls=controls,
        greedy=knobs.name == "remax",
        epochs=knobs.epochs,
        minibatches=knobs.minibatches,
        stop_kl=knobs.stop_kl,
        largest_kl=knobs.largest_kl,
    )


def token_logps(output: ModelOutput, batch: PackedBatch) -> Float[Array, "rows scored"]:
    """Log-probability of every scored token of a packed batch, in nats; 0 on padding."""
    return _token_logps(output, batch)[0]


def token_values(output: ModelOutput, batch: PackedBatch) -> Float[Array, "rows scored"]:
    """What a critic says before every scored token of a packed batch; 0 on padding."""
    if not isinstance(output.head, ScalarHead):
        raise ValueError("reading values needs a scalar head.")
    values = output.head.scalars(packing.gather_sources(output.hidden, batch))
    return jnp.where(_here(batch), values, 0)


def _token_logps(output: ModelOutput, batch: PackedBatch) -> tuple[Array, Array]:
    if not isinstance(output.head, LMHead):
        raise ValueError("reading log-probs needs an LM head.")
    hidden = packing.gather_sources(output.hidden, batch)
    found = token_logprobs_and_entropy(hidden, output.head, jnp.asarray(batch.target))
    here = _here(batch)
    return jnp.where(here, found.logprobs, 0), jnp.where(here, found.entropy, 0)


def _here(batch: PackedBatch) -> Bool[Array, "rows scored"]:
    return jnp.asarray(batch.response) < batch.lengths.size


def _policy_loss(config: ConfigDict) -> Callable[[ModelOutput, PackedBatch, LossInputs], Objective]:
    knobs, longest = config.algorithm, config.sampling.max_new_tokens
    several = knobs.epochs * knobs.minibatches > 1
    sampling = config.sampling
    truncated = bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)

    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        logps, entropy = _token_logps(output, batch)
        here, given = _here(batch), batch.token_extras
        lengths = jnp.asarray(batch.lengths)
        # In the only update of a step the policy is the one that sampled: the ratio is 1.
        old = jnp.asarray(given[OLD]) if several else jax.lax.stop_gradient(logps)
        advantages = jnp.asarray(given[ADVANTAGES])
        if knobs.importance_cap:
            advantages *= losses.weighting.truncated_importance(
                old, jnp.asarray(given[SAMPLED]), largest=knobs.importance_cap, where=here
            )
        sums, ratios, clipped = _surrogate(knobs, batch, logps, old, advantages, here)
        if REFERENCE in given and knobs.kl_in == "loss":
            beta = jnp.asarray(batch.extras[BETA]).mean()
            sums += beta * _kl_term(knobs, batch, logps, jnp.asarray(given[REFERENCE]))
        sums -= knobs.entropy_bonus * packing.sum_by_response(entropy, batch)
        values, weights = losses.aggregate(sums, lengths, how=knobs.aggregation, longest=longest)
        counts = here.astype(logps.dtype)
        estimates = advantages_lib.kl_estimates(old, jax.lax.stop_gradient(logps))
        difference = jnp.where(here, old - jnp.asarray(given[SAMPLED]), 0)
        metrics = {
            "policy/entropy": Metric(jax.lax.stop_gradient(entropy), counts),
            "policy/approx_kl": Metric(estimates.k2, counts),
            "policy/kl_k1": Metric(estimates.k1, counts),
            "policy/kl_k3": Metric(estimates.k3, counts),
            "policy/ratio": Metric(ratios, counts),
            "policy/clipfrac": Metric(clipped.astype(logps.dtype), counts),
            "sampling/logp_difference": Metric(jnp.abs(difference), counts),
        }
        if truncated:
            # What was sampled from has only this share of the policy's probability.
            metrics["sampling/kept_mass"] = Metric(jnp.exp(difference), counts)
        return Objective(Metric(values, weights), metrics)

    return loss


def _surrogate(
    knobs: ConfigDict, batch: PackedBatch, logps: Array, old: Array, advantages: Array, here: Array
) -> tuple[Array, Array, Array]:
    """Token losses added up over each response, and each token's ratio and whether it is clipped.

    Of a response's ratio (GSPO) the loss counts once for each of its tokens, as in its gradient.
    """
    high = knobs.clip_high or None
    if knobs.ratio == "token":
        found = losses.ppo(logps, old, advantages, clip=knobs.clip, clip_high=high, where=here)
    elif knobs.ratio == "cispo":
        largest = 1 + (knobs.clip_high or knobs.clip)
        found = losses.cispo(logps, old, advantages, largest=largest, where=here)
    else:
        lengths = jnp.asarray(batch.lengths)
        there = lengths > 0
        mean = packing.sum_by_response(advantages, batch) / jnp.maximum(lengths, 1)
        found = losses.gspo(
            packing.sum_by_response(logps, batch),
            packing.sum_by_response(old, batch),
            lengths,
            mean,
            clip=knobs.clip,
            clip_high=high,
            where=there,
        )
        on_tokens = [_spread(batch, x) for x in (found.ratios, found.clipped)]
        return found.losses * lengths, on_tokens[0], on_tokens[1] > 0
    return packing.sum_by_response(found.losses, batch), found.ratios, found.clipped


def _spread(batch: PackedBatch, values: Array) -> Array:
    padded = jnp.concatenate([values.ravel().astype(jnp.float32), jnp.zeros(1)])
    return padded[jnp.asarray(batch.response)]


def _kl_term(knobs: ConfigDict, batch: PackedBatch, logps: Array, reference: Array) -> Array:
    """The KL of each response in the loss."""
    if knobs.kl_estimator == "sequence_k2":
        sums = (packing.sum_by_response(x, batch) for x in (logps, reference))
        return advantages_lib.kl_estimates(*sums).k2
    estimates = advantages_lib.kl_estimates(logps, reference)
    return packing.sum_by_response(getattr(estimates, knobs.kl_estimator), batch)


def _critic_loss(knobs: ConfigDict) -> Callable[[ModelOutput, PackedBatch, LossInputs], Objective]:
    def loss(output: ModelOutput, batch: PackedBatch, inputs: LossInputs) -> Objective:
        here = _here(batch)
        found = losses.clipped_value(
            token_values(output, batch),
            jnp.asarray(batch.token_extras[VALUES]),
            jnp.asarray(batch.token_extras[RETURNS]),
            clip=knobs.value_clip or jnp.inf,
            where=here,
        )
        counts = here.astype(found.losses.dtype)
        clipped = found.clipped.astype(found.losses.dtype)
        return Objective(Metric(found.losses, counts), {"clipfrac": Metric(clipped, counts)})

    return loss


def _measured(rollout: Rollout, kl: Array, beta: Array) -> dict[str, Metric]:
    """TRL's names; the KL of a response is the sum over its tokens."""
    one = jnp.ones_like(kl)
    metrics = {
        "objective/scores": Metric(rollout.rewards, one),
        "objective/kl": Metric(kl, one),
        "objective/non_score_reward": Metric(-beta * kl, one),
        "objective/rlhf_reward": Metric(rollout.rewards - beta * kl, one),
        "objective/kl_coefficient": Metric(beta[None], jnp.ones(1)),
    }
    if rollout.reference_logps is not None:
        estimates = advantages_lib.kl_estimates(rollout.logps, rollout.reference_logps)
        counts = rollout.where.astype(kl.dtype)
        metrics |= {
            "objective/kl_k2": Metric(estimates.k2, counts),
            "objective/kl_k3": Metric(estimates.k3, counts),
        }
    return metrics


def _token_rewards(rollout: Rollout, beta: Array, scores: Array) -> Tokens:
    # The coefficient may be traced, which a checked argument cannot be.
    return advantages_lib.token_rewards(
        rollout.on_tokens(scores),
        beta * rollout.log_ratios,
        jnp.zeros_like(rollout.logps),
        rollout.ends,
        beta=1.0,
        where=rollout.where,
    )


def _returns(knobs: ConfigDict, rollout: Rollout, beta: Array, scores: Array) -> Tokens:
    rewards = _token_rewards(rollout, beta, scores)
    return advantages_lib.discounted_returns(
        rewards, rollout.ends, gamma=knobs.gamma, where=rollout.where
    )


def _totals(rollout: Rollout, beta: Array) -> Float[Array, "prompts samples"]:
    """A response's reward with its KL, as one action's."""
    return rollout.rewards - beta * rollout.summed(rollout.log_ratios)


def _ppo(knobs: ConfigDict, rollout: Rollout, beta: Array, controls: Controls) -> Learned:
    assert rollout.values is not None
    found = advantages_lib.gae(
        _token_rewards(rollout, beta, rollout.rewards),
        rollout.values,
        rollout.ends,
        gamma=knobs.gamma,
        lam=knobs.lam,
        where=rollout.where,
    )
    counts = rollout.where.astype(rollout.logps.dtype)
    values, returns = jnp.where(rollout.where, rollout.values, 0), found.returns
    total = jnp.maximum(counts.sum(), 1)
    unexplained = jnp.where(rollout.where, jnp.square(returns - values), 0).sum()
    mean = returns.sum() / total
    spread = jnp.where(rollout.where, jnp.square(returns - mean), 0).sum()
    metrics = {
        "val/mean": Metric(values, counts),
        "val/explained_variance": Metric(
            (1 - unexplained / jnp.maximum(spread, 1e-8))[None], jnp.ones(1)
        ),
    }
    advantages = found.advantages
    if knobs.whiten:
        advantages = advantages_lib.whiten(advantages, where=rollout.where)
    return Learned(advantages, returns, {}, metrics)


def _reinforce(knobs: ConfigDict, rollout: Rollout, beta: Array, controls: Controls) -> Learned:
    # The average is that of the steps before: it does not depend on these samples.
    baseline = controls[BASELINE] / jnp.maximum(controls[BASELINE_WEIGHT], 1e-8)
    decay, mean = knobs.baseline_decay, _totals(rollout, beta).mean()
    carried = {
        BASELINE: decay * controls[BASELINE] + (1 - decay) * mean,
        BASELINE_WEIGHT: decay * controls[BASELINE_WEIGHT] + (1 - decay),
    }
    returns = _returns(knobs, rollout, beta, rollout.rewards)
    metrics = {"objective/baseline": Metric(baseline[None], jnp.ones(1))}
    return Learned(returns - baseline, None, carried, metrics)


def _remax(knobs: ConfigDict, rollout: Rollout, beta: Array, controls: Controls) -> Learned:
    assert rollout.greedy_rewards is not None
    scores = advantages_lib.against_greedy(rollout.rewards, rollout.greedy_rewards)
    greedy = rollout.greedy_rewards
    metrics = {"objective/greedy_scores": Metric(greedy, jnp.ones_like(greedy))}
    return Learned(_returns(knobs, rollout, beta, scores), None, {}, metrics)


def _rloo(knobs: ConfigDict, rollout: Rollout, beta: Array, controls: Controls) -> Learned:
    found = advantages_lib.leave_one_out(_totals(rollout, beta))
    return Learned(rollout.on_tokens(found), None, {}, {})


def _grpo(knobs: ConfigDict, rollout: Rollout, beta: Array, controls: Controls) -> Learned:
    found = advantages_lib.group(_totals(rollout, beta), scale=knobs.scale)
    return Learned(rollout.on_tokens(found), None, {}, {})


def _reinforce_pp(knobs: ConfigDict, rollout: Rollout, beta: Array, controls: Controls) -> Learned:
    scores = rollout.rewards
    if knobs.group_baseline:
        scores = advantages_lib.group(scores, scale="none")
    found = advantages_lib.reinforce_pp(
        _token_rewards(rollout, beta, scores),
        rollout.ends,
        gamma=knobs.gamma,
        where=rollout.where,
    )
    return Learned(found, None, {}, {})


_ADVANTAGES: dict[str, Callable[[ConfigDict, Rollout, Array, Controls], Learned]] = {
    "ppo": _ppo,
    "reinforce": _reinforce,
    "remax": _remax,
    "rloo": _rloo,
    "grpo": _grpo,
    "reinforce_pp": _reinforce_pp,
}
