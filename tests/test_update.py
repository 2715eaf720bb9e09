"""One update, on a model of one weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import algorithms, config as config_lib, optimizer as optimizer_lib, train
from jaxpref.algorithms import Objective
from jaxpref.logprobs import LMHead
from jaxpref.measurements import Metric
from jaxpref.models import ModelOutput
from jaxpref.packing import PackedBatch


def weight_itself(params, batch, key=None):
    """A model of one weight, which is its only hidden state."""
    return ModelOutput(params["w"][None, None, None], LMHead(jnp.zeros((1, 1))))


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_a_step_without_weight_leaves_all_but_the_step(name):
    """Moments and weight decay, which move parameters without a gradient, too."""
    settings = config_lib.default("sft").optimizer
    settings.update(name=name, learning_rate=0.5, weight_decay=0.1)
    optimizer, schedule = optimizer_lib.build(settings, 9)

    def loss(output, batch, inputs):
        weights = jnp.asarray(batch.lengths)[:, 0].astype(jnp.float32)
        # Without weight a value may be anything, and its gradient too.
        return Objective(Metric(output.hidden.sum() / weights, weights), {})

    update = train.make_update(algorithms.Algorithm(loss), weight_itself, optimizer, schedule)
    nothing = np.zeros((1, 1, 1), np.int32)

    def step(state, length):
        lengths = np.full((1, 1, 1), length, np.int32)
        state, measured = update(state, {}, {}, PackedBatch(*[nothing] * 8, lengths, {}))
        return jax.device_get(state), jax.device_get(measured)

    begun = train.initial_state({"w": jnp.float32(2.0)}, optimizer)
    before, _ = step(begun, 3)
    after, measured = step(jax.tree.map(jnp.array, before), 0)
    assert before.policy["w"] != 2
    assert after.step == before.step + 1 == 2
    for a, b in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert measured["loss"] == measured["grad_norm"] == Metric(0, 0)
    assert np.isfinite(measured["param_norm"].values)


def test_update_divides_once_by_the_weight_of_all_micro_batches():
    """A loss with unequal weights: the mean is over weights, not over micro-batches."""

    def loss(output, batch, inputs):
        weights = jnp.asarray(batch.lengths)[:, 0].astype(jnp.float32)
        return Objective(Metric(output.hidden.sum() * weights, weights), {})

    update = train.make_update(algorithms.Algorithm(loss), weight_itself, optax.sgd(1.0))
    lengths = np.array([1, 2, 3, 10], np.int32).reshape(2, 2, 1)
    nothing = np.zeros((2, 1, 1), np.int32)
    batch = PackedBatch(*[nothing] * 8, lengths, {})
    state = train.initial_state({"w": jnp.float32(2.0)}, optax.sgd(1.0))
    state, measured = update(state, {}, {}, batch)
    mean = (1 + 4 + 9 + 100) / 16
    np.testing.assert_allclose(measured["loss"].values / measured["loss"].weights, 2 * mean)
    np.testing.assert_allclose(state.policy["w"], 2 - mean)
