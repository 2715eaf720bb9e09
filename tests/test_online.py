"""Methods that sample, against the exact answer: the whole loop on the enumerable task."""

import jax
import numpy as np
import online
import pytest
from conftest import response_logps

from jaxpref import packing
from jaxpref.evaluation import enumerable
from jaxpref.models import Decoder

TASK = enumerable.default_task()
DECODER = Decoder(online.SMALL)
PROMPT = np.array([1, 2], np.int32)
ALL = packing.pack([TASK.responses.group(PROMPT)], row_length=128)
# Unbiased advantages: with another lambda, or whitened, PPO has another optimum.
PPO = {
    "algorithm__lam": 1.0,
    "algorithm__whiten": False,
    "algorithm__value_clip": 0.0,
    "algorithm__epochs": 2,
    "critic__learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def params():
    return online.policy_params(DECODER)


@pytest.fixture(scope="module")
def logps():
    """Log-probs of all responses, from parameters."""
    return jax.jit(lambda params: response_logps(DECODER, params, ALL)[0])


def judged():
    """Rewards with Gumbel noise, so that which of two is higher is a Bradley-Terry label.

    Without the noise the better one always wins, and DPO has another optimum.
    """
    noise = np.random.default_rng(0)
    return lambda sampled: (
        online.rewarded(sampled) + noise.gumbel(size=len(sampled.response_ids)).astype(np.float32)
    )


def config_of(method, steps, **changes):
    settings = {
        "data__batch_size": 16,
        "data__row_length": 32,
        "sampling__samples": 8,
        "data__rows": 16,
        "optimizer__learning_rate": 1e-2,
        "optimizer__schedule": "linear",
        "train__steps": steps,
    }
    return online.config_of(method, **{**settings, **changes})


METHODS = {
    "ppo": ("ppo", 60, PPO),
    "rloo": ("rloo", 60, {}),
    "reinforce": ("reinforce", 200, {}),
    "remax": ("remax", 200, {"optimizer__learning_rate": 5e-3}),
    "grpo without a scale": ("grpo", 200, {"algorithm__scale": "none"}),
    "reinforce++": ("reinforce_pp", 200, {}),
    "rloo with the KL in the loss": (
        "rloo",
        200,
        {"algorithm__kl_in": "loss", "algorithm__kl_estimator": "sequence_k2"},
    ),
    # A comparison says less than a reward, and in larger steps some responses become too rare to be
    # compared before they are learned of.
    "online dpo": (
        "online_dpo",
        250,
        {
            "sampling__samples": 2,
            "data__batch_size": 1024,
            "data__rows": 256,
            "optimizer__learning_rate": 5e-3,
        },
    ),
}
QUICK = ("rloo",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.long]) for n in METHODS]
)
def test_a_method_finds_the_optimum_of_the_objective(name, params, logps):
    method, steps, changes = METHODS[name]
    reward = judged() if method == "online_dpo" else online.rewarded
    run = online.begin(config_of(method, steps, **changes), params=params, reward=reward)
    reference = logps(params)
    best = float(enumerable.optimum(reference, TASK.rewards, beta=TASK.beta).value)
    first = enumerable.objective(reference, reference, TASK.rewards, beta=TASK.beta).value
    assert float(first) < 0.6 * best
    measured = run.train(steps)
    found = enumerable.objective(logps(run.state.policy), reference, TASK.rewards, beta=TASK.beta)
    assert float(found.value) > 0.98 * best
    if method == "ppo":
        explained = [line["val/explained_variance"] for line in measured]
        assert np.mean(explained[:3]) < 0.1
        assert np.mean(explained[-10:]) > 0.3
