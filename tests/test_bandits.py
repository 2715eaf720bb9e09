"""The bandit study against the published code's data sets, and against what can be said by hand."""

import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpref import bandits
from jaxpref.bandits import EQUAL_UPDATES, METHODS, Preferences

DATA = Path(os.environ.get("JAXPREF_DATA") or Path(__file__).parents[2] / "shared" / "data")

# Of the published code's seed 2021: parameters and gaps (by quadrature), DPO, RMB-PO, RMB-PO+.
OFFICIAL = {
    True: (
        [[26.8095202, 2.5064012], [9.1749139, 2.2207405], [8.4620682, 4.0677818]],
        [0.1078569, 0.1091826, 0.0825226],
    ),
    False: (
        [[-19.5267032, -16.8375471], [0.6919692, -20.2063755], [0.6438342, -20.5055846]],
        [0.4220159, 0.2551090, 0.2487581],
    ),
}
# Means and standard errors of gaps over many seeds, by an independent implementation:
# 1,350 seeds of the linear setting, 750 of the one with networks.
MANY = {
    True: {"dpo": (0.1059, 0.0033), "rmb_po": (0.0958, 0.0042), "rmb_po_plus": (0.0959, 0.0042)},
    False: {"dpo": (0.533, 0.0076), "rmb_po": (0.309, 0.0046), "rmb_po_plus": (0.299, 0.0042)},
    None: {
        "dpo": (0.472, 0.0072),
        "rmb_po": (0.404, 0.0081),
        "rmb_po_plus": (0.346, 0.0107),
        EQUAL_UPDATES: (0.348, 0.0105),
    },
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def file_of(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not there; set JAXPREF_DATA to its folder")
    return path


def solved(seed, matched):
    solve = jax.jit(partial(bandits.solve_linear, matched=matched))
    found = solve(*bandits.replay_linear(seed))
    return found, {name: bandits.linear_gap(x, matched=matched) for name, x in found.items()}


@pytest.mark.parametrize("matched", [True, False])
def test_the_published_linear_result_is_found(matched):
    params, gaps = solved(2021, matched)
    for name, expected, gap in zip(METHODS, *OFFICIAL[matched], strict=True):
        np.testing.assert_allclose(params[name], expected, atol=1e-3)
        assert float(gaps[name]) == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize("matched", [True, False])
def test_all_published_linear_results_are_found(matched):
    stored = json.loads(file_of("bandit-linear-official.json").read_text())
    for of_seed in stored["seeds"]:
        data, starts = bandits.replay_linear(of_seed["seed"])
        for name in Preferences._fields:
            np.testing.assert_array_equal(getattr(data, name), of_seed[name])
        psi = bandits.fit_linear_reward(data)
        np.testing.assert_allclose(psi, of_seed["reward_mle"], atol=1e-5)
        expected = of_seed["matched" if matched else "mismatched"]
        params, gaps = solved(of_seed["seed"], matched)
        for method in METHODS:
            np.testing.assert_array_equal(starts[method], of_seed["init"][method])
            np.testing.assert_allclose(params[method], expected["params"][method], atol=1e-3)
            assert float(gaps[method]) == pytest.approx(expected["gap_exact"][method], abs=1e-4)


def test_the_published_networks_are_found():
    stored = np.load(file_of("bandit-neural-official-2021.npz"))

    def layers(name, *numbers):
        # Stored as PyTorch does, outputs first.
        pairs = [(f"{name}.{i}.weight", f"{name}.{i}.bias") for i in numbers]
        return tuple(
            (jnp.asarray(stored[w].T, float), jnp.asarray(stored[b], float)) for w, b in pairs
        )

    def reward(name, *numbers):
        weight, bias = (stored[f"{name}.predict_layer.{part}"] for part in ("weight", "bias"))
        return bandits.RewardNetwork(
            layers(f"{name}.state_feature_extractor", *numbers),
            layers(f"{name}.action_feature_extractor", *numbers),
            ((jnp.asarray(weight.T, float), jnp.asarray(bias, float)),),
        )

    data = Preferences(*(jnp.asarray(stored[name]) for name in Preferences._fields))
    start = layers("policy_init.network", 0, 2, 4)
    found = jax.jit(bandits.solve_neural)(data, reward("reward_init", 0, 2), start)
    for ours, theirs in zip(
        jax.tree.leaves(found.reward), jax.tree.leaves(reward("reward_fit", 0, 2)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    states = jnp.asarray(stored["evaluation_states"], float)
    for method in METHODS:
        ours, theirs = (
            jax.nn.softmax(bandits.policy_logits(x, states))
            for x in (found.policies[method], layers(f"{method}.network", 0, 2, 4))
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_linear_task_is_the_published_one():
    uniform = bandits.linear_gap(jnp.zeros(2))
    assert float(uniform) == pytest.approx(1.2002729, abs=1e-6)
    # A policy that is nearly the best one.
    best = jnp.array([1.0, 2.0]) * 1e5
    assert 0 <= float(bandits.linear_gap(best)) < 1e-4
    assert float(bandits.linear_gap(best, matched=False)) > 0.1


def test_the_fitted_reward_is_the_maximum_of_the_likelihood():
    data, _ = bandits.replay_linear(2023)
    psi = bandits.fit_linear_reward(data)
    features = bandits.linear_features(data.states)
    rows = np.arange(len(data.states))
    difference = features[rows, data.preferred] - features[rows, data.rejected]
    gradient = (jax.nn.sigmoid(-difference @ psi)[:, None] * difference).mean(0)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


def test_a_separable_data_set_has_a_large_finite_reward():
    states = np.linspace(0.05, 0.95, 20)
    order = np.argsort(bandits.linear_rewards(jnp.asarray(states)), axis=1)
    data = Preferences(states, order[:, -1], order[:, 0], states[:0])
    psi = bandits.fit_linear_reward(data)
    assert np.isfinite(psi).all()
    assert np.linalg.norm(psi) > 50
    chosen, rejected = bandits._compared(bandits.linear_features(states) @ psi, data)
    assert (chosen > rejected).all()


def test_the_regularised_reward_has_its_optimum_where_it_is_known():
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
    beta = 0.3
    worth = partial(bandits.regularised_reward, rewards=rewards, beta=beta)
    best = rewards / beta
    np.testing.assert_allclose(jax.grad(worth)(best), 0, atol=1e-12)
    # The value there is beta times the logarithm of the mean of exp(reward / beta).
    value = beta * (jax.nn.logsumexp(best, axis=1) - np.log(4)).mean()
    assert float(worth(best)) == pytest.approx(float(value), rel=1e-12)
    assert float(worth(jnp.zeros((5, 4)))) == pytest.approx(float(rewards.mean()), rel=1e-12)


def test_actions_that_are_compared_differ_and_come_alike():
    pairs = np.asarray(bandits._pairs(jax.random.key(0), 12_000, 4))
    counts = np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16).reshape(4, 4)
    assert (np.diag(counts) == 0).all()
    assert stats.chisquare(counts[~np.eye(4, dtype=bool)]).pvalue > 1e-3


def test_with_networks_only_actions_matter_to_the_reward():
    """The state's part cancels in every pair, and one action is the best in all states."""
    data, truth, reward, policy, states = bandits.draw_neural(jax.random.key(3), evaluated=64)
    found = jax.jit(bandits.solve_neural)(data, reward, policy)
    for ours, before in zip(
        jax.tree.leaves(found.reward.state), jax.tree.leaves(reward.state), strict=True
    ):
        np.testing.assert_array_equal(ours, before)
    assert len(set(np.asarray(bandits.true_network_rewards(truth, states)).argmax(1))) == 1
    assert found.policies.keys() == {*METHODS, EQUAL_UPDATES}


@pytest.mark.long
@pytest.mark.parametrize("matched", [True, False, None], ids=["matched", "mismatched", "networks"])
def test_gaps_over_many_seeds_are_those_of_others(matched):
    study, at_once = bandits.neural_study, 4
    if matched is not None:
        study, at_once = partial(bandits.linear_study, matched=matched), 100
    keys = jax.random.split(jax.random.key(0), 1_000)
    gaps = jax.jit(lambda keys: jax.lax.map(study, keys, batch_size=at_once))(keys)
    for method, (mean, error) in MANY[matched].items():
        ours = np.asarray(gaps[method])
        own = ours.std(ddof=1) / len(ours) ** 0.5
        assert abs(ours.mean() - mean) < 3 * np.hypot(own, error), method
