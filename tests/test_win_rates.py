"""Win rates against what is known by hand, by symmetry, and over many simulations."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy import special

from jaxpref.evaluation import win_rates
from jaxpref.evaluation.win_rates import (
    agreement,
    both_orders,
    difference,
    length_controlled,
    win_rate,
)

SCORES = st_numpy.arrays(float, st.integers(2, 30), elements=st.sampled_from([0.0, 0.5, 1.0]))


def judged(seed, prompts, *, slope=1.0, intercept=0.4, difficulty=None):
    """Wins and losses of a judge who likes long responses, and the differences of lengths."""
    random = np.random.default_rng(seed)
    lengths = random.normal(30, 100, prompts)
    logits = intercept + slope * np.tanh(lengths / lengths.std())
    if difficulty is not None:
        logits += 0.7 * difficulty
    probabilities = special.expit(logits)
    return (random.random(prompts) < probabilities).astype(float), lengths, probabilities


@settings(max_examples=50, deadline=None)
@given(SCORES)
def test_swapping_the_policies_mirrors_the_rate(scores):
    ours, theirs = (win_rate(x, resamples=50) for x in (scores, 1 - scores))
    assert ours.rate == pytest.approx(1 - theirs.rate, abs=1e-12)
    assert ours.interval.low == pytest.approx(1 - theirs.interval.high, abs=1e-12)
    assert ours.interval.low <= ours.interval.high
    assert (ours.wins, ours.ties, ours.losses) == (theirs.losses, theirs.ties, theirs.wins)
    assert ours.rate == pytest.approx((ours.wins + ours.ties / 2) / len(scores))


def test_samples_of_a_prompt_are_averaged_first():
    scores = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, 1.0], [0.0, np.nan, np.nan]])
    found = win_rate(scores)
    assert found.rate == 0.5
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    assert found == win_rate(np.array([0.5, 1.0, 0.0]))


def test_the_bootstrap_is_that_of_a_mean(monkeypatch):
    scores = np.random.default_rng(0).random(400)
    found = win_rate(scores, resamples=20_000)
    error = 1.96 * scores.std() / 20
    assert found.interval == pytest.approx((scores.mean() - error, scores.mean() + error), abs=2e-3)
    wider = win_rate(scores, resamples=20_000, level=0.99).interval
    assert wider.low < found.interval.low < found.interval.high < wider.high
    # However few resamples are held at a time.
    before = win_rate(scores, resamples=100)
    monkeypatch.setattr(win_rates, "_HELD", 400)
    assert win_rate(scores, resamples=100).interval == pytest.approx(before.interval)


def test_a_difference_is_paired():
    random = np.random.default_rng(0)
    base = random.random(300)
    better = np.minimum(base + 0.05, 1)
    found = difference(better, base)
    assert found.difference == pytest.approx((better - base).mean())
    # Apart, each rate is known to 0.03 only.
    assert 0.04 < found.interval.low < found.difference < found.interval.high < 0.06
    assert difference(base, base) == (0.0, (0.0, 0.0))


def test_a_judge_who_always_says_first_says_nothing():
    scores, bias = both_orders(np.ones(7), np.zeros(7))
    assert bias == 1
    assert win_rate(scores).rate == 0.5
    assert win_rate(scores).ties == 7
    scores, bias = both_orders(np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0]))
    assert scores.tolist() == [1, 0, 0.5]
    assert bias == pytest.approx(1 / 3)


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_length_control_recovers_the_model_it_assumes(with_difficulty):
    random = np.random.default_rng(1)
    difficulty = random.normal(size=200) if with_difficulty else None
    *_, lengths, probabilities = judged(0, 200, slope=1.3, difficulty=difficulty)
    found = length_controlled(probabilities, lengths, difficulty, resamples=50)
    at_equal = 0.4 if difficulty is None else 0.4 + 0.7 * difficulty
    assert found.rate == pytest.approx(special.expit(at_equal).mean(), abs=1e-9)
    assert found.slope == pytest.approx(1.3, abs=1e-8)
    assert not found.bounded
    # Who likes length rates the longer responses higher than that.
    assert probabilities.mean() > found.rate


def test_a_policy_against_itself_is_exactly_half():
    found = length_controlled(np.full(9, 0.5), np.zeros(9), np.arange(9.0))
    assert found == (0.5, (0.5, 0.5), 0.0, False)


def test_what_is_the_same_for_all_prompts_explains_nothing():
    scores = np.array([1.0, 1.0, 0.0, 0.5, 1.0])
    found = length_controlled(scores, np.full(5, 0.1), np.full(5, 3.0), resamples=50)
    assert found.rate == pytest.approx(0.7)
    assert found.slope == 0
    assert not found.bounded


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_swapping_the_policies_mirrors_the_controlled_rate(with_difficulty):
    scores, lengths, _ = judged(3, 80)
    difficulty = np.random.default_rng(1).normal(size=80) if with_difficulty else None
    ours = length_controlled(scores, lengths, difficulty, resamples=200)
    theirs = length_controlled(1 - scores, -lengths, difficulty, resamples=200)
    assert ours.rate == pytest.approx(1 - theirs.rate, abs=1e-9)
    assert ours.slope == pytest.approx(theirs.slope, abs=1e-8)
    assert ours.interval.low == pytest.approx(1 - theirs.interval.high, abs=1e-6)


def test_a_fit_without_an_optimum_is_bounded_and_says_so():
    lengths = np.linspace(-1, 2, 20)
    won = length_controlled(np.ones(20), lengths, resamples=50)
    assert won.bounded
    assert 0.9999 < won.rate <= 1
    separated = length_controlled((lengths > 0.3).astype(float), lengths, resamples=50)
    assert separated.bounded
    assert np.isfinite(separated.interval).all()


def test_agreement_is_cohens():
    random = np.random.default_rng(0)
    one, other = random.integers(0, 3, (2, 4_000)) / 2
    found = agreement(one, other)
    assert found.share == pytest.approx(1 / 3, abs=0.03)
    assert abs(found.kappa) < 0.04
    assert found.kappa_interval.low < 0 < found.kappa_interval.high
    assert agreement(one, one)[0::2] == (1.0, 1.0)
    assert agreement(np.ones(5), np.ones(5)).kappa == 1
    # 20 of 50 both say yes, 15 both say no: Cohen's kappa is 0.4.
    a = np.repeat([1.0, 1.0, 0.0, 0.0], [20, 5, 10, 15])
    b = np.repeat([1.0, 0.0, 1.0, 0.0], [20, 5, 10, 15])
    assert agreement(a, b).kappa == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: win_rate(np.ones(1)), r"at least 2 prompts.*shape \(1,\)"),
        (lambda: win_rate(np.array([0.5, 1.5])), "prompt 1 has 1.5"),
        (lambda: win_rate(np.array([0.5, np.nan])), "prompt 1 has no score"),
        (lambda: win_rate(np.ones(3), level=1.0), "between 0 and 1; got 1.0"),
        (lambda: difference(np.ones(3), np.ones(2)), "scores_b"),
        (lambda: both_orders(np.ones(3), np.ones(2)), r"\(3,\).*\(2,\)"),
        (lambda: agreement(np.ones(3), np.ones(2)), r"\(3,\).*\(2,\)"),
        (lambda: length_controlled(np.ones(3), np.ones(2)), "length_difference"),
        (lambda: length_controlled(np.ones(2), np.array([1, np.inf])), "finite; got inf"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.long
@pytest.mark.parametrize(("prompts", "least"), [(500, 0.92), (100, 0.89)])
def test_intervals_cover_what_they_should(prompts, least):
    """Over 1,000 simulations, plain and length-controlled."""
    covered = np.zeros(2)
    truth = np.mean([judged(seed, prompts)[2].mean() for seed in range(1_000)])
    for seed in range(1_000):
        scores, lengths, _ = judged(seed, prompts)
        plain = win_rate(scores, resamples=400, seed=seed).interval
        controlled = length_controlled(scores, lengths, resamples=400, seed=seed).interval
        covered += (
            plain.low <= truth <= plain.high,
            controlled.low <= special.expit(0.4) <= controlled.high,
        )
    assert (covered / 1_000 >= least).all()
    assert (covered / 1_000 <= 0.97).all()
