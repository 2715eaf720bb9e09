import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpref import losses

# Equal ways of computing are compared in float64; what is about float32 says so.
pytestmark = pytest.mark.usefixtures("float64")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logps(seed: int, shape=(5,), dtype="float64"):
    values = -10 * np.random.default_rng(seed).random((4, *shape))
    return tuple(jnp.asarray(x, dtype) for x in values)


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


# What every loss in this room promises, one battery for all.
CHOSEN_LENGTHS, REJECTED_LENGTHS = np.array([3, 1, 4, 2, 5]), np.array([2, 2, 1, 6, 3])
LABELS = np.array([True, False, False, True, True])
LENGTHS = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}


class Case(NamedTuple):
    """A loss of log-probs, the same in plain NumPy, and how it may be called.

    Attributes:
      loss: of `inputs` arrays of log-probs, shaped [5] (ranked: [5, 3]).
      formula: the same, of NumPy arrays in float64.
      inputs: how many arrays.
      trained: how many of them, the first ones, have a gradient.
      by_example: each value depends on its own example alone.
    """

    loss: Callable
    formula: Callable
    inputs: int = 4
    trained: int = 2
    by_example: bool = True
    ranked: bool = False


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def margins(beta, chosen, rejected, reference_chosen, reference_rejected):
    return beta * ((chosen - reference_chosen) - (rejected - reference_rejected))


def of_margin(beta, formula):
    return lambda *x: formula(margins(beta, *x))


def of_rewards(beta, formula):
    return lambda a, b, c, d: formula(beta * (a - c), beta * (b - d))


def values(loss, *args, **options):
    """The losses alone, with NumPy's lengths and labels as JAX's."""

    def call(*x):
        n = x[0].shape[-1] if x[0].ndim else 0
        cut = {k: jnp.asarray(v)[:n] if np.ndim(v) else v for k, v in options.items()}
        out = loss(*x, *(jnp.asarray(v)[:n] for v in args), **cut)
        return out.losses if hasattr(out, "losses") else out

    return call


def f_dpo(divergence):
    return lambda a, b, c, d: -log_sigmoid(0.4 * (divergence(a - c) - divergence(b - d)))


def quantiles(a, b):
    difference = np.sort(a) - np.sort(b)
    return difference[np.argsort(np.argsort(a))]


def rrhf_formula(logps):
    out = []
    for row, lengths, scores in zip(logps, RANKED_LENGTHS, SCORES, strict=False):
        p = row / lengths
        pairs = [(i, j) for i in range(3) for j in range(3) if scores[i] < scores[j]]
        ranking = sum(max(0, p[i] - p[j]) for i, j in pairs)
        out.append(0.5 * ranking - row[np.argmax(scores)])
    return np.array(out)


def plackett_luce_formula(rewards):
    return sum(
        np.log(np.exp(rewards[:, k:]).sum(-1)) - rewards[:, k] for k in range(rewards.shape[1])
    )


RANKED_LENGTHS = np.array([[3, 1, 2], [2, 2, 4], [5, 1, 1], [2, 3, 2], [1, 1, 6]])
SCORES = np.array([[3.0, 2, 1], [1, 3, 2], [2, 2, 1], [0, 0, 0], [-1, 5, -2]])
SMOOTH = 0.2

CASES = {
    "dpo": Case(values(losses.dpo, beta=0.4), of_margin(0.4, lambda m: -log_sigmoid(m))),
    "dpo smoothed": Case(
        values(losses.dpo, beta=0.4, label_smoothing=SMOOTH),
        of_margin(0.4, lambda m: -(1 - SMOOTH) * log_sigmoid(m) - SMOOTH * log_sigmoid(-m)),
    ),
    "dpo reference-free": Case(
        lambda a, b: losses.dpo(a, b, None, None, beta=0.4, reference_free=True).losses,
        lambda a, b: -log_sigmoid(0.4 * (a - b)),
        inputs=2,
    ),
    "dpo per token": Case(
        values(losses.dpo, beta=2.0, **LENGTHS),
        lambda a, b, c, d: (
            -log_sigmoid(2.0 * ((a - c) / CHOSEN_LENGTHS - (b - d) / REJECTED_LENGTHS))
        ),
    ),
    "dpo forward KL": Case(
        values(losses.dpo, beta=0.4, divergence=losses.divergences.forward_kl),
        f_dpo(lambda ratio: 1 - 1 / np.exp(ratio)),
    ),
    "dpo Jensen-Shannon": Case(
        values(losses.dpo, beta=0.4, divergence=losses.divergences.jensen_shannon),
        f_dpo(lambda ratio: np.log(2 * np.exp(ratio) / (1 + np.exp(ratio)))),
    ),
    "dpo alpha": Case(
        values(
            losses.dpo,
            beta=0.4,
            divergence=lambda ratio: losses.divergences.alpha_divergence(ratio, 0.3),
        ),
        f_dpo(lambda ratio: (1 - np.exp(ratio) ** -0.3) / 0.3),
    ),
    "robust dpo": Case(
        values(losses.robust_dpo, beta=0.4, label_smoothing=SMOOTH),
        of_margin(
            0.4,
            lambda m: (
                ((1 - SMOOTH) * -log_sigmoid(m) - SMOOTH * -log_sigmoid(-m)) / (1 - 2 * SMOOTH)
            ),
        ),
    ),
    "ipo": Case(values(losses.ipo, beta=0.4), of_margin(1.0, lambda m: (m - 1 / (2 * 0.4)) ** 2)),
    "ipo per token": Case(
        values(losses.ipo, beta=0.4, **LENGTHS),
        lambda a, b, c, d: (
            ((a - c) / CHOSEN_LENGTHS - (b - d) / REJECTED_LENGTHS - 1 / (2 * 0.4)) ** 2
        ),
    ),
    "hinge": Case(values(losses.hinge, beta=0.4), of_margin(0.4, lambda m: np.maximum(0, 1 - m))),
    "exo": Case(
        values(losses.exo, beta=0.4, label_smoothing=0.01),
        of_margin(
            0.4,
            lambda m: (
                sigmoid(m) * np.log(sigmoid(m) / 0.99) + sigmoid(-m) * np.log(sigmoid(-m) / 0.01)
            ),
        ),
    ),
    "nca": Case(
        values(losses.nca, beta=0.4),
        of_rewards(
            0.4, lambda w, v: -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-v)
        ),
    ),
    "sppo": Case(
        values(losses.sppo_hard, beta=0.4),
        of_rewards(1.0, lambda w, v: (w - 0.5 / 0.4) ** 2 + (v + 0.5 / 0.4) ** 2),
    ),
    "aot": Case(
        values(losses.aot, beta=0.4),
        lambda a, b, c, d: -log_sigmoid(0.4 * quantiles(a - b, c - d)),
        by_example=False,
    ),
    "aot unpaired": Case(
        values(losses.aot_unpaired, beta=0.4, label_smoothing=SMOOTH),
        lambda a, b, c, d: (
            -(1 - SMOOTH) * log_sigmoid(0.4 * quantiles(a - c, b - d))
            - SMOOTH * log_sigmoid(-0.4 * quantiles(a - c, b - d))
        ),
        by_example=False,
    ),
    "apo zero": Case(
        values(losses.apo_zero, beta=0.4),
        of_rewards(0.4, lambda w, v: 1 - sigmoid(w) + sigmoid(v)),
    ),
    "apo down": Case(
        values(losses.apo_down, beta=0.4),
        of_rewards(0.4, lambda w, v: sigmoid(w) + 1 - sigmoid(w - v)),
    ),
    "discopop": Case(
        values(losses.discopop, beta=0.4, temperature=0.5),
        of_margin(
            0.4,
            lambda m: -(1 - sigmoid(m / 0.5)) * log_sigmoid(m) + sigmoid(m / 0.5) * np.exp(-m),
        ),
    ),
    "bco": Case(
        values(losses.bco, beta=0.4, shift=0.7),
        of_rewards(0.4, lambda w, v: -log_sigmoid(w - 0.7) - log_sigmoid(-(v - 0.7))),
    ),
    "mpo": Case(
        values(
            losses.mpo,
            beta=0.4,
            shift=0.7,
            chosen_lengths=CHOSEN_LENGTHS,
            dpo_weight=0.5,
            bco_weight=0.3,
            nll_weight=2.0,
        ),
        lambda a, b, c, d: (
            -0.5 * log_sigmoid(0.4 * (a - c) - 0.4 * (b - d))
            - 0.3 * (log_sigmoid(0.4 * (a - c) - 0.7) + log_sigmoid(0.7 - 0.4 * (b - d)))
            - 2.0 * a / CHOSEN_LENGTHS
        ),
    ),
    "simpo": Case(
        values(losses.simpo, CHOSEN_LENGTHS, REJECTED_LENGTHS, beta=2.0, margin=0.5),
        lambda a, b: -log_sigmoid(2.0 * a / CHOSEN_LENGTHS - 2.0 * b / REJECTED_LENGTHS - 0.5),
        inputs=2,
    ),
    "orpo": Case(
        values(losses.orpo, CHOSEN_LENGTHS, REJECTED_LENGTHS, beta=0.3),
        lambda a, b: (
            -a / CHOSEN_LENGTHS
            - 0.3
            * log_sigmoid(
                a / CHOSEN_LENGTHS
                - np.log(1 - np.exp(a / CHOSEN_LENGTHS))
                - b / REJECTED_LENGTHS
                + np.log(1 - np.exp(b / REJECTED_LENGTHS))
            )
        ),
        inputs=2,
    ),
    "cpo": Case(
        values(losses.cpo, beta=0.4, nll_weight=0.7),
        lambda a, b: -log_sigmoid(0.4 * (a - b)) - 0.7 * a,
        inputs=2,
    ),
    "cpo per token": Case(
        lambda a, b: (
            losses.cpo(a, b, beta=0.4, nll=losses.nll(a) / float(CHOSEN_LENGTHS.mean())).losses
        ),
        lambda a, b: -log_sigmoid(0.4 * (a - b)) - a / CHOSEN_LENGTHS.mean(),
        inputs=2,
    ),
    "slic-hf": Case(
        values(losses.slic_hf, margin=2.0, nll_weight=0.1),
        lambda a, b: np.maximum(0, 2.0 - a + b) - 0.1 * a,
        inputs=2,
    ),
    "unlikelihood": Case(
        values(losses.unlikelihood, alpha=0.3), lambda a, b: -a + 0.3 * b, inputs=2
    ),
    "kto": Case(
        values(lambda a, c, y: losses.kto(a, c, y, 0.9, beta=0.4, undesirable_weight=1.5), LABELS),
        lambda a, c: np.where(
            LABELS, 1 - sigmoid(0.4 * (a - c - 0.9)), 1.5 * (1 - sigmoid(0.4 * (0.9 - (a - c))))
        ),
        inputs=2,
        trained=1,
    ),
    "bco unpaired": Case(
        values(lambda a, c, y: losses.bco_unpaired(a, c, y, shift=0.7, beta=0.4), LABELS),
        lambda a, c: -log_sigmoid(np.where(LABELS, 1, -1) * (0.4 * (a - c) - 0.7)),
        inputs=2,
        trained=1,
    ),
    "bradley-terry": Case(
        values(losses.bradley_terry, margin=np.full(5, 0.25, np.float32), center_coefficient=0.01),
        lambda a, b: -log_sigmoid(a - b - 0.25) + 0.01 * (a + b) ** 2,
        inputs=2,
    ),
    "binary reward": Case(
        lambda a: losses.binary_reward(a, jnp.asarray(LABELS)[: len(a)]),
        lambda a: -log_sigmoid(np.where(LABELS, a, -a)),
        inputs=1,
        trained=1,
    ),
    "nll": Case(losses.nll, lambda a: -a, inputs=1, trained=1),
    "rrhf": Case(
        lambda a: (
            losses.rrhf(
                a,
                jnp.asarray(RANKED_LENGTHS)[: len(a)],
                jnp.asarray(SCORES, jnp.float32)[: len(a)],
                rank_weight=0.5,
            ).losses
        ),
        rrhf_formula,
        inputs=1,
        trained=1,
        ranked=True,
    ),
    "plackett-luce": Case(
        losses.plackett_luce, plackett_luce_formula, inputs=1, trained=1, ranked=True
    ),
    "plackett-luce dpo": Case(
        values(losses.plackett_luce_dpo, beta=0.4),
        lambda a, c: plackett_luce_formula(0.4 * (a - c)),
        inputs=2,
        trained=1,
        ranked=True,
    ),
    "all pairs": Case(
        lambda a, c: losses.all_pairs(lambda *x: losses.dpo(*x, beta=0.4).losses, a, c),
        lambda a, c: np.mean(
            [
                -log_sigmoid(0.4 * ((a - c)[:, i] - (a - c)[:, j]))
                for i, j in ((0, 1), (0, 2), (1, 2))
            ],
            axis=0,
        ),
        inputs=2,
        trained=1,
        ranked=True,
    ),
}
each_loss = pytest.mark.parametrize("name", CASES)


def arguments(name: str, dtype="float64"):
    case = CASES[name]
    shape = (5, 3) if case.ranked else (5,)
    return case.loss, logps(10, shape, dtype)[: case.inputs]


@each_loss
def test_is_its_formula(name):
    loss, x = arguments(name)
    expected = CASES[name].formula(*map(np.asarray, x))
    np.testing.assert_allclose(loss(*x), expected, rtol=1e-9)


@each_loss
def test_one_loss_an_example_also_under_jit_and_vmap(name):
    loss, x = arguments(name)
    plain = loss(*x)
    assert plain.shape == x[0].shape[:1]
    np.testing.assert_allclose(jax.jit(loss)(*x), plain, rtol=1e-9, atol=1e-9)
    twice = [jnp.stack([v, v - 1]) for v in x]
    by_hand = jnp.stack([plain, loss(*(v - 1 for v in x))])
    np.testing.assert_allclose(jax.vmap(loss)(*twice), by_hand, rtol=1e-9, atol=1e-9)
    if CASES[name].by_example:
        changed = loss(*(v.at[0].add(-1.0) for v in x))
        np.testing.assert_array_equal(changed[1:], plain[1:])


@each_loss
def test_bfloat16_inputs_are_computed_in_float32(name):
    loss, x = arguments(name, "bfloat16")
    value = loss(*x)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(*(v.astype("float32") for v in x)), rtol=1e-6)


@each_loss
def test_gradients_in_float64(name):
    loss, x = arguments(name)
    n = CASES[name].trained
    check_grads(lambda *v: loss(*map(jnp.asarray, v), *x[n:]), x[:n], order=2)


@each_loss
def test_no_gradient_flows_into_the_reference(name):
    loss, x = arguments(name)
    gradients = jax.grad(lambda *v: loss(*v).sum(), tuple(range(len(x))))(*x)
    for gradient in gradients[CASES[name].trained :]:
        np.testing.assert_array_equal(gradient, 0)
    assert all(np.abs(g).sum() > 0 for g in gradients[: CASES[name].trained])


@each_loss
@pytest.mark.parametrize("scale", [-1e4, -1e5])
def test_extreme_log_probs_give_finite_losses_and_gradients(name, scale):
    loss, x = arguments(name, "float32")
    for extreme in range(len(x)):
        inputs = [jnp.full_like(v, scale) if i == extreme else v for i, v in enumerate(x)]
        value, gradient = jax.value_and_grad(lambda *v: loss(*v).sum(), tuple(range(len(x))))(
            *inputs
        )
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradient)


@each_loss
def test_nan_in_the_input_is_not_hidden(name):
    loss, x = arguments(name)
    assert np.isnan(loss(*(v.at[0].set(jnp.nan) for v in x))).any()


WITH_A_REFERENCE = ("dpo", "robust_dpo", "ipo", "hinge", "exo", "nca", "sppo_hard", "aot")
WITH_A_REFERENCE += ("aot_unpaired", "apo_zero", "apo_down", "discopop")


@pytest.mark.parametrize("name", WITH_A_REFERENCE)
def test_shapes_that_would_broadcast_are_an_error(name):
    a, b, c, d = logps(9)
    # Without the run-time checker of the test run, as a user calls it.
    loss = inspect.unwrap(getattr(losses, name))
    with pytest.raises(ValueError, match=rf"{name} expected .*policy_rejected_logps \(5, 1\)"):
        loss(a, b[:, None], c, d)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_lengths_of_another_shape_are_an_error(name):
    a, b, *_ = logps(9)
    lengths = jnp.asarray(CHOSEN_LENGTHS), jnp.asarray(REJECTED_LENGTHS[:4])
    with pytest.raises(ValueError, match=rf"{name} expected .*rejected_lengths \(4,\)"):
        inspect.unwrap(getattr(losses, name))(a, b, *lengths)


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "aot", "aot_unpaired", "exo"])
def test_label_smoothing_out_of_range_is_an_error(name):
    x = logps(9)
    bad = [0.5, -0.1, *([0.0] if name == "exo" else [])]
    for value in bad:
        with pytest.raises(ValueError, match=f"below 0.5; got {value}"):
            getattr(losses, name)(*x, label_smoothing=value)


# Parameters out of their domain, by the loss and by what it needs beside log-probs.
PAIR, ALONE, LABELLED = (4, ()), (2, ()), (2, (LABELS,))
BY_LENGTH = (2, (CHOSEN_LENGTHS, REJECTED_LENGTHS))
OUT_OF_RANGE = [
    *((name, PAIR, {"beta": 0.0}, "above 0") for name in (*WITH_A_REFERENCE, "bco")),
    ("dpo", PAIR, {"beta": float("nan")}, "above 0"),
    ("dpo", PAIR, {"beta": np.float32(-1)}, "above 0"),
    ("discopop", PAIR, {"temperature": 1.0}, "above 0 and below 1"),
    ("discopop", PAIR, {"temperature": 0}, "above 0 and below 1"),
    ("simpo", BY_LENGTH, {"beta": -2.0}, "above 0"),
    ("simpo", BY_LENGTH, {"label_smoothing": 0.5}, "at least 0 and below 0.5"),
    ("orpo", BY_LENGTH, {"beta": -0.1}, "at least 0"),
    ("cpo", ALONE, {"beta": 0.0}, "above 0"),
    ("cpo", ALONE, {"nll_weight": -1.0}, "at least 0"),
    ("cpo", ALONE, {"label_smoothing": 0.7}, "at least 0 and below 0.5"),
    ("slic_hf", ALONE, {"margin": -1.0}, "at least 0"),
    ("unlikelihood", ALONE, {"alpha": -1.0}, "at least 0"),
    ("bradley_terry", ALONE, {"center_coefficient": -0.1}, "at least 0"),
    ("kto", (2, (LABELS, 0.1)), {"beta": 0.0}, "above 0"),
    ("kto", (2, (LABELS, 0.1)), {"undesirable_weight": -1.0}, "at least 0"),
    ("bco_unpaired", LABELLED, {"beta": 0.0}, "above 0"),
]


@pytest.mark.parametrize(("name", "needs", "options", "wanted"), OUT_OF_RANGE)
def test_parameters_out_of_their_domain_are_errors(name, needs, options, wanted):
    inputs, others = needs
    more = {"shift": 0.0} if name in ("bco", "bco_unpaired") else {}
    arguments = (*logps(9)[:inputs], *(jnp.asarray(x) for x in others))
    ((key, value),) = options.items()
    # Without the run-time checker, which knows no NumPy numbers.
    loss = inspect.unwrap(getattr(losses, name))
    with pytest.raises(ValueError, match=rf"{name} expected {key} {wanted}; got {value}\."):
        loss(*arguments, **more, **options)
    # What is traced cannot be looked at.
    jax.eval_shape(lambda x: loss(*arguments, **more, **{key: x}), jnp.zeros(()))


def test_weights_out_of_their_domain_are_errors():
    x, two = logps(9), jnp.ones((2, 3))
    for call in (
        lambda: losses.divergences.alpha_divergence(x[0], 1.5),
        lambda: losses.weighting.wpo(x[0], x[1], largest=0.0),
        lambda: losses.weighting.length_desensitized(jnp.arange(5), jnp.arange(5), alpha=-0.1),
        lambda: losses.rrhf(two, jnp.ones((2, 3), int), two, rank_weight=-1.0),
        lambda: losses.plackett_luce_dpo(two, two, beta=0.0),
    ):
        with pytest.raises(ValueError, match=r"expected .* (above|at least) 0.*; got"):
            call()


def test_one_length_alone_is_an_error():
    with pytest.raises(ValueError, match="one of chosen_lengths and rejected_lengths"):
        losses.ipo(*logps(9), chosen_lengths=jnp.asarray(CHOSEN_LENGTHS))


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
