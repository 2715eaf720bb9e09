"""Advantages against their definitions, by loops in NumPy, and the identities between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import advantages

pytestmark = pytest.mark.usefixtures("float64")


def on_arrays(function):
    """The function of NumPy's arrays, which are made JAX's while float64 is on."""

    def call(*args, **options):
        as_jax = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        return function(*map(jnp.asarray, args), **as_jax)

    return call


token_rewards, gae, leave_one_out, against_greedy, group, whiten = (
    on_arrays(getattr(advantages, name))
    for name in ("token_rewards", "gae", "leave_one_out", "against_greedy", "group", "whiten")
)

RNG = np.random.default_rng(0)
# Three responses one after the other, as in the table of a packed batch, then padding.
ENDS = np.array([0, 0, 1, 1, 0, 0, 0, 1, 0, 0], bool)
HERE = np.arange(10) < 8
REWARDS, VALUES = RNG.normal(size=(2, 4, 10))


def by_hand(rewards, values, gamma, lam):
    """The recursion, backwards, one response at a time."""
    found = np.zeros_like(rewards)
    for row in range(len(rewards)):
        for t in reversed(range(8)):
            following = 0.0 if ENDS[t] else values[row, t + 1]
            later = 0.0 if ENDS[t] else found[row, t + 1]
            surprise = rewards[row, t] + gamma * following - values[row, t]
            found[row, t] = surprise + gamma * lam * later
    return found


def padded(x):
    return jnp.asarray(np.where(HERE, x, np.nan))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.9, 1.0), (1.0, 0.0)])
def test_gae_is_its_recursion_whatever_the_padding_holds(gamma, lam):
    ends, here = (jnp.broadcast_to(x, REWARDS.shape) for x in (ENDS, HERE))
    found = jax.jit(lambda r, v: gae(r, v, ends, gamma=gamma, lam=lam, where=here))(
        padded(REWARDS), padded(VALUES)
    )
    expected = by_hand(REWARDS, VALUES, gamma, lam)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-9, atol=1e-9)
    returns = np.where(HERE, expected + VALUES, 0)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_1_the_critic_moves_only_the_baseline(gamma):
    ends, here = (jnp.broadcast_to(x, REWARDS.shape) for x in (ENDS, HERE))
    returns = advantages.discounted_returns(padded(REWARDS), ends, gamma=gamma, where=here)
    nothing = jnp.zeros_like(returns)
    for values in (nothing, padded(VALUES)):
        found = gae(padded(REWARDS), values, ends, gamma=gamma, lam=1.0, where=here)
        np.testing.assert_allclose(found.returns, returns, rtol=1e-9, atol=1e-9)
    # An exact critic is never surprised, whatever lambda is.
    exact = gae(padded(REWARDS), returns, ends, gamma=gamma, lam=0.3, where=here)
    np.testing.assert_allclose(exact.advantages, 0, atol=1e-9)


def test_a_response_cut_short_and_one_that_stops_are_both_over():
    """What follows an end along the axis, another response or padding, does not matter."""
    ends = jnp.array([False, True, False])
    for following in (0.0, 5.0, np.nan):
        values = jnp.array([1.0, 2.0, following])
        found = gae(jnp.array([0.0, 1.0, following]), values, ends, lam=1.0)
        np.testing.assert_allclose(found.advantages[:2], [0.0, -1.0], atol=1e-12)


def test_a_critic_gets_no_gradient_from_its_advantages():
    def total(values):
        return gae(jnp.ones(3), values, jnp.array([False, False, True])).advantages.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.ones(3)), 0)


def test_the_score_is_the_last_tokens_reward_and_the_kl_every_tokens():
    """Whatever scores stand elsewhere, and whatever the padding holds."""
    policy, reference = RNG.normal(size=(2, 4, 10))
    ends, here = (np.broadcast_to(x, REWARDS.shape) for x in (ENDS, HERE))
    scores = np.where(ends & here, REWARDS, np.nan)

    def of(policy):
        return token_rewards(scores, policy, padded(reference), ends, beta=0.3, where=here)

    found = of(padded(policy))
    expected = -0.3 * (policy - reference)
    for row, t in zip(*np.nonzero(ends & here), strict=True):
        expected[row, t] += REWARDS[row, t]
    np.testing.assert_allclose(found, np.where(HERE, expected, 0), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(jax.grad(lambda x: of(x).sum())(padded(policy)), 0)
    with pytest.raises(ValueError, match="token_rewards expected beta at least 0"):
        token_rewards(*np.zeros((3, 2)), np.ones(2, bool), beta=-0.1)


def test_reinforce_pp_whitens_the_returns_of_all_rows_together():
    ends, here = (jnp.broadcast_to(x, REWARDS.shape) for x in (ENDS, HERE))
    found = advantages.reinforce_pp(padded(REWARDS), ends, gamma=0.9, where=here)
    returns = by_hand(REWARDS, 0 * VALUES, 0.9, 1.0)[:, :8]
    expected = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(found[:, :8], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found[:, 8:], 0)


GROUPS = RNG.normal(size=(5, 4))
PRESENT = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)


def test_leave_one_out_is_its_definition():
    given = jnp.asarray(np.where(PRESENT, GROUPS, np.nan))
    found = leave_one_out(given, where=PRESENT)
    expected = np.zeros_like(GROUPS)
    for g, k in zip(*np.nonzero(PRESENT), strict=True):
        others = [GROUPS[g, j] for j in np.flatnonzero(PRESENT[g]) if j != k]
        expected[g, k] = GROUPS[g, k] - np.mean(others) if others else 0.0
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.sum(-1), 0, atol=1e-12)


def test_against_greedy_is_its_definition():
    greedy = GROUPS.mean(1)
    found = against_greedy(np.where(PRESENT, GROUPS, np.nan), greedy, where=PRESENT)
    np.testing.assert_allclose(found, np.where(PRESENT, GROUPS - greedy[:, None], 0), rtol=1e-9)
    same = against_greedy(np.repeat(greedy[:, None], 4, axis=1), greedy)
    np.testing.assert_array_equal(same, 0)


def test_groups_mean_holds_the_response_itself():
    """So that without scaling its advantages are (K - 1) / K of those that leave one out."""
    plain = group(GROUPS, scale="none")
    np.testing.assert_allclose(plain, 3 / 4 * leave_one_out(GROUPS), rtol=1e-9)
    scaled = group(GROUPS)
    deviation = GROUPS.std(axis=1, ddof=1, keepdims=True)
    np.testing.assert_allclose(scaled, plain / (deviation + 1e-4), rtol=1e-9)
    by_batch = group(GROUPS, scale="batch", epsilon=0.0)
    np.testing.assert_allclose(by_batch, plain / GROUPS.std(ddof=1), rtol=1e-9)
    with pytest.raises(ValueError, match="one of group, batch, none; got 'std'"):
        group(GROUPS, scale="std")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_absent_responses_do_not_matter_to_a_group(scale):
    given = jnp.asarray(np.where(PRESENT, GROUPS, np.nan))
    found = group(given, scale=scale, where=PRESENT)
    others = group(jnp.where(PRESENT, given, 7.0), scale=scale, where=PRESENT)
    np.testing.assert_array_equal(found, others)
    if scale != "batch":
        alone = group(jnp.asarray(GROUPS[1:2, [0, 1, 3]]), scale=scale)
        np.testing.assert_allclose(found[1, [0, 1, 3]], alone[0], rtol=1e-9)
    np.testing.assert_array_equal(found[3:], 0)


@pytest.mark.parametrize("function", [leave_one_out, group])
def test_a_constant_added_to_a_prompts_rewards_changes_nothing(function):
    shifted = GROUPS + RNG.normal(size=(5, 1))
    np.testing.assert_allclose(function(shifted), function(GROUPS), rtol=1e-9, atol=1e-12)


def test_whitened_values_have_mean_0_and_variance_1():
    given = jnp.asarray(np.where(PRESENT, 3 + 2 * GROUPS, np.nan))
    found = np.asarray(whiten(given, where=PRESENT))
    assert found[PRESENT].mean() == pytest.approx(0, abs=1e-9)
    assert found[PRESENT].var(ddof=1) == pytest.approx(1, rel=1e-6)
    assert (found[~PRESENT] == 0).all()
    kept = np.asarray(whiten(given, shift_mean=False, where=PRESENT))
    mean = (3 + 2 * GROUPS)[PRESENT].mean()
    np.testing.assert_allclose(kept[PRESENT], found[PRESENT] + mean, rtol=1e-9)


def distributions(seed, outcomes=6):
    logits = np.random.default_rng(seed).normal(size=(2, outcomes))
    return jax.nn.log_softmax(jnp.asarray(logits))


def test_two_estimates_have_the_kl_as_their_mean_and_two_are_never_negative():
    """Over all outcomes, weighted by the policy that samples them."""
    for seed in range(5):
        policy, other = distributions(seed)
        found = advantages.kl_estimates(policy, other)
        exact = float((jnp.exp(policy) * (policy - other)).sum())
        for name in ("k1", "k3"):
            mean = float((jnp.exp(policy) * getattr(found, name)).sum())
            assert mean == pytest.approx(exact, rel=1e-9), name
        assert (found.k2 >= 0).all()
        assert (found.k3 >= 0).all()
        assert (found.k1 < 0).any()


@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_discounts_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=rf"gae expected {name} at least 0 and at most 1; got 1.5"):
        gae(jnp.ones(2), jnp.ones(2), jnp.ones(2, bool), **{name: 1.5})
