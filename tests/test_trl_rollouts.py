"""GRPO and RLOO from rollouts to gradients, against what TRL's own code gives (`trl_rollouts.py`).

The log-probs are `logprobs`' at a temperature, the rest is made of `advantages` and `losses`.
"""

import functools
import importlib.util
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_rollouts

from jaxpref import advantages, losses
from jaxpref.logprobs import LMHead, token_logprobs

GROUPS = (trl_rollouts.PROMPTS, trl_rollouts.SAMPLES)


@functools.cache
def drawn():
    return {name: jnp.asarray(value) for name, value in trl_rollouts.inputs().items()}


def rollouts(x):
    """With the log-probs of all tokens under three models, and which tokens are there."""
    seen = jnp.concatenate([x["prompts"][:, None], x["responses"][:, :-1]], 1)
    head = LMHead(x["head"], temperature=trl_rollouts.TEMPERATURE)
    models = ("policy", "old", "reference")
    index = jnp.arange(trl_rollouts.LONGEST)[None]
    lengths = jnp.broadcast_to(x["lengths"][:, None], x["responses"].shape)
    return {
        **x,
        **{name: token_logprobs(x[name][seen], head, x["responses"]) for name in models},
        "here": index < lengths,
        "ends": index == lengths - 1,
    }


def to_tokens(x, values):
    return jnp.broadcast_to(values[:, None], x["responses"].shape)


def to_responses(x, values):
    return jnp.where(x["here"], values, 0).sum(1)


def group_advantages(x, scale="group"):
    return advantages.group(x["rewards"].reshape(GROUPS), scale=scale).ravel()


def leave_one_out(x, beta):
    """The KL is in the rewards, of which RLOO takes a response's sum."""
    scores = to_tokens(x, x["rewards"])
    rewards = advantages.token_rewards(
        scores, x["old"], x["reference"], x["ends"], beta=beta, where=x["here"]
    )
    return advantages.leave_one_out(rewards.sum(1).reshape(GROUPS)).ravel()


def sums(x, advantage, loss=losses.ppo, beta=0.0, **options):
    """A loss of tokens, with the KL as k3 in it, added up over each response."""
    new, old, each = x["policy"], x["old"], to_tokens(x, advantage)
    kl = advantages.kl_estimates(new, x["reference"]).k3
    return to_responses(x, loss(new, old, each, where=x["here"], **options).losses + beta * kl)


def gspo_sums(x, advantage):
    new, old = to_responses(x, x["policy"]), to_responses(x, x["old"])
    out = losses.gspo(new, old, x["lengths"], advantage, clip=0.05, clip_high=0.08)
    return out.losses * x["lengths"]


def batch_loss(sums, lengths, how):
    values, weights = losses.aggregate(sums, lengths, how=how, longest=trl_rollouts.LONGEST)
    return (values * weights).sum() / weights.sum()


def bnpo(x, advantage):
    """Per token of each micro-batch; ours are those of the whole batch, as in DAPO."""
    parts = np.split(np.arange(len(x["lengths"])), trl_rollouts.MICRO_BATCHES)
    of_each = sums(x, advantage)
    return sum(batch_loss(of_each[p], x["lengths"][p], "token") for p in parts) / len(parts)


def uncut(x):
    return jnp.where(x["cut"], 0, x["lengths"])


def grpo_truncated(x, advantage):
    """TRL's mean is over all responses, those that it masks too; here they are absent."""
    loss = batch_loss(sums(x, advantage), uncut(x), "response")
    return loss * (1 - x["cut"].mean())


def rloo(x, advantage, lengths=None):
    """TRL has one ratio a response, with no regard to its length."""
    here = (x["lengths"] if lengths is None else lengths) > 0
    new, old = to_responses(x, x["policy"]), to_responses(x, x["old"])
    # TRL's ratio of a response that it masks is 1.
    return jnp.where(here, losses.ppo(new, old, advantage).losses, -advantage).mean()


def by(how, of_each=sums, **options):
    return lambda x, a: batch_loss(of_each(x, a, **options), x["lengths"], how)


# Advantages, then the loss.
OURS = {
    "grpo": (group_advantages, by("response")),
    "bnpo": (lambda x: group_advantages(x, "batch"), bnpo),
    "dr_grpo": (lambda x: group_advantages(x, "none"), by("constant")),
    "dapo": (group_advantages, by("token", clip_high=0.28)),
    "cispo": (group_advantages, by("token", loss=losses.cispo, largest=1.2)),
    "gspo": (group_advantages, by("response", gspo_sums)),
    "kl": (group_advantages, by("response", beta=0.3)),
    "dapo_truncated": (group_advantages, lambda x, a: batch_loss(sums(x, a), uncut(x), "token")),
    "grpo_truncated": (group_advantages, grpo_truncated),
    "rloo": (lambda x: leave_one_out(x, beta=0.0), rloo),
    "rloo_kl": (lambda x: leave_one_out(x, beta=0.3), rloo),
    "rloo_truncated": (lambda x: leave_one_out(x, beta=0.0), lambda x, a: rloo(x, a, uncut(x))),
}


@functools.cache
def ours():
    """Rollouts, and the advantages, losses and gradients of every case, in one program."""

    def every(table):
        x = rollouts({**drawn(), "policy": table})
        found = {name: of(x) for name, (of, _) in OURS.items()}
        values = {name: loss(x, found[name]) for name, (_, loss) in OURS.items()}
        return values, (x, found, values)

    gradients, (x, found, values) = jax.jit(jax.jacrev(every, has_aux=True))(drawn()["policy"])
    return x, found, values, gradients


def compare(theirs):
    _, found, values, gradients = ours()
    assert theirs.keys() == OURS.keys()
    for name, expected in theirs.items():
        tolerance = {"rtol": 1e-5, "atol": 1e-5, "err_msg": name}
        np.testing.assert_allclose(found[name], expected["advantages"], **tolerance)
        np.testing.assert_allclose(values[name], expected["loss"], **tolerance)
        np.testing.assert_allclose(gradients[name], expected["gradient"], **tolerance)


def test_from_rollouts_to_gradients_it_is_trl():
    compare(json.loads(trl_rollouts.FIXTURE.read_text()))


def test_the_rollouts_meet_every_bound():
    """Otherwise the comparison would not see where clipping begins, nor what is cut."""
    x, found = (jax.tree.map(np.asarray, part) for part in ours()[:2])
    ratios = np.where(x["here"], np.exp(x["policy"] - x["old"]), 1)
    good, bad = (sign * found["grpo"][:, None] > 1e-3 for sign in (1, -1))
    for sign in (good, bad):
        assert (sign & (ratios > 1.3)).any()
        assert (sign & (ratios < 0.79)).any()
    assert (good & (ratios > 1.21) & (ratios < 1.27)).any()
    assert 0 < x["cut"].sum() < len(x["cut"])


@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_from_rollouts_to_gradients_it_is_trl_live():
    compare(trl_rollouts.values())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_trls_defaults_are_those_that_the_docs_tell_of():
    trl = pytest.importorskip("trl")
    names = ("epsilon", "epsilon_high", "loss_type", "scale_rewards", "beta", "temperature")
    fields = trl.GRPOConfig.__dataclass_fields__
    assert [fields[name].default for name in names] == [0.2, None, "dapo", "group", 0.0, 1.0]
    assert trl.RLOOConfig.__dataclass_fields__["beta"].default == 0.05
    ours = {
        name: {k: p.default for k, p in inspect.signature(getattr(losses, name)).parameters.items()}
        for name in ("cispo", "gspo")
    }
    assert ours["cispo"]["largest"] == 5
    assert (ours["gspo"]["clip"], ours["gspo"]["clip_high"]) == (3e-4, 4e-4)
