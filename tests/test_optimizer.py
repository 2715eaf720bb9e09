"""What an update is: which parameters decay, the rate by step, and the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrained
import pytest

from jaxpref import config as config_lib, models, optimizer
from jaxpref.models import Lora, huggingface
from jaxpref.trainable import path_of

STEPS = 6


def config_of(**changes):
    config = config_lib.default("sft").optimizer
    config.update({"clip_norm": 0.0, "learning_rate": 0.1, **changes})
    return config


def decays(params):
    """Whether each parameter decays, by its path."""
    marks = jax.tree.leaves_with_path(optimizer.decayed(params))
    return {path_of(path): mark for path, mark in marks}


@pytest.mark.parametrize("name", pretrained.CASES)
def test_what_hugging_face_keeps_as_a_vector_does_not_decay(name):
    """In all families the vectors are the biases and the norms, and nothing else is one."""
    model = huggingface.read_model(pretrained.FIXTURES / name)
    marks = decays(huggingface.abstract_params(model))
    places = list(huggingface.places(model, model.origin.family))
    found = {part.path: len(place.shape) > 1 for place in places for part in place.parts}
    assert marks == found
    assert not all(marks.values())


def test_adapters_and_a_scalar_head_decay():
    model = huggingface.read_model(pretrained.FIXTURES / "llama_biases", lora=Lora(rank=2))
    marks = decays(huggingface.abstract_params(model))
    assert marks["layers/query_lora_a"]
    assert marks["layers/query_lora_b"]
    assert not marks["layers/query_bias"]
    model, params = models.from_pretrained(pretrained.FIXTURES / "llama_biases")
    _, params = models.with_scalar_head(model, params, jax.random.key(0))
    assert decays(params)["score"]


PEAK = 0.5
SCHEDULES = {
    "constant": (0, [PEAK] * STEPS),
    "linear": (0, [PEAK * (1 - s / STEPS) for s in range(STEPS)]),
    "cosine": (0, [PEAK * (1 + np.cos(np.pi * s / STEPS)) / 2 for s in range(STEPS)]),
    "warm constant": (2, [PEAK / 3, PEAK * 2 / 3, *[PEAK] * (STEPS - 2)]),
    "warm linear": (2, [PEAK / 3, PEAK * 2 / 3, *(PEAK * (1 - s / 4) for s in range(4))]),
    "warm cosine": (
        2,
        [PEAK / 3, PEAK * 2 / 3, *(PEAK * (1 + np.cos(np.pi * s / 4)) / 2 for s in range(4))],
    ),
    # All steps are warm-up: the peak would be next.
    "warm only": (STEPS, [PEAK * (s + 1) / (STEPS + 1) for s in range(STEPS)]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_its_formula(name):
    warmup, expected = SCHEDULES[name]
    schedule = name.split()[-1].replace("only", "linear")
    config = config_of(learning_rate=PEAK, schedule=schedule, warmup_steps=warmup)
    rate = optimizer.learning_rate(config, STEPS)
    np.testing.assert_allclose([rate(s) for s in range(STEPS)], expected, rtol=1e-6)
    # The last step is trained at some rate; after it a falling schedule is at 0.
    assert rate(STEPS - 1) > 0
    if name in ("linear", "cosine", "warm linear", "warm cosine"):
        assert float(rate(STEPS)) == pytest.approx(0, abs=1e-9)


def drawn():
    """A matrix and a bias, and the gradients of some steps."""
    rng = np.random.default_rng(0)
    shapes = {"query": (3, 2), "query_bias": (2,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [{n: rng.normal(size=shape) for n, shape in shapes.items()} for _ in range(STEPS)]
    return params, gradients


def adam(config, gradients):
    """Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1, with bias correction."""
    first = second = 0.0
    for t, g in enumerate(gradients, start=1):
        first = config.b1 * first + (1 - config.b1) * g
        second = config.b2 * second + (1 - config.b2) * g**2
        unbiased = first / (1 - config.b1**t), second / (1 - config.b2**t)
        yield unbiased[0] / (np.sqrt(unbiased[1]) + config.epsilon)


def rmsprop(config, gradients):
    """As PyTorch has it; b1 is the momentum."""
    square = velocity = 0.0
    for g in gradients:
        square = config.b2 * square + (1 - config.b2) * g**2
        velocity = config.b1 * velocity + g / (np.sqrt(square) + config.epsilon)
        yield velocity


def clipped(gradients, largest):
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {n: g * min(1, largest / norm) for n, g in gradients.items()}


# Large epsilons, whose place in the formula shows.
UPDATES = {
    "adamw": (adam, {"b1": 0.8, "b2": 0.9, "epsilon": 0.1}),
    "adamw with decay": (adam, {"b1": 0.8, "b2": 0.9, "epsilon": 0.1, "weight_decay": 0.5}),
    "adamw clipped": (adam, {"epsilon": 0.1, "clip_norm": 2.5}),
    "rmsprop": (rmsprop, {"b1": 0.0, "b2": 0.9, "epsilon": 0.1}),
    "rmsprop with momentum": (rmsprop, {"b1": 0.7, "b2": 0.9, "epsilon": 0.1}),
    "rmsprop with all": (
        rmsprop,
        {"b1": 0.7, "b2": 0.9, "epsilon": 0.1, "weight_decay": 0.5, "clip_norm": 2.5},
    ),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_is_its_formula(name):
    """The matrix decays by rate x weight_decay of itself, the bias does not."""
    formula, changes = UPDATES[name]
    config = config_of(name=name.split()[0], schedule="linear", **changes)
    params, gradients = drawn()
    largest = config.clip_norm or np.inf
    norms = [optax.tree.norm(g) for g in gradients]
    assert not config.clip_norm or min(norms) < largest < max(norms)
    expected = dict(params)
    used = [clipped(g, largest) for g in gradients]
    directions = {n: list(formula(config, [g[n] for g in used])) for n in params}
    for s in range(STEPS):
        rate = 0.1 * (1 - s / STEPS)
        decay = {"query": config.weight_decay, "query_bias": 0.0}
        for n in expected:
            expected[n] = expected[n] - rate * (directions[n][s] + decay[n] * expected[n])
    with jax.enable_x64(True):
        update, _ = optimizer.build(config, STEPS)
        ours = jax.tree.map(jnp.asarray, params)
        state = update.init(ours)
        for g in gradients:
            updates, state = update.update(jax.tree.map(jnp.asarray, g), state, ours)
            ours = optax.apply_updates(ours, updates)
        # Optax has rates and bias corrections in float32.
        for n in expected:
            np.testing.assert_allclose(ours[n], expected[n], rtol=1e-6)
