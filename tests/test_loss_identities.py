"""What single losses are for: their limits, their kinship, their papers' gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import logps, sigmoid

from jaxpref import losses

# Equal ways of computing are compared in float64; what is about float32 says so.
pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_is_its_formula(shape, label_smoothing):
    chosen, rejected, reference_chosen, reference_rejected = logps(0, shape)
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
    np.testing.assert_allclose(out.losses, np.log(2), rtol=1e-9)


def test_swapping_the_pair_negates_the_margin():
    a, b, c, d = logps(2)
    out, swapped = losses.dpo(a, b, c, d, beta=0.5), losses.dpo(b, a, d, c, beta=0.5)
    margin = out.chosen_rewards - out.rejected_rewards
    np.testing.assert_array_equal(margin, -(swapped.chosen_rewards - swapped.rejected_rewards))
    # -log s(m) = -log s(-m) - m
    np.testing.assert_allclose(out.losses, swapped.losses - margin, rtol=1e-9, atol=1e-9)


def test_adding_a_function_of_the_prompt_to_the_log_ratio_changes_no_loss():
    a, b, c, d = logps(3)
    np.testing.assert_allclose(
        losses.dpo(a + 2, b + 2, c, d).losses, losses.dpo(a, b, c, d).losses, rtol=1e-9
    )


def test_label_smoothing_of_a_half_is_symmetric():
    a, b, c, d = logps(4)
    one = losses.dpo(a, b, c, d, label_smoothing=jnp.array(0.5)).losses
    other = losses.dpo(b, a, d, c, label_smoothing=jnp.array(0.5)).losses
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_dpo_gradient_is_the_papers():
    """Equation in section 4 of the paper: beta * sigmoid(r_l - r_w) weighs both log-probs."""
    a, b, c, d = logps(5)
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


def test_margin_of_1e4_is_linear_on_the_wrong_side_and_zero_on_the_right():
    zero, far = jnp.zeros(1, "float32"), jnp.full(1, -1e5, "float32")
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


def test_robust_dpo_is_dpo_on_average_over_flipped_labels():
    a, b, c, d = logps(12)
    straight = losses.robust_dpo(a, b, c, d, label_smoothing=0.3).losses
    flipped = losses.robust_dpo(b, a, d, c, label_smoothing=0.3).losses
    np.testing.assert_allclose(0.7 * straight + 0.3 * flipped, losses.dpo(a, b, c, d).losses)


def test_mean_ipo_of_one_token_is_ipo():
    x, one = logps(13), jnp.ones(5, int)
    per_token = losses.ipo(*x, chosen_lengths=one, rejected_lengths=one)
    np.testing.assert_array_equal(per_token.losses, losses.ipo(*x).losses)


def test_cpo_without_sft_is_dpo_with_a_uniform_reference():
    a, b, *_ = logps(14)
    uniform = losses.dpo(a, b, None, None, reference_free=True).losses
    np.testing.assert_allclose(losses.cpo(a, b, nll_weight=0.0).losses, uniform, rtol=1e-9)


def test_simpo_of_one_token_without_margin_is_dpo_with_a_uniform_reference():
    a, b, *_ = logps(15)
    one = jnp.ones(5, int)
    np.testing.assert_allclose(
        losses.simpo(a, b, one, one, beta=0.3, margin=0.0).losses,
        losses.dpo(a, b, None, None, beta=0.3, reference_free=True).losses,
        rtol=1e-9,
    )


def test_unlikelihood_without_its_term_is_sft():
    a, b, *_ = logps(16)
    np.testing.assert_array_equal(losses.unlikelihood(a, b, alpha=0.0).losses, losses.nll(a))


def test_divergences_meet_at_their_limits():
    ratios = jnp.linspace(-2.0, 2.0, 9)
    of = losses.divergences
    np.testing.assert_allclose(of.alpha_divergence(ratios, 1.0), of.forward_kl(ratios))
    np.testing.assert_allclose(of.alpha_divergence(ratios, 1e-9), ratios, atol=1e-7)
    np.testing.assert_array_equal(of.alpha_divergence(ratios, 0.0), of.reverse_kl(ratios))
    for divergence in (of.reverse_kl, of.forward_kl, of.jensen_shannon, of.alpha_divergence):
        assert divergence(jnp.zeros(1))[0] == pytest.approx(0.0)
        assert (jnp.diff(divergence(ratios)) > 0).all()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_quantiles_leave_out_what_is_masked(name):
    x = logps(17)
    mask = jnp.array([True, False, True, True, False])
    loss = getattr(losses, name)
    masked = loss(*(jnp.where(mask, v, 1e6 * i) for i, v in enumerate(x)), where=mask).losses
    np.testing.assert_allclose(masked[mask], loss(*(v[mask] for v in x)).losses, rtol=1e-9)
    np.testing.assert_array_equal(masked[~mask], 0)
    nobody = jnp.zeros(5, bool)
    value, gradient = jax.value_and_grad(lambda a: loss(a, *x[1:], where=nobody).losses.sum())(x[0])
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_quantiles_do_not_depend_on_the_order_of_the_batch(name):
    x, order = logps(18), jnp.array([3, 0, 4, 1, 2])
    loss = getattr(losses, name)
    shuffled = loss(*(v[order] for v in x)).losses
    np.testing.assert_allclose(shuffled, loss(*x).losses[order], rtol=1e-9)


def test_kl_of_mismatched_pairs_is_a_mean_that_is_never_negative():
    a, b, *_ = logps(19)
    mask = jnp.array([True, True, False, True, False])
    expected = max(0.0, float((a - b)[mask].mean()))
    assert losses.kto_kl(a, b, where=mask) == pytest.approx(expected)
    assert losses.kto_kl(jnp.minimum(a, b) - 1, b) == 0
    assert losses.kto_kl(a, b, where=jnp.zeros(5, bool)) == 0
    np.testing.assert_array_equal(jax.grad(lambda a: losses.kto_kl(a, b))(a + 20), 0)


def test_bco_of_pairs_is_the_sum_of_its_two_responses():
    a, b, c, d = logps(20)
    labels = jnp.ones(5, bool)
    alone = [
        losses.bco_unpaired(x, reference, y, shift=0.3).losses
        for x, reference, y in ((a, c, labels), (b, d, ~labels))
    ]
    np.testing.assert_allclose(losses.bco(a, b, c, d, shift=0.3).losses, sum(alone), rtol=1e-9)


def test_plackett_luce_of_two_is_bradley_terry_and_dpo():
    a, b, c, d = logps(22)
    policy, reference = jnp.stack([a, b], -1), jnp.stack([c, d], -1)
    np.testing.assert_allclose(
        losses.plackett_luce(policy), losses.bradley_terry(a, b), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(
        losses.plackett_luce_dpo(policy, reference).losses,
        losses.dpo(a, b, c, d).losses,
        rtol=1e-9,
        atol=1e-6,
    )


def test_bradley_terry_of_implicit_rewards_is_dpo():
    a, b, c, d = logps(23)
    np.testing.assert_allclose(
        losses.bradley_terry(0.1 * (a - c), 0.1 * (b - d)),
        losses.dpo(a, b, c, d, beta=0.1).losses,
        rtol=1e-9,
    )


def test_plackett_luce_is_a_distribution_over_rankings():
    rewards = logps(24, (4,))[0]
    orders = jnp.asarray(list(itertools.permutations(range(4))))
    np.testing.assert_allclose(jnp.exp(-losses.plackett_luce(rewards[orders])).sum(), 1.0)


RANKED = {
    "plackett-luce": lambda x, y, where: losses.plackett_luce(x, where=where),
    "plackett-luce dpo": lambda x, y, where: losses.plackett_luce_dpo(x, y, where=where).losses,
    "all pairs": lambda x, y, where: losses.all_pairs(
        lambda *v: losses.dpo(*v).losses, x, y, where=where
    ),
    "rrhf": lambda x, y, where: (
        losses.rrhf(x, jnp.where(where, 2, 0), jnp.arange(3.0)[None] + jnp.zeros((5, 1))).losses
    ),
}


@pytest.mark.parametrize("name", RANKED)
def test_absent_responses_change_nothing(name):
    x, y, *_ = logps(25, (5, 3))
    where = jnp.array([True, True, False])
    hidden = [v.at[:, 2].set(jnp.nan) for v in (x, y)]
    loss = RANKED[name]
    value, gradient = jax.value_and_grad(lambda a: loss(a, hidden[1], where[None] & (x < 1)).sum())(
        hidden[0]
    )
    short = loss(x[:, :2], y[:, :2], where[None, :2] & (x[:, :2] < 1)) if name != "rrhf" else None
    if short is not None:
        assert value == pytest.approx(float(short.sum()), rel=1e-5)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 2], 0)
    nothing, gradient = jax.value_and_grad(lambda a: loss(a, y, jnp.zeros((5, 3), bool)).sum())(x)
    assert nothing == 0
    np.testing.assert_array_equal(gradient, 0)


def test_an_ensemble_has_a_mean_and_an_uncertainty():
    members = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_array_equal(losses.ensemble_mean(members), [2, 2])
    np.testing.assert_array_equal(losses.ensemble_uncertainty(members), [1, 0])


def test_wpo_weighs_a_pair_by_the_product_of_its_mean_probabilities():
    a, b, *_ = logps(26)
    np.testing.assert_allclose(losses.weighting.wpo(a, b), np.exp(a) * np.exp(b), rtol=1e-9)
    np.testing.assert_array_equal(jax.grad(lambda a: losses.weighting.wpo(a, b).sum())(a), 0)


def test_length_desensitised_tokens_beyond_the_shorter_response_weigh_less():
    weights = losses.weighting.length_desensitized(
        jnp.arange(5), jnp.array([3, 3, 3, 3, 3]), alpha=0.25
    )
    np.testing.assert_array_equal(weights, [1, 1, 1, 0.25, 0.25])
