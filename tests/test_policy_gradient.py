"""Policy-gradient losses by hand on both sides of their bounds, and the identities between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref import losses

pytestmark = pytest.mark.usefixtures("float64")


def on_arrays(function):
    """The function of NumPy's arrays, which are made JAX's while float64 is on."""

    def call(*args, **options):
        as_jax = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        return function(*map(jnp.asarray, args), **as_jax)

    return call


reinforce, ppo, cispo, gspo, clipped_value, aggregate = (
    on_arrays(getattr(losses, name))
    for name in ("reinforce", "ppo", "cispo", "gspo", "clipped_value", "aggregate")
)

RNG = np.random.default_rng(1)
OLD, NEW, ADVANTAGES = RNG.normal(size=(3, 3, 5))
OLD, NEW = OLD - 3, OLD - 3 + 0.3 * NEW


def by_hand(loss, ratio, advantage, value, gradient, clipped):
    """Compares a loss of log-probs with its values by hand, at this ratio to the old policy."""
    logp = jnp.log(0.1 * jnp.float64(ratio))
    out = loss(logp, jnp.log(0.1), jnp.float64(advantage))
    assert float(out.losses) == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert bool(out.clipped) == clipped
    found = jax.grad(lambda x: loss(x, jnp.log(0.1), jnp.float64(advantage)).losses)(logp)
    assert float(found) == pytest.approx(gradient, rel=1e-9, abs=1e-12)
    return out


# A ratio just inside and outside each bound, 0.8 and 1.3, or far from both; the sign of the
# advantage; the ratio that the loss takes, and whether it is clipped, so that no gradient is left.
SIDES = [
    (1.0, +1, 1.0, False),
    (1.299, +1, 1.299, False),
    (1.301, +1, 1.3, True),
    (0.801, +1, 0.801, False),
    (0.799, +1, 0.799, False),
    (0.2, +1, 0.2, False),
    (1.299, -1, 1.299, False),
    (1.301, -1, 1.301, False),
    (9.0, -1, 9.0, False),
    (0.801, -1, 0.801, False),
    (0.799, -1, 0.8, True),
    (7.0, 0, 7.0, False),
]


@pytest.mark.parametrize(("ratio", "sign", "taken", "clipped"), SIDES)
def test_ppo_on_both_sides_of_its_bounds(ratio, sign, taken, clipped):
    advantage = 2.0 * sign
    out = by_hand(
        lambda *x: ppo(*x, clip=0.2, clip_high=0.3),
        ratio,
        advantage,
        value=-advantage * taken,
        gradient=0.0 if clipped else -advantage * ratio,
        clipped=clipped,
    )
    assert float(out.ratios) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize(("ratio", "sign", "taken", "clipped"), SIDES)
def test_gspo_on_both_sides_of_its_bounds(ratio, sign, taken, clipped):
    """Of three tokens: the response's own ratio is the third power, the gradient a third."""
    advantage = 2.0 * sign
    out = by_hand(
        lambda logps, old, a: gspo(logps, old, jnp.array(3), a, clip=0.2, clip_high=0.3),
        ratio**3,
        advantage,
        value=-advantage * taken,
        gradient=0.0 if clipped else -advantage * ratio / 3,
        clipped=clipped,
    )
    assert float(out.ratios) == pytest.approx(ratio, rel=1e-9)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.001, 1.0, 4.999, 5.001, 9.9])
def test_cispo_on_both_sides_of_its_bound(ratio, advantage):
    """The weight is bounded above alone, and every token keeps its gradient."""
    weight = min(ratio, 5.0) * advantage
    by_hand(
        lambda *x: cispo(*x, largest=5.0),
        ratio,
        advantage,
        value=-weight * np.log(0.1 * ratio),
        gradient=-weight,
        clipped=ratio > 5,
    )


def test_at_the_old_policy_ppo_and_cispo_are_reinforce():
    def gradient(loss):
        return jax.grad(lambda x: loss(x).sum())(jnp.asarray(OLD))

    expected = gradient(lambda x: reinforce(x, ADVANTAGES))
    np.testing.assert_allclose(expected, -ADVANTAGES, rtol=1e-12)
    for loss in (ppo, cispo):
        found = gradient(lambda x, loss=loss: loss(x, OLD, ADVANTAGES).losses)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(ppo(OLD, OLD, ADVANTAGES).losses, -ADVANTAGES, rtol=1e-12)


def test_a_sequences_ratio_is_the_geometric_mean_of_its_tokens():
    lengths = jnp.array([5, 3, 1])
    here = np.arange(5) < np.asarray(lengths)[:, None]
    new, old = (jnp.where(here, jnp.asarray(x), 0).sum(1) for x in (NEW, OLD))
    out = gspo(new, old, lengths, ADVANTAGES[:, 0])
    ratios = np.exp(NEW - OLD)
    expected = [np.prod(ratios[i, :n]) ** (1 / n) for i, n in enumerate((5, 3, 1))]
    np.testing.assert_allclose(out.ratios, expected, rtol=1e-9)
    # One token is its own sequence.
    one = gspo(NEW[:, 0], OLD[:, 0], jnp.ones(3, int), ADVANTAGES[:, 0], clip=0.2)
    token = ppo(NEW[:, 0], OLD[:, 0], ADVANTAGES[:, 0], clip=0.2, clip_high=4e-4)
    np.testing.assert_allclose(one.losses, token.losses, rtol=1e-9)


# The old value is 1, the bounds are 0.8 and 1.2: a value just inside and outside each, or far from
# it; the return; the value that the loss takes, and whether it is clipped.
@pytest.mark.parametrize(
    ("value", "returned", "taken", "clipped"),
    [
        (1.199, 3.0, 1.199, False),
        (1.201, 3.0, 1.2, True),
        (0.801, 3.0, 0.801, False),
        (0.799, 3.0, 0.799, False),
        (1.199, 0.0, 1.199, False),
        (1.201, 0.0, 1.201, False),
        (0.801, 0.0, 0.801, False),
        (0.799, 0.0, 0.8, True),
        (1.5, 0.0, 1.5, False),
        (-2.0, 0.0, -2.0, False),
    ],
)
def test_clipped_value_on_both_sides_of_its_bounds(value, returned, taken, clipped):
    def of(x, clip=0.2):
        return clipped_value(x, jnp.float64(1), jnp.float64(returned), clip=clip)

    value = jnp.float64(value)
    out = of(value)
    assert float(out.losses) == pytest.approx((taken - returned) ** 2 / 2, rel=1e-9)
    assert bool(out.clipped) == clipped
    gradient = float(jax.grad(lambda x: of(x).losses)(value))
    assert gradient == pytest.approx(0.0 if clipped else float(value) - returned, rel=1e-9)
    plain = of(value, clip=float("inf")).losses
    assert float(plain) == pytest.approx((float(value) - returned) ** 2 / 2, rel=1e-9)


def test_a_samplers_weight_is_the_ratio_up_to_its_cap():
    """Below the cap the mean of what is sampled, times its weight, is that under the policy."""
    policy, sampler = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(2, 6))))
    values = RNG.normal(size=6)

    def mean(largest):
        weights = losses.weighting.truncated_importance(policy, sampler, largest=largest)
        return weights, float((jnp.exp(sampler) * weights * values).sum())

    ratios = np.exp(np.asarray(policy - sampler))
    weights, found = mean(ratios.max() + 1)
    np.testing.assert_allclose(weights, ratios, rtol=1e-9)
    assert found == pytest.approx(float((jnp.exp(policy) * values).sum()), rel=1e-9)
    for largest in (float(np.sort(ratios)[3]) + 1e-3, float(np.sort(ratios)[3]) - 1e-3):
        np.testing.assert_allclose(mean(largest)[0], np.minimum(ratios, largest), rtol=1e-9)
    here = np.arange(6) < 4
    masked = on_arrays(losses.weighting.truncated_importance)(
        np.where(here, policy, np.nan), sampler, where=here
    )
    np.testing.assert_allclose(masked, np.where(here, np.minimum(ratios, 2), 0), rtol=1e-9)
    total = lambda *logps: losses.weighting.truncated_importance(*logps).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(total, argnums=(0, 1))(policy, sampler), 0)
    with pytest.raises(ValueError, match="truncated_importance expected largest above 0"):
        losses.weighting.truncated_importance(policy, sampler, largest=0.0)


EACH = {
    "reinforce": lambda new, old, a, **k: reinforce(new, a, **k),
    "ppo": lambda new, old, a, **k: ppo(new, old, a, **k).losses,
    "cispo": lambda new, old, a, **k: cispo(new, old, a, **k).losses,
    "gspo": lambda new, old, a, **k: (
        gspo(new, old, jnp.full(new.shape, 4), a, clip=0.1, **k).losses
    ),
    "clipped_value": lambda new, old, a, **k: clipped_value(new, old, a, **k).losses,
}


@pytest.mark.parametrize("name", EACH)
def test_what_is_masked_counts_for_nothing_even_if_it_is_nan(name):
    loss, here = EACH[name], np.arange(5) < np.array([[5], [2], [0]])
    inputs = [np.where(here, x, np.nan) for x in (NEW, OLD, ADVANTAGES)]
    found = loss(*inputs, where=here)
    kept = loss(NEW, OLD, ADVANTAGES)
    np.testing.assert_array_equal(found, np.where(here, kept, 0))
    gradient = jax.grad(lambda x: loss(x, *inputs[1:], where=here).sum())(inputs[0])
    whole = jax.grad(lambda x: loss(x, OLD, ADVANTAGES).sum())(NEW)
    np.testing.assert_array_equal(gradient, np.where(here, whole, 0))


@pytest.mark.parametrize("name", EACH)
def test_only_the_policy_or_the_critic_has_a_gradient(name):
    loss = EACH[name]
    for place in (1, 2):
        inputs = [jnp.asarray(x) for x in (NEW, OLD, ADVANTAGES)]

        def total(x, place=place, inputs=inputs):
            given = [*inputs[:place], x, *inputs[place + 1 :]]
            return loss(*given).sum()

        np.testing.assert_array_equal(jax.grad(total)(inputs[place]), 0)
    if name != "cispo":
        # Its weight has no gradient, so that finite differences see another function.
        check_grads(lambda x: loss(x, OLD, ADVANTAGES).sum(), (jnp.asarray(NEW),), 1, rtol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_under_jit_in_bfloat16_and_at_extreme_log_probs(name):
    loss = EACH[name]
    plain = loss(NEW, OLD, ADVANTAGES)
    np.testing.assert_allclose(jax.jit(loss)(NEW, OLD, ADVANTAGES), plain, rtol=1e-9)
    low = loss(*(jnp.asarray(x, jnp.bfloat16) for x in (NEW, OLD, ADVANTAGES)))
    assert low.dtype == jnp.float32
    far = jnp.full((3, 5), -1e4)
    found, gradient = jax.value_and_grad(lambda x: loss(x, far, ADVANTAGES).sum())(far - 50)
    assert np.isfinite(found)
    assert np.isfinite(gradient).all()


def test_wrong_shapes_and_bounds_are_refused():
    with pytest.raises(ValueError, match="ppo expected inputs of one shape"):
        on_arrays(losses.ppo.__wrapped__)(NEW, OLD[:1], ADVANTAGES)
    for clip in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="ppo expected clip above 0"):
            ppo(NEW, OLD, ADVANTAGES, clip=clip)
    with pytest.raises(ValueError, match="cispo expected largest above 0"):
        cispo(NEW, OLD, ADVANTAGES, largest=0.0)


# The loss of a batch, of the losses of each response's tokens.
BATCH = {
    "sum": lambda tokens: np.mean([np.sum(t) for t in tokens]),
    "response": lambda tokens: np.mean([np.mean(t) for t in tokens]),
    "token": lambda tokens: np.mean(np.concatenate(tokens)),
    "constant": lambda tokens: np.mean([np.sum(t) / 7 for t in tokens]),
}
LENGTHS = np.array([[3, 1], [0, 5], [2, 0], [7, 4]])


def total(aggregated):
    return (aggregated.values * aggregated.weights).sum() / aggregated.weights.sum()


@pytest.mark.parametrize("how", BATCH)
def test_aggregated_losses_are_their_formula_whatever_shares_a_micro_batch(how):
    """Absent responses may hold anything; parts of the batch add up, and so do their gradients."""
    tokens = [RNG.normal(size=n) for n in LENGTHS.ravel() if n]
    sums = np.full(LENGTHS.shape, np.nan)
    sums[LENGTHS > 0] = [t.sum() for t in tokens]

    def of(sums, parts):
        found = [aggregate(sums[p], LENGTHS[p], how=how, longest=7) for p in parts]
        weight = sum(x.weights.sum() for x in found)
        return sum((x.values * x.weights).sum() for x in found) / weight

    whole, gradient = jax.value_and_grad(of)(jnp.asarray(sums), [slice(None)])
    assert float(whole) == pytest.approx(BATCH[how](tokens), rel=1e-9)
    np.testing.assert_array_equal(np.asarray(gradient)[LENGTHS == 0], 0)
    for parts in ([slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        value, found = jax.value_and_grad(of)(jnp.asarray(sums), parts)
        assert float(value) == pytest.approx(float(whole), rel=1e-9)
        np.testing.assert_allclose(found, gradient, rtol=1e-9)


def test_responses_of_one_length_are_aggregated_alike():
    """Where all are as long as they may be only the unit differs; and GSPO's mean comes out."""
    sums = RNG.normal(size=6)
    found = {how: total(aggregate(sums, np.full(6, 7), how=how, longest=7)) for how in BATCH}
    for how in ("response", "token", "constant"):
        assert float(found[how]) == pytest.approx(float(found["sum"]) / 7, rel=1e-9)
    lengths = np.arange(1, 7)
    of_responses = gspo(sums, sums - 1, lengths, RNG.normal(size=6), clip=0.1).losses
    mean = total(aggregate(of_responses * lengths, lengths, how="response", longest=6))
    assert float(mean) == pytest.approx(float(of_responses.mean()), rel=1e-9)


def test_a_batch_without_responses_has_finite_values_and_gradients():
    for how in BATCH:
        out, back = jax.vjp(
            lambda x, how=how: aggregate(x, np.zeros(3, int), how=how, longest=1).values,
            jnp.full(3, jnp.nan),
        )
        np.testing.assert_array_equal(out, 0)
        np.testing.assert_array_equal(back(jnp.ones(3))[0], 0)


def test_what_cannot_be_aggregated_is_refused():
    with pytest.raises(ValueError, match="how to be one of sum, response, token, constant; got 'm"):
        aggregate(np.ones(2), np.ones(2, int), how="mean", longest=3)
    with pytest.raises(ValueError, match="aggregate expected longest at least 1; got 0"):
        aggregate(np.ones(2), np.ones(2, int), how="constant", longest=0)
    with pytest.raises(
        ValueError, match=r"one length a response; got sums \(2,\) and lengths \(3,"
    ):
        on_arrays(losses.aggregate.__wrapped__)(np.ones(2), np.ones(3, int), how="sum", longest=3)
