"""A model that is no `Decoder` trains with the library's update: `docs/own_model.md` runs."""

import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxpref import algorithms, config as config_lib, reference, train
from jaxpref.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "own_model.md"


@pytest.fixture(scope="module")
def page():
    """What the page's code leaves."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 60
    names = {}
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def test_the_page_trains_its_model(page):
    assert page["said"]["loss"] < 0.3
    assert page["said"]["rewards/accuracies"] == 1
    # The reference stays what it was; the update has taken over the first parameters.
    again = page["nnx"].split(page["Reader"](256, 32, page["nnx"].Rngs(0)), page["nnx"].Param)[1]
    for kept, first in zip(*map(jax.tree.leaves, (page["frozen_copy"], again)), strict=True):
        np.testing.assert_array_equal(kept, first)


@pytest.mark.parametrize("name", ["sft", "simpo", "rrhf", "bco"])
def test_every_family_trains_it(name, page):
    algorithm, optimizer = algorithms.build(config_lib.default(name)), optax.adam(3e-3)
    compared = METHODS[name].reference != "none"
    mode = reference.Live(page["model"]) if compared else None
    update = train.make_update(algorithm, page["model"], optimizer, reference=mode)
    params = jax.tree.map(lambda x: x.copy(), page["frozen_copy"])
    state = train.initial_state(params, optimizer, running=algorithm.running)
    found = []
    for _ in range(5):
        state, measured = update(state, {}, page["frozen_copy"] if compared else {}, page["batch"])
        found.append(float(measured["loss"].values / measured["loss"].weights))
    assert found[-1] < found[0]


def test_a_reference_that_moves_follows_it(page):
    algorithm, optimizer = algorithms.build(config_lib.default("dpo")), optax.sgd(0.1)
    synced = reference.Synced(page["model"], mix=1.0, every=1)
    update = train.make_update(algorithm, page["model"], optimizer, reference=synced)
    policy, copy = (jax.tree.map(lambda x: x.copy(), page["frozen_copy"]) for _ in range(2))
    state = train.initial_state(policy, optimizer, reference=copy)
    state, _ = update(state, {}, {}, page["batch"])
    for new, old in zip(
        jax.tree.leaves(state.reference), jax.tree.leaves(state.policy), strict=True
    ):
        np.testing.assert_array_equal(new, old)
