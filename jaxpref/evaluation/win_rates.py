"""How often one policy's responses are preferred to another's: rates with intervals, as pure maths.

A score says how a prompt was judged: 1 where the first policy's response won, 0 where it lost, 1/2
for a tie, or anything between, such as a judge's probability. Where a prompt has several scores,
one a sample, their mean is its score. Intervals are bootstrap percentiles over prompts, since
prompts are what was drawn.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Scores `[prompts]` or `[prompts, samples]`; samples that are missing are NaN.
Scores = Float[np.ndarray, "_ ..."]

# So many numbers of a bootstrap are held at a time.
_HELD = 4_000_000
# A logistic fit of scores that a line separates has no optimum; coefficients end here.
_BOUND = 10.0
_NEWTON_STEPS = 50


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class WinRate(NamedTuple):
    """How often the first policy wins.

    Attributes:
      rate: mean score; a tie is half a win.
      interval: of the rate.
      wins: prompts with a score above 1/2.
      ties: with one of 1/2.
      losses: with one below.
    """

    rate: float
    interval: Interval
    wins: int
    ties: int
    losses: int


class Difference(NamedTuple):
    """By how much one win rate is above another on the same prompts."""

    difference: float
    interval: Interval


class BothOrders(NamedTuple):
    """What a judge says who was asked in both orders.

    Attributes:
      scores: of each prompt; a judge who contradicts himself calls a tie.
      position_bias: from -1 to 1: by how much a response's score is higher when it comes first.
    """

    scores: Float[np.ndarray, " prompts"]
    position_bias: float


class LengthControlled(NamedTuple):
    """A win rate as if all responses were as long as their rivals.

    Attributes:
      rate: the mean prediction at a length difference of 0.
      interval: of the rate.
      slope: of the logit per unit of `tanh(length difference / its standard deviation)`.
      bounded: whether the fit has no optimum, as where everything was won, so that its coefficients
        were held at a bound.
    """

    rate: float
    interval: Interval
    slope: float
    bounded: bool


class Agreement(NamedTuple):
    """How much two judges agree.

    Attributes:
      share: of the prompts with the same verdict.
      interval: of the share.
      kappa: Cohen's, the share above what verdicts in random order would share; 1 where both always
        say the same one thing.
      kappa_interval: of kappa.
    """

    share: float
    interval: Interval
    kappa: float
    kappa_interval: Interval


def win_rate(
    scores: Scores, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> WinRate:
    """The share of prompts that were won, with a tie as half of one.

    Args:
      scores: from 0 to 1.
      resamples: of the bootstrap.
      level: of the interval.
      seed: of the bootstrap.

    Raises:
      ValueError: there are fewer than 2 prompts, or a score is no number from 0 to 1.

    >>> found = win_rate(np.array([1.0, 1.0, 0.5, 0.0]))
    >>> found.rate, found.wins, found.ties, found.losses
    (0.625, 2, 1, 1)
    """
    values = _of_prompts("scores", scores)
    means = _bootstrap(len(values), resamples, seed, lambda counts: counts @ values / len(values))
    signs = np.sign(values - 0.5)
    wins, ties, losses = (int((signs == sign).sum()) for sign in (1, 0, -1))
    return WinRate(float(values.mean()), _interval(means, level), wins, ties, losses)


def difference(
    scores_a: Scores,
    scores_b: Scores,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The win rate of `scores_a` less that of `scores_b`, paired by prompt.

    Args:
      scores_a: from 0 to 1.
      scores_b: of the same prompts, in the same order.
      resamples: of the bootstrap.
      level: of the interval.
      seed: of the bootstrap.

    Raises:
      ValueError: the numbers of prompts differ, or see `win_rate`.
    """
    a, b = _of_prompts("scores_a", scores_a), _of_prompts("scores_b", scores_b)
    _check_alike(scores_a=a, scores_b=b)
    apart = a - b
    means = _bootstrap(len(a), resamples, seed, lambda counts: counts @ apart / len(a))
    return Difference(float(apart.mean()), _interval(means, level))


def both_orders(first: Scores, second: Scores) -> BothOrders:
    """Joins what a judge said in the two orders.

    Args:
      first: a response's scores when it came first.
      second: the same response's scores when it came second.

    Raises:
      ValueError: the numbers of prompts differ, or see `win_rate`.

    >>> both_orders(np.ones(2), np.zeros(2))  # A judge who always says "the first".
    BothOrders(scores=array([0.5, 0.5]), position_bias=1.0)
    """
    a, b = _of_prompts("first", first), _of_prompts("second", second)
    _check_alike(first=a, second=b)
    return BothOrders((a + b) / 2, float((a - b).mean()))


def length_controlled(
    scores: Scores,
    length_difference: Float[np.ndarray, " _"] | Int[np.ndarray, " _"],
    difficulty: Float[np.ndarray, " _"] | None = None,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> LengthControlled:
    """The win rate at equal lengths, by a logistic fit.

    Formula: $\\mathrm{logit}\\, E[score] = \\theta + \\phi \\tanh(d / s) + \\psi \\gamma$, where
    $d$ is a prompt's difference of lengths, $s$ its standard deviation and $\\gamma$ the prompt's
    difficulty; the rate is the mean over prompts of the prediction at $d = 0$. It is fitted anew in
    every resample.

    Source: Dubois et al. 2024, Length-Controlled AlpacaEval (arXiv 2404.04475).

    Args:
      scores: from 0 to 1.
      length_difference: the first response's length less the second's, in any unit.
      difficulty: of each prompt, in any unit, where it is known.
      resamples: of the bootstrap.
      level: of the interval.
      seed: of the bootstrap.

    Raises:
      ValueError: the numbers of prompts differ, something is not finite, or see `win_rate`.
    """
    values = _of_prompts("scores", scores)
    lengths = np.asarray(length_difference, float)
    given = {"length_difference": lengths}
    if difficulty is not None:
        given["difficulty"] = np.asarray(difficulty, float)
    _check_alike(scores=values, **given)
    for name, numbers in given.items():
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} should be finite; got {numbers[~np.isfinite(numbers)][0]}.")
    scaled = {name: _in_its_spread(x) for name, x in given.items()}
    scaled["length_difference"] = np.tanh(scaled["length_difference"])
    features = np.stack([np.ones_like(values), *scaled.values()], axis=1)
    at_equal = features.copy()
    at_equal[:, 1] = 0

    once = np.ones((1, len(values)))
    (fitted,) = _fit(features, values, once, np.zeros(features.shape[1]))

    def rates(counts: Float[np.ndarray, "resamples prompts"]) -> Float[np.ndarray, " resamples"]:
        predictions = _sigmoid(_fit(features, values, counts, fitted) @ at_equal.T)
        return (counts * predictions).sum(1) / len(values)

    (rate,) = rates(once)
    found = _bootstrap(len(values), resamples, seed, rates)
    bounded = bool((np.abs(fitted) >= _BOUND).any())
    return LengthControlled(float(rate), _interval(found, level), float(fitted[1]), bounded)


def agreement(
    verdicts_a: Scores,
    verdicts_b: Scores,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """How often two judges call the same winner, or both a tie.

    Args:
      verdicts_a: one judge's scores; above 1/2 the first response has won.
      verdicts_b: another's, of the same prompts.
      resamples: of the bootstrap.
      level: of the intervals.
      seed: of the bootstrap.

    Raises:
      ValueError: the numbers of prompts differ, or see `win_rate`.
    """
    a, b = _of_prompts("verdicts_a", verdicts_a), _of_prompts("verdicts_b", verdicts_b)
    _check_alike(verdicts_a=a, verdicts_b=b)
    of_a, of_b = ((np.sign(x - 0.5)[:, None] == [1, 0, -1]).astype(float) for x in (a, b))
    same = (of_a * of_b).sum(1)

    def both(counts: Float[np.ndarray, "resamples prompts"]) -> Float[np.ndarray, "resamples two"]:
        share = counts @ same / len(same)
        by_chance = ((counts @ of_a) * (counts @ of_b)).sum(1) / len(same) ** 2
        rest = 1 - by_chance
        kappa = np.where(rest > 0, (share - by_chance) / np.where(rest > 0, rest, 1), 1)
        return np.stack([share, kappa], axis=1)

    ((share, kappa),) = both(np.ones((1, len(same))))
    found = _bootstrap(len(same), resamples, seed, both)
    of_share, of_kappa = (_interval(column, level) for column in found.T)
    return Agreement(float(share), of_share, float(kappa), of_kappa)


def _of_prompts(name: str, scores: Scores) -> Float[np.ndarray, " prompts"]:
    """One score a prompt."""
    values = np.asarray(scores, float)
    if values.ndim not in (1, 2) or len(values) < 2:
        raise ValueError(
            f"{name} should have a score for each of at least 2 prompts, or one for each of their "
            f"samples; got an array of shape {values.shape}."
        )
    here = ~np.isnan(values)
    if values.ndim == 1:
        here, values = here[:, None], values[:, None]
    missing = np.flatnonzero(~here.any(1))
    if len(missing):
        raise ValueError(f"{name}: prompt {missing[0]} has no score; leave it out, and count it.")
    wrong = here & ~((values >= 0) & (values <= 1))
    if wrong.any():
        prompt, sample = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} should be from 0 to 1; prompt {prompt} has {values[prompt, sample]}."
        )
    return np.where(here, values, 0).sum(1) / here.sum(1)


def _check_alike(**columns: Float[np.ndarray, "..."]) -> None:
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected one number a prompt of the same prompts; got shapes {shapes}.")


def _in_its_spread(x: Float[np.ndarray, " prompts"]) -> Float[np.ndarray, " prompts"]:
    """In units of its own spread a coefficient is large or small whatever it is measured in.

    What is the same for all prompts is 0: it explains nothing, and beside an intercept it could
    not be told from it.
    """
    return x / x.std() if np.ptp(x) > 0 else np.zeros_like(x)


def _bootstrap(
    prompts: int, resamples: int, seed: int, statistic: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A statistic of how often each prompt is in a resample, for many resamples."""
    return np.concatenate([statistic(counts) for counts in _counts(prompts, resamples, seed)])


def _counts(prompts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "some prompts"]]:
    random = np.random.default_rng(seed)
    at_once = max(_HELD // prompts, 1)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = (
            random.integers(prompts, size=(count, prompts)) + prompts * np.arange(count)[:, None]
        )
        flat = np.bincount(drawn.ravel(), minlength=count * prompts)
        yield flat.reshape(count, prompts).astype(float)


def _interval(values: Float[np.ndarray, " resamples"], level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level should be between 0 and 1; got {level}.")
    return Interval(*map(float, np.quantile(values, [(1 - level) / 2, (1 + level) / 2])))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # Half of 1 plus tanh is as exact on both sides of 0.
    return (1 + np.tanh(x / 2)) / 2


def _fit(
    features: Float[np.ndarray, "prompts features"],
    scores: Float[np.ndarray, " prompts"],
    counts: Float[np.ndarray, "resamples prompts"],
    start: Float[np.ndarray, " features"],
) -> Float[np.ndarray, "resamples features"]:
    """Logistic fits, one a resample, by Newton's method; coefficients are bounded."""
    width = features.shape[1]
    products = (features[:, :, None] * features[:, None]).reshape(len(features), -1)
    fitted = np.tile(start, (len(counts), 1))
    for _ in range(_NEWTON_STEPS):
        predictions = _sigmoid(fitted @ features.T)
        gradient = (counts * (scores - predictions)) @ features
        curvature = (counts * predictions * (1 - predictions)) @ products
        # A column without variance, or a fit at its bound, has no curvature of its own.
        matrices = curvature.reshape(-1, width, width) + 1e-12 * np.eye(width)
        step = np.linalg.solve(matrices, gradient[..., None])[..., 0]
        # Far from the optimum a whole step may overshoot.
        step = np.clip(step, -2, 2)
        moved = np.clip(fitted + step, -_BOUND, _BOUND)
        change, fitted = np.abs(moved - fitted).max(), moved
        if change < 1e-10:
            break
    return fitted
