"""Best of N and the frontier of reward and KL against all samples and all responses, listed."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.evaluation import (
    best_reward,
    enumerable,
    exact_best_of_n,
    expected_best,
    gain_share,
    kl_bound,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def task(seed=0, responses=12):
    random = np.random.default_rng(seed)
    logps = np.log(random.dirichlet(np.ones(responses)))
    # A few responses are worth the same.
    return logps, random.integers(0, responses // 2, responses).astype(float)


def kl_of(logps, reference):
    return enumerable.objective(logps, reference, np.zeros(len(logps)), beta=0.0).kl


@pytest.mark.parametrize("with_proxy", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_the_expected_best_is_the_mean_over_all_choices(n, with_proxy):
    random = np.random.default_rng(n)
    rewards = random.normal(size=(3, 6))
    proxy = random.integers(0, 4, (3, 6)).astype(float) if with_proxy else rewards
    found = expected_best(rewards, n, proxy if with_proxy else None)
    for prompt in range(3):
        values = []
        for chosen in itertools.combinations(range(6), n):
            of = np.array(chosen)
            best = of[proxy[prompt, of] == proxy[prompt, of].max()]
            values.append(rewards[prompt, best].mean())
        assert found[prompt] == pytest.approx(np.mean(values))


def test_many_samples_are_no_trouble():
    rewards = np.random.default_rng(0).normal(size=(2, 2_000))
    assert np.isfinite(expected_best(rewards, 1_000)).all()
    np.testing.assert_allclose(expected_best(rewards, 2_000), rewards.max(1))
    np.testing.assert_allclose(expected_best(rewards, 1), rewards.mean(1))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_is_what_all_draws_say(n):
    logps, rewards = task(responses=6)
    chances = np.exp(logps)
    expected = np.zeros(6)
    for draw in itertools.product(range(6), repeat=n):
        best = max(rewards[list(draw)])
        winners = [i for i in draw if rewards[i] == best]
        for i in winners:
            expected[i] += np.prod(chances[list(draw)]) / len(winners)
    np.testing.assert_allclose(np.exp(exact_best_of_n(logps, rewards, n)), expected, atol=1e-12)


def test_the_estimate_meets_the_exact_value():
    logps, rewards = task(responses=60)
    random = np.random.default_rng(1)
    drawn = rewards[random.choice(len(rewards), (4_000, 16), p=np.exp(logps))]
    for n in (1, 4, 12):
        exact = float((np.exp(exact_best_of_n(logps, rewards, n)) * rewards).sum())
        found = expected_best(drawn, n)
        assert found.std() > 0
        assert abs(found.mean() - exact) < 3 * found.std() / len(found) ** 0.5


def test_the_kl_of_best_of_n_is_below_its_bound():
    logps, rewards = task()
    for n in (1, 2, 8, 64, 4_096):
        kl = float(kl_of(exact_best_of_n(logps, rewards, n), logps))
        assert -1e-12 <= kl <= kl_bound(n) + 1e-12
    # Where no two responses are alike and each is rare, the bound is nearly the KL.
    uniform = np.full(1_000, -math.log(1_000))
    kl = float(kl_of(exact_best_of_n(uniform, np.arange(1_000.0), 4), uniform))
    assert kl == pytest.approx(kl_bound(4), rel=1e-2)


def test_what_is_no_number_of_samples_is_refused():
    rewards = np.zeros((2, 3))
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"from 1 to the 3 samples of a prompt; got {n}"):
            expected_best(rewards, n)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        expected_best(rewards, 1, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least 1; got 0"):
        kl_bound(0)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        exact_best_of_n(*task(), 0)


def test_the_frontier_is_made_of_optima():
    logps, rewards = task()
    for beta in (0.1, 0.5, 3.0):
        best = enumerable.optimum(logps, rewards, beta=beta)
        worth = enumerable.objective(best.logps, logps, rewards, beta=beta)
        found = best_reward(worth.kl, logps, rewards)
        assert float(found) == pytest.approx(float(worth.reward), abs=1e-8)
        assert float(gain_share(worth.reward, worth.kl, logps, rewards)) == pytest.approx(1)


def test_the_ends_of_the_frontier():
    logps, rewards = task()
    mean = (np.exp(logps) * rewards).sum()
    kls = jnp.array([[0.0, 0.01], [0.1, 50.0]])
    found = best_reward(kls, logps, rewards)
    assert found.shape == (2, 2)
    assert float(found[0, 0]) == pytest.approx(mean, abs=1e-6)
    assert float(found[1, 1]) == pytest.approx(rewards.max(), abs=1e-6)
    assert (np.diff(np.asarray(found).ravel()) > 0).all()
    assert float(gain_share(mean, 0.5, logps, rewards)) == pytest.approx(0, abs=1e-12)
    # Rewards that are all alike leave nothing to gain.
    assert float(gain_share(2.0, 1.0, logps, np.full(12, 2.0))) == 1


def test_best_of_n_gains_less_than_its_kl_allows():
    logps, rewards = task(3)
    for n in (2, 8, 32):
        best = exact_best_of_n(logps, rewards, n)
        worth = enumerable.objective(best, logps, rewards, beta=0.0)
        share = gain_share(worth.reward, worth.kl, logps, rewards)
        assert 0.8 < float(share) < 1
