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


reinforce, ppo, cispo, gspo, clipped_value = (
    on_arrays(getattr(losses, name))
    for name in ("reinforce", "ppo", "cispo", "gspo", "clipped_value")
)

RNG = np.random.default_rng(1)
OLD, NEW, ADVANTAGES = RNG.normal(size=(3, 3, 5))
OLD, NEW = OLD - 3, OLD - 3 + 0.3 * NEW


# A ratio, an advantage; the loss with bounds 0.8 and 1.3; whether a gradient is left.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.0, 2.0, -2.0, True),
        (1.2, 2.0, -2.4, True),
        (1.5, 2.0, -2.6, False),
        (0.5, 2.0, -1.0, True),
        (1.5, -2.0, 3.0, True),
        (0.9, -2.0, 1.8, True),
        (0.5, -2.0, 1.6, False),
        (7.0, 0.0, 0.0, False),
    ],
)
def test_ppo_by_hand(ratio, advantage, loss, moves):
    def of(logp):
        return ppo(logp, jnp.log(0.1), jnp.float64(advantage), clip=0.2, clip_high=0.3)

    logp = jnp.log(0.1 * jnp.float64(ratio))
    out = of(logp)
    assert float(out.losses) == pytest.approx(loss, rel=1e-9)
    assert float(out.ratios) == pytest.approx(ratio, rel=1e-9)
    gradient = jax.grad(lambda x: of(x).losses)(logp)
    expected = -advantage * ratio if moves else 0.0
    assert float(gradient) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert bool(out.clipped) == (not moves and advantage != 0)


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


def test_cispos_weight_is_bounded_and_keeps_every_tokens_gradient():
    logps = jnp.log(jnp.array([0.9, 0.2]))
    old = jnp.log(jnp.array([0.1, 0.2]))

    def loss(x):
        return cispo(x, old, jnp.array([2.0, 2.0]), largest=5.0)

    np.testing.assert_allclose(jax.grad(lambda x: loss(x).losses.sum())(logps), [-10, -2])
    assert loss(logps).clipped.tolist() == [True, False]


@pytest.mark.parametrize(
    ("value", "returned", "loss", "moves"),
    [
        # The old value is 1, and the bounds are 0.8 and 1.2.
        (1.1, 3.0, 1.9**2 / 2, True),
        (1.5, 3.0, 1.8**2 / 2, False),
        (1.5, 0.0, 1.5**2 / 2, True),
        (0.5, 0.0, 0.8**2 / 2, False),
    ],
)
def test_a_clipped_value_by_hand(value, returned, loss, moves):
    def of(x):
        return clipped_value(x, jnp.float64(1), jnp.float64(returned), clip=0.2)

    out = of(jnp.float64(value))
    assert float(out.losses) == pytest.approx(loss, rel=1e-9)
    assert bool(out.clipped) != moves
    gradient = float(jax.grad(lambda x: of(x).losses)(jnp.float64(value)))
    assert gradient == pytest.approx(value - returned if moves else 0.0, rel=1e-9)
    plain = clipped_value(
        jnp.float64(value), jnp.float64(1), jnp.float64(returned), clip=float("inf")
    )
    assert float(plain.losses) == pytest.approx((value - returned) ** 2 / 2, rel=1e-9)


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
