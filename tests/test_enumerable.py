"""Estimators of the policy gradient against the exact one, over all draws of two responses."""

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, in_float64, response_logps

from jaxpref import advantages, losses, packing
from jaxpref.evaluation import enumerable
from jaxpref.models import Decoder

pytestmark = pytest.mark.usefixtures("float64")

RNG = np.random.default_rng(0)
TASK = enumerable.default_task()
RESPONSES, REWARDS, BETA = TASK.responses, TASK.rewards, TASK.beta
HERE, ENDS, LENGTHS = RESPONSES.here, RESPONSES.ends, RESPONSES.lengths
# A policy away from the reference, errors of a critic for each prefix, and values of no policy.
LOGITS = TASK.reference_logits + RNG.normal(scale=0.5, size=TASK.reference_logits.shape)
ERRORS = RNG.normal(size=RESPONSES.prefix_count)
VALUES = RNG.normal(size=HERE.shape)
K = 2


def tokens_of(logits):
    return enumerable.tabular(logits, RESPONSES)


def policy(logits):
    return tokens_of(logits).sum(1)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def scores_by_hand():
    """The gradient of every token's log-prob: 1 at its logit, less the probabilities beside it."""
    found = np.zeros((*HERE.shape, *LOGITS.shape))
    for row, t in zip(*np.nonzero(HERE), strict=True):
        prefix = RESPONSES.prefixes[row, t]
        found[row, t, prefix] = -np.exp(log_softmax(LOGITS)[prefix])
        found[row, t, prefix, RESPONSES.tokens[row, t]] += 1
    return found.reshape(*HERE.shape, -1)


def greedy_by_hand():
    """Token by token, until the response ends."""
    taken = ()
    while len(taken) < HERE.shape[1] and 0 not in taken:
        begins = (RESPONSES.tokens[:, : len(taken)] == taken).all(1) & HERE[:, len(taken)]
        prefix = RESPONSES.prefixes[begins, len(taken)][0]
        taken += (int(LOGITS[prefix].argmax()),)
    return int(np.flatnonzero(begins & (RESPONSES.tokens[:, len(taken) - 1] == taken[-1]))[0])


LOGPS, REFERENCE = (
    np.where(HERE, log_softmax(x)[RESPONSES.prefixes, RESPONSES.tokens], 0)
    for x in (LOGITS, TASK.reference_logits)
)
LOG_RATIOS, CHANCES = LOGPS - REFERENCE, np.exp(LOGPS.sum(1))
SCORES, GREEDY = scores_by_hand(), greedy_by_hand()


def exact(beta=0.0):
    gradient = enumerable.exact_gradient(
        policy, jnp.asarray(LOGITS), REFERENCE.sum(1), REWARDS, beta=beta
    )
    return np.asarray(gradient).ravel()


def gradients(loss):
    """Of `loss(logps, drawn)`, for all pairs of responses."""
    return enumerable.all_gradients(loss, tokens_of, jnp.asarray(LOGITS), samples=K)


def reinforce(advantages_of, total=lambda losses, here: losses.sum(1).mean()):
    """REINFORCE with these advantages, `[samples, steps]`, of log-probs and what is drawn."""

    def loss(logps, drawn):
        here = jnp.asarray(HERE)[drawn]
        found = advantages_of(jax.lax.stop_gradient(logps), drawn)
        return total(losses.reinforce(logps[drawn], found, where=here), here)

    return loss


def rewards_of(scores, drawn, beta):
    """Of the tokens, with the KL as k1; which tokens are last, and which are there."""
    ends, here = jnp.asarray(ENDS)[drawn], jnp.asarray(HERE)[drawn]
    logps, reference = jnp.asarray(LOGPS)[drawn], jnp.asarray(REFERENCE)[drawn]
    scores = jnp.broadcast_to(scores[:, None], here.shape)
    rewards = advantages.token_rewards(scores, logps, reference, ends, beta=beta, where=here)
    return rewards, ends, here


def to_go(scores, drawn, beta=0.0):
    """Rewards from each token on."""
    rewards, ends, here = rewards_of(scores, drawn, beta)
    return advantages.discounted_returns(rewards, ends, where=here)


BASELINES = {
    "constant": lambda rewards, all_rewards: rewards - 3.0,
    "remax": lambda rewards, all_rewards: advantages.against_greedy(rewards, all_rewards[GREEDY]),
    "rloo": lambda rewards, all_rewards: advantages.leave_one_out(rewards),
    "grpo": lambda rewards, all_rewards: advantages.group(rewards, scale="none"),
    "grpo, scaled": lambda rewards, all_rewards: advantages.group(rewards),
}


def by(name, kl="none", rewards=REWARDS):
    """The advantages of an algorithm, with the KL of responses or of tokens in the reward."""
    beta = BETA if kl == "tokens" else 0.0
    if kl == "responses":
        rewards = rewards - BETA * LOG_RATIOS.sum(1)

    def found(logps, drawn):
        of_all = jnp.asarray(rewards)
        return to_go(BASELINES[name](of_all[drawn], of_all), drawn, beta)

    return found


def mean_by_hand(advantages_of):
    """The expected gradient of REINFORCE by its definition: a NumPy loop over all pairs."""
    total = np.zeros(SCORES.shape[-1])
    for pair in itertools.product(range(len(CHANCES)), repeat=K):
        drawn = list(pair)
        summed = np.einsum("kt,ktp->p", advantages_of(drawn), SCORES[drawn])
        total += CHANCES[drawn].prod() * summed / K
    return total


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def assert_biased(found, expected):
    assert np.linalg.norm(found - expected) > 0.02 * np.linalg.norm(expected)


def test_every_response_is_listed_once():
    def until_stop(tokens):
        return next((tokens[: t + 1] for t, token in enumerate(tokens) if token in (0, 2)), tokens)

    listed = enumerable.list_responses(vocabulary=4, steps=3, stops={0, 2})
    expected = {until_stop(tokens) for tokens in itertools.product(range(4), repeat=3)}
    found = [tuple(g.tolist()) for g in listed.group(np.array([1])).responses]
    assert found == sorted(expected)
    assert (listed.ends.sum(1) == 1).all()
    by_number = {}
    for response, places in zip(found, listed.prefixes, strict=True):
        for t in range(len(response)):
            assert by_number.setdefault(int(places[t]), response[:t]) == response[:t]
    assert len(set(by_number.values())) == len(by_number) == listed.prefix_count
    with pytest.raises(ValueError, match=r"stop tokens of the vocabulary; got .* stops=\[4\]"):
        enumerable.list_responses(vocabulary=4, steps=3, stops=[4])


def test_no_policy_is_better_than_the_optimum():
    """And each is worse by beta times its KL to it, so that the gradient there is 0."""
    reference = REFERENCE.sum(1)
    best = enumerable.optimum(reference, REWARDS, beta=BETA)
    for logits in (LOGITS, TASK.reference_logits, 3 * LOGITS):
        logps = policy(jnp.asarray(logits))
        assert float(jnp.exp(logps).sum()) == pytest.approx(1, rel=1e-12)
        value = enumerable.objective(logps, reference, REWARDS, beta=BETA).value
        kl = (jnp.exp(logps) * (logps - best.logps)).sum()
        assert float(best.value - value) == pytest.approx(BETA * float(kl), rel=1e-9)
    gradient = enumerable.exact_gradient(
        jax.nn.log_softmax, best.logps, reference, REWARDS, beta=BETA
    )
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    # A test of algorithms on this task asks something of them.
    start = enumerable.objective(reference, reference, REWARDS, beta=BETA).value
    assert start < 0.7 * best.value
    with pytest.raises(ValueError, match="optimum expected beta above 0"):
        enumerable.optimum(reference, REWARDS, beta=0.0)


def test_the_exact_gradient_is_the_mean_of_rewards_times_scores():
    np.testing.assert_allclose(tokens_of(LOGITS), LOGPS, rtol=1e-12)
    expected = CHANCES * (REWARDS - BETA * LOG_RATIOS.sum(1)) @ SCORES.sum(1)
    assert_equal(exact(BETA), expected)


def test_greedy_takes_the_likeliest_token_after_every_prefix():
    assert int(enumerable.greedy(tokens_of(LOGITS), RESPONSES)) == GREEDY
    # Of equals the lowest id, which is the stop token's.
    assert int(enumerable.greedy(tokens_of(0 * LOGITS), RESPONSES)) == 0


def test_exact_values_are_means_of_what_follows():
    found = np.asarray(enumerable.exact_values(VALUES, LOGPS, RESPONSES))
    for row, t in np.ndindex(*HERE.shape):
        same = (RESPONSES.prefixes[:, t] == RESPONSES.prefixes[row, t]) & HERE[:, t]
        mean = np.average(VALUES[same, t], weights=CHANCES[same]) if HERE[row, t] else 0.0
        assert found[row, t] == pytest.approx(mean, rel=1e-9, abs=1e-12)


def test_one_group_of_all_responses_is_a_decoders_distribution(tiny_params):
    """Its exact gradient comes out of one pass, and RLOO's mean is that gradient."""
    model = Decoder(dataclasses.replace(TINY, vocabulary_size=4, attention_block=128))
    # Away from the almost uniform start.
    params = {**tiny_params, "embedding": 10 * tiny_params["embedding"][:4]}
    model, params = in_float64(model, params)
    batch = packing.pack([RESPONSES.group(np.array([3, 1]))], row_length=120)
    rewards = jnp.asarray(REWARDS)

    @jax.jit
    def logps_of(params):
        return response_logps(model, params, batch)[0]

    def rloo(logps, drawn):
        return losses.reinforce(logps[drawn], advantages.leave_one_out(rewards[drawn])).mean()

    logps, to_params = jax.vjp(logps_of, params)
    assert float(jnp.exp(logps).sum()) == pytest.approx(1, rel=1e-12)
    found = enumerable.all_gradients(rloo, lambda logps: logps, logps, samples=K)
    assert float(found.chances.sum()) == pytest.approx(1, rel=1e-12)
    (mean,) = to_params(-found.mean)
    gradient = enumerable.exact_gradient(logps_of, params, logps, rewards, beta=0.0)
    jax.tree.map(assert_equal, mean, gradient)


@pytest.mark.parametrize("kl", ["none", "responses", "tokens"])
@pytest.mark.parametrize("name", ["constant", "remax", "rloo"])
def test_the_mean_gradient_over_all_draws_is_the_exact_one(name, kl):
    found = gradients(reinforce(by(name, kl)))
    assert_equal(-found.mean, exact(0.0 if kl == "none" else BETA))


def test_without_scaling_grpos_mean_gradient_is_a_share_of_the_exact_one():
    """Its group's mean holds the response itself; the KL of tokens has no part in that."""
    share = (K - 1) / K
    assert_equal(-gradients(reinforce(by("grpo"))).mean, share * exact())
    found = gradients(reinforce(by("grpo", "responses"))).mean
    assert_equal(-found, share * exact(BETA))
    found = gradients(reinforce(by("grpo", "tokens"))).mean
    assert_equal(-found, share * exact() + (exact(BETA) - exact()))


def ppo(advantages_of):
    """One update of PPO: the policy is still the one that sampled."""

    def loss(logps, drawn):
        here, old = jnp.asarray(HERE)[drawn], jax.lax.stop_gradient(logps)
        found = losses.ppo(logps[drawn], old[drawn], advantages_of(old, drawn), where=here)
        return found.losses.sum(1).mean()

    return loss


def with_critic(values, lam):
    """GAE's advantages with the tokens' KL in the reward."""

    def found(logps, drawn):
        rewards, ends, here = rewards_of(jnp.asarray(REWARDS)[drawn], drawn, BETA)
        return advantages.gae(rewards, values[drawn], ends, lam=lam, where=here).advantages

    return found


@pytest.mark.parametrize(
    ("lam", "wrong"), [(0.0, False), (0.5, False), (1.0, True), (0.5, True), (0.0, True)]
)
def test_ppos_mean_gradient_is_off_by_the_critics_error_if_lambda_is_below_1(lam, wrong):
    """Exact with lambda 1 and any critic, and with an exact critic and any lambda."""
    returns = to_go(jnp.asarray(REWARDS), jnp.arange(len(CHANCES)), BETA)
    values = enumerable.exact_values(returns, LOGPS, RESPONSES)
    errors = np.where(HERE & wrong, ERRORS[RESPONSES.prefixes], 0)
    found = gradients(ppo(with_critic(values + errors, lam))).mean
    bias = np.zeros_like(LOGPS)
    for row, t in np.ndindex(*HERE.shape):
        later = errors[row, t + 1 :]
        bias[row, t] = (1 - lam) * (later * lam ** np.arange(len(later))).sum()
    bias = np.einsum("r,rt,rtp->p", CHANCES, bias, SCORES)
    assert_equal(-found, exact(BETA) + bias)
    if wrong and lam < 1:
        assert_biased(-found, exact(BETA))


def test_ppo_with_one_update_is_reinforce_in_every_draw():
    found = with_critic(jnp.asarray(VALUES), 0.95)
    assert_equal(gradients(ppo(found)).values, gradients(reinforce(found)).values)


def whitened(values, here):
    values = values - values[here].mean()
    return np.where(here, values / np.sqrt(values[here].var(ddof=1) + 1e-8), 0)


def returns_by_hand(drawn):
    """The score less the KL of the tokens from each one on."""
    later = LOG_RATIOS[drawn][:, ::-1].cumsum(1)[:, ::-1]
    return np.where(HERE[drawn], REWARDS[drawn][:, None] - BETA * later, 0)


def whitened_rloo(logps, drawn):
    return advantages.whiten(by("rloo")(logps, drawn), where=jnp.asarray(HERE)[drawn])


def reinforce_pp(logps, drawn):
    rewards, ends, here = rewards_of(jnp.asarray(REWARDS)[drawn], drawn, BETA)
    return advantages.reinforce_pp(rewards, ends, where=here)


def centred(drawn):
    return REWARDS[drawn] - REWARDS[drawn].mean()


# The loss; REINFORCE's advantages by hand that give the same; what an unbiased one would have.
BIASED = {
    "std": (
        reinforce(by("grpo, scaled")),
        lambda drawn: HERE[drawn] * (centred(drawn) / (REWARDS[drawn].std(ddof=1) + 1e-4))[:, None],
        0.0,
    ),
    "whitened": (
        reinforce(whitened_rloo),
        lambda drawn: whitened(HERE[drawn] * K / (K - 1) * centred(drawn)[:, None], HERE[drawn]),
        0.0,
    ),
    "reinforce_pp": (
        reinforce(reinforce_pp),
        lambda drawn: whitened(returns_by_hand(drawn), HERE[drawn]),
        BETA,
    ),
    "per response": (
        reinforce(by("rloo"), lambda losses, here: (losses.sum(1) / here.sum(1)).mean()),
        lambda drawn: (K / (K - 1) * centred(drawn) / LENGTHS[drawn])[:, None] * HERE[drawn],
        0.0,
    ),
    "per token": (
        reinforce(by("rloo"), lambda losses, here: losses.sum() / here.sum()),
        lambda drawn: K**2 / (K - 1) * centred(drawn)[:, None] / LENGTHS[drawn].sum() * HERE[drawn],
        0.0,
    ),
}


@pytest.mark.parametrize("name", BIASED)
def test_what_is_biased_has_the_mean_of_its_own_formula(name):
    """And points elsewhere than the exact gradient: no step size makes it that."""
    loss, advantages_of, beta = BIASED[name]
    found = -np.asarray(gradients(loss).mean)
    assert_equal(found, mean_by_hand(advantages_of))
    cosine = found @ exact(beta) / np.linalg.norm(found) / np.linalg.norm(exact(beta))
    assert cosine < 0.999


def gradient_of(function):
    return np.asarray(jax.grad(function)(jnp.asarray(LOGITS))).ravel()


def kl(logits, forward=True):
    """Of responses: KL(policy, reference), or the other way round."""
    logps, reference = policy(logits), jnp.asarray(REFERENCE.sum(1))
    p, q = (logps, reference) if forward else (reference, logps)
    return (jnp.exp(p) * (p - q)).sum()


def kl_of_tokens(logits, forward=True):
    """The same of the tokens, whose prefixes are as sampled."""
    often = np.bincount(RESPONSES.prefixes[HERE], (CHANCES[:, None] * HERE)[HERE])
    logps, reference = (jax.nn.log_softmax(x) for x in (logits, TASK.reference_logits))
    p, q = (logps, reference) if forward else (reference, logps)
    return (often[:, None] * jnp.exp(p) * (p - q)).sum()


# The functions whose gradients estimates of the KL have in a loss, in expectation.
IN_LOSS = {
    "k1 of responses": lambda logits: 0 * logits.sum(),
    "k1 of tokens": lambda logits: 0 * logits.sum(),
    "k2 of responses": kl,
    "k2 of tokens": kl_of_tokens,
    "k3 of responses": lambda logits: kl(logits, forward=False),
    "k3 of tokens": lambda logits: kl_of_tokens(logits, forward=False),
}


def estimates(name, logps, drawn):
    """Of the responses that are drawn, at their last tokens, or of their tokens."""
    field, _, what = name.split()
    ours, theirs = logps[drawn], jnp.asarray(REFERENCE)[drawn]
    if what == "tokens":
        return getattr(advantages.kl_estimates(ours, theirs), field)
    ours, theirs = ours.sum(1, keepdims=True), theirs.sum(1, keepdims=True)
    return getattr(advantages.kl_estimates(ours, theirs), field) * jnp.asarray(ENDS)[drawn]


def mean_estimate(name, logits):
    logps = tokens_of(logits)
    found = estimates(name, logps, jnp.arange(len(logps))).sum(1)
    return (jnp.exp(logps.sum(1)) * found).sum()


@pytest.mark.parametrize("name", IN_LOSS)
def test_what_an_estimate_of_the_kl_does_in_a_loss(name):
    """Its gradient is that of another function than its mean; see `advantages.kl_estimates`."""
    found = gradients(lambda logps, drawn: estimates(name, logps, drawn).sum(1).mean()).mean
    expected = gradient_of(IN_LOSS[name])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    if name != "k2 of responses":
        assert_biased(found, gradient_of(kl))


@pytest.mark.parametrize("name", IN_LOSS)
def test_what_an_estimate_of_the_kl_does_in_the_reward(name):
    """There it has the gradient of its mean, less the one that it has in a loss."""

    def minus_later(logps, drawn):
        ends, here = jnp.asarray(ENDS)[drawn], jnp.asarray(HERE)[drawn]
        return advantages.discounted_returns(-estimates(name, logps, drawn), ends, where=here)

    found = np.asarray(gradients(reinforce(minus_later)).mean)
    mean = lambda logits: mean_estimate(name, logits)  # noqa: E731
    assert_equal(found, gradient_of(mean) - gradient_of(IN_LOSS[name]))
    if name.startswith("k1"):
        assert_equal(found, gradient_of(kl))
    else:
        assert_biased(found, gradient_of(kl))
    # k1 and k3 are unbiased as values all the same.
    exact_kl = kl(jnp.asarray(LOGITS))
    assert name.startswith("k2") != np.isclose(mean(jnp.asarray(LOGITS)), exact_kl, rtol=1e-9)


@pytest.mark.parametrize("name", ["remax", "rloo", "grpo", "grpo, scaled"])
def test_a_constant_added_to_the_rewards_changes_no_gradient(name):
    plain, shifted = (
        gradients(reinforce(by(name, rewards=rewards))).values for rewards in (REWARDS, REWARDS + 7)
    )
    np.testing.assert_allclose(shifted, plain, rtol=1e-9, atol=1e-9)


def test_a_sample_that_is_the_greedy_response_has_no_gradient_in_remax():
    count = len(CHANCES)
    by_draw = np.asarray(gradients(reinforce(by("remax"))).values).reshape(count, count, -1)
    assert (by_draw[GREEDY, GREEDY] == 0).all()
    others = np.delete(np.arange(count), GREEDY)
    # A draw of the greedy response and another one has half the gradient of the other one twice.
    assert_equal(by_draw[GREEDY, others], by_draw[others, others] / 2)
    assert (np.abs(by_draw[others, others]).sum(1) > 0.01).all()


BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "policy_gradients.py"


def test_shifted_rewards_raise_the_variance_of_reinforce_alone():
    """Of its gradient while its baseline has not moved; centred rewards order them otherwise."""
    spec = importlib.util.spec_from_file_location("policy_gradients", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.variances((0.0, 3.0, 10.0))
    plain = found.pop("REINFORCE, baseline not moved")
    for name, (centred, *shifted) in found.items():
        assert shifted == pytest.approx([centred] * 2, rel=1e-9), name
        assert (np.array(plain[1:]) > 2 * centred).all(), name
    assert plain[0] == pytest.approx(found["REINFORCE, baseline settled"][0], rel=1e-9)
    assert plain[0] < min(found["RLOO"][0], found["ReMax"][0])
