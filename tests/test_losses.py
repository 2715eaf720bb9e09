import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref import losses


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logps(seed: int, shape=(5,), dtype=jnp.float32):
    values = -10 * np.random.default_rng(seed).random((4, *shape))
    return tuple(jnp.asarray(x, dtype) for x in values)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_is_its_formula(shape, label_smoothing, float64):
    chosen, rejected, reference_chosen, reference_rejected = logps(0, shape, jnp.float64)
    out = losses.dpo(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        beta=0.3,
        label_smoothing=label_smoothing,
    )
    chosen_rewards = 0.3 * np.asarray(chosen - reference_chosen)
    rejected_rewards = 0.3 * np.asarray(rejected - reference_rejected)
    margin = chosen_rewards - rejected_rewards
    expected = -(1 - label_smoothing) * np.log(sigmoid(margin)) - label_smoothing * np.log(
        sigmoid(-margin)
    )
    np.testing.assert_allclose(out.losses, expected, rtol=1e-12)
    np.testing.assert_allclose(out.chosen_rewards, chosen_rewards, rtol=1e-12)
    np.testing.assert_allclose(out.rejected_rewards, rejected_rewards, rtol=1e-12)


def test_policy_equal_to_reference_gives_log_2():
    chosen, rejected, *_ = logps(1)
    out = losses.dpo(chosen, rejected, chosen, rejected)
    np.testing.assert_allclose(out.losses, np.log(2), rtol=1e-6)


def test_swapping_the_pair_negates_the_margin():
    a, b, c, d = logps(2)
    out, swapped = losses.dpo(a, b, c, d, beta=0.5), losses.dpo(b, a, d, c, beta=0.5)
    margin = out.chosen_rewards - out.rejected_rewards
    np.testing.assert_array_equal(margin, -(swapped.chosen_rewards - swapped.rejected_rewards))
    # -log s(m) = -log s(-m) - m
    np.testing.assert_allclose(out.losses, swapped.losses - margin, rtol=1e-5, atol=1e-6)


def test_adding_a_function_of_the_prompt_to_the_log_ratio_changes_no_loss():
    a, b, c, d = logps(3)
    np.testing.assert_allclose(
        losses.dpo(a + 2, b + 2, c, d).losses, losses.dpo(a, b, c, d).losses, rtol=1e-5
    )


def test_label_smoothing_of_a_half_is_symmetric():
    a, b, c, d = logps(4)
    one = losses.dpo(a, b, c, d, label_smoothing=0.5).losses
    other = losses.dpo(b, a, d, c, label_smoothing=0.5).losses
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_dpo_gradient_is_the_papers(float64):
    """Equation in section 4 of the paper: beta * sigmoid(r_l - r_w) weighs both log-probs."""
    a, b, c, d = logps(5, dtype=jnp.float64)
    gradients = jax.grad(lambda *x: losses.dpo(*x, beta=0.2).losses.sum(), (0, 1, 2, 3))(a, b, c, d)
    weight = 0.2 * sigmoid(0.2 * np.asarray((b - d) - (a - c)))
    np.testing.assert_allclose(gradients[0], -weight, rtol=1e-12)
    np.testing.assert_allclose(gradients[1], weight, rtol=1e-12)
    np.testing.assert_array_equal(gradients[2], 0)
    np.testing.assert_array_equal(gradients[3], 0)


def test_rewards_carry_no_gradient():
    a, b, c, d = logps(6)
    for which in ("chosen_rewards", "rejected_rewards"):
        gradient = jax.grad(lambda x, w=which: getattr(losses.dpo(x, b, c, d), w).sum())(a)
        np.testing.assert_array_equal(gradient, 0)


def test_reference_free_is_a_constant_reference():
    a, b, c, d = logps(7)
    constant = jnp.zeros_like(a)
    free = losses.dpo(a, b, None, None, reference_free=True)
    np.testing.assert_array_equal(free.losses, losses.dpo(a, b, constant, constant).losses)
    ignored = losses.dpo(a, b, c, d, reference_free=True)
    np.testing.assert_array_equal(free.losses, ignored.losses)
    np.testing.assert_array_equal(free.chosen_rewards, 0.1 * a)


def test_missing_reference_is_an_error():
    a, b, *_ = logps(8)
    with pytest.raises(ValueError, match="reference_free=True"):
        losses.dpo(a, b, None, None)


def test_shapes_that_would_broadcast_are_an_error():
    a, b, c, d = logps(9)
    # Without the run-time checker of the test run, as a user calls it.
    with pytest.raises(ValueError, match=r"policy_rejected_logps \(5, 1\)"):
        inspect.unwrap(losses.dpo)(a, b[:, None], c, d)


# What every loss in this room promises, one battery for all.
BATTERY = {
    "dpo": (lambda *x: losses.dpo(*x, beta=0.4).losses, 4),
    "dpo_smoothed": (lambda *x: losses.dpo(*x, beta=0.4, label_smoothing=0.1).losses, 4),
    "dpo_reference_free": (
        lambda a, b: losses.dpo(a, b, None, None, reference_free=True).losses,
        2,
    ),
    "nll": (losses.nll, 1),
}
each_loss = pytest.mark.parametrize("name", BATTERY)


def arguments(name: str, dtype=jnp.float32):
    return BATTERY[name][0], logps(10, dtype=dtype)[: BATTERY[name][1]]


@each_loss
def test_one_loss_an_example_also_under_jit_and_vmap(name):
    loss, x = arguments(name)
    plain = loss(*x)
    assert plain.shape == x[0].shape
    np.testing.assert_allclose(jax.jit(loss)(*x), plain, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(loss)(*x), plain, rtol=1e-6)
    alone = [loss(*(v[i] for v in x)) for i in range(len(plain))]
    np.testing.assert_allclose(alone, plain, rtol=1e-6)


@each_loss
def test_compiles_once(name):
    loss, x = arguments(name)
    compiled = jax.jit(loss)
    compiled(*x)
    compiled(*(v + 1 for v in x))
    assert compiled._cache_size() == 1


@each_loss
def test_bfloat16_inputs_are_computed_in_float32(name):
    loss, x = arguments(name, jnp.bfloat16)
    value = loss(*x)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(*(v.astype(jnp.float32) for v in x)), rtol=1e-6)


@each_loss
def test_gradients_in_float64(name, float64):
    loss, x = arguments(name, jnp.float64)
    n = 2 if name.startswith("dpo") else 1
    check_grads(lambda *v: loss(*map(jnp.asarray, v), *x[n:]), x[:n], order=2)


@each_loss
@pytest.mark.parametrize("scale", [-1e4, -1e5])
def test_extreme_log_probs_give_finite_losses_and_gradients(name, scale):
    loss, x = arguments(name)
    for extreme in range(len(x)):
        inputs = [jnp.full_like(v, scale) if i == extreme else v for i, v in enumerate(x)]
        value, gradient = jax.value_and_grad(lambda *v: loss(*v).sum(), tuple(range(len(x))))(
            *inputs
        )
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradient)


def test_margin_of_1e4_is_linear_on_the_wrong_side_and_zero_on_the_right():
    zero, far = jnp.zeros(1), jnp.full(1, -1e5)
    wrong, right = losses.dpo(far, zero, zero, zero), losses.dpo(zero, far, zero, zero)
    np.testing.assert_allclose(wrong.losses, 1e4, rtol=1e-6)
    np.testing.assert_array_equal(right.losses, 0)


def test_masked_nll_equals_sliced_and_hides_what_is_masked():
    x = jnp.array([-1.0, jnp.nan, -3.0])
    mask = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(lambda x: losses.nll(x, where=mask).sum())(x)
    assert value == losses.nll(x[mask]).sum()
    np.testing.assert_array_equal(gradient, [-1, 0, -1])


def test_all_masked_nll_is_zero_with_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: losses.nll(x, where=jnp.zeros(3, bool)).sum())(
        jnp.full(3, -1.0)
    )
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_nan_in_the_input_is_not_hidden():
    nan = jnp.array([jnp.nan])
    assert np.isnan(losses.nll(nan)).all()
    assert np.isnan(losses.dpo(nan, nan, nan, nan).losses).all()
