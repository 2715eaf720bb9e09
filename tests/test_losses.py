import inspect
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
