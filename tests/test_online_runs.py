"""Whole runs of methods that sample: they resume exactly, and say what they cannot use."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from test_train import assert_same_params, lines_of, small

from jaxpref import checkpoint, metrics, sampling, train
from jaxpref.errors import UserError
from jaxpref.experience import rollouts
from jaxpref.sampling import decode

pytestmark = pytest.mark.usefixtures("one_device")


def length_and_vowels(prompts, completions, **columns):
    """A reward that differs from response to response."""
    return [len(text) / 8 + sum(text.count(v) for v in "aeiou") for text in completions]


def config_of(method="ppo", **changes):
    settings = {
        "reward__function": "test_online_runs:length_and_vowels",
        "sampling__samples": 2,
        "sampling__max_new_tokens": 8,
        "sampling__temperature": 0.7,
        "data__batch_size": 4,
        "data__synthetic_pairs": 16,
        "eval__max_examples": 2,
        "train__save_every": 2,
        "optimizer__learning_rate": 1e-2,
    }
    return small(method, **{**settings, **changes})


class Death(BaseException):
    """What no `except` of the run catches."""


PPO = {
    "algorithm__epochs": 2,
    "algorithm__kl_target": 0.1,
    "algorithm__kl_horizon": 20,
    "reward__normalize": True,
    "data__eval_fraction": 0.0,
}


def dies(patch, where):
    """The run dies in its third step, generating, scoring, or before it updates."""
    calls = []
    owner, name = {
        "generating": (rollouts, "say"),
        "scoring": (rollouts.Rollouts, "_weighed"),
        "before the updates": (rollouts, "_with_tokens"),
    }[where]
    whole = getattr(owner, name)

    def mortal(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Death
        return whole(*args)

    patch.setattr(owner, name, mortal)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nothing has stopped."""
    found = {}

    def run(method):
        if method not in found:
            found[method] = tmp_path_factory.mktemp("whole") / method
            train.run(config_of(method, **(PPO if method == "ppo" else {})), found[method])
        return found[method]

    return run


@pytest.mark.parametrize(
    ("method", "where"),
    [
        ("ppo", "before the updates"),
        pytest.param("ppo", "generating", marks=pytest.mark.long),
        pytest.param("remax", "scoring", marks=pytest.mark.long),
    ],
)
def test_a_run_that_died_ends_as_if_it_had_not(method, where, whole, tmp_path, monkeypatch):
    config = config_of(method, **(PPO if method == "ppo" else {}))
    with monkeypatch.context() as patch:
        dies(patch, where)
        with pytest.raises(Death):
            train.run(config, tmp_path)
    assert checkpoint.latest_step(tmp_path) == 2
    train.run(config, tmp_path)
    assert_same_params(tmp_path, whole(method))
    ours, theirs = (
        [{k: v for k, v in line.items() if "perf" not in k} for line in lines_of(folder)]
        for folder in (tmp_path, whole(method))
    )
    assert ours == theirs
    if method == "remax":
        samples = [(folder / "samples.jsonl").read_text() for folder in (tmp_path, whole(method))]
        assert samples[0] == samples[1]


def run_until_killed(where, workdir):
    """The whole PPO run, whose process dies by SIGKILL in its third step, or in its first save."""
    owner, name, call = {
        "generating": (sampling, "_fetched", 3),
        "scoring": (rollouts.shaping, "update", 3),
        "updating": (metrics.Log, "dispatched", 3),
        "saving": (checkpoint.Checkpoints, "save", 1),
    }[where]
    whole, calls = getattr(owner, name), []

    def mortal(*args):
        calls.append(args)
        if len(calls) == call:
            # What was asked of the device, or of the thread that writes, is still under way.
            if where == "saving":
                whole(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args)

    setattr(owner, name, mortal)
    with conftest.on_one_device():
        train.run(config_of(**PPO), workdir)


@pytest.mark.long
@pytest.mark.parametrize("where", ["generating", "scoring", "updating", "saving"])
def test_kill_9_then_the_same_command_ends_bit_identical(where, whole, tmp_path):
    script = f"import test_online_runs as t; t.run_until_killed({where!r}, {str(tmp_path)!r})"
    found = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=False)
    assert found.returncode == -signal.SIGKILL
    # What the second step has begun to save may still be under way in the third.
    assert checkpoint.latest_step(tmp_path) in (None, 2)
    train.run(config_of(**PPO), tmp_path)
    assert_same_params(tmp_path, whole("ppo"))


def test_before_the_first_update_policy_and_reference_are_one(whole):
    """At a temperature that policy and reference share; then beta follows the KL."""
    first, *others = [line for line in lines_of(whole("ppo")) if "objective/scores" in line]
    assert abs(first["objective/kl"]) < 1e-5
    assert first["objective/kl_k3"] < 1e-8
    assert max(line["objective/kl_k3"] for line in others) > 1e-4
    assert len({line["objective/kl_coefficient"] for line in [first, *others]}) > 1


@pytest.mark.long
def test_sigterm_while_sampling_drops_the_rollout_and_saves(whole, tmp_path, monkeypatch):
    say, calls = rollouts.say, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
            # Nothing is decoded any more.
            patch.setattr(decode, "decode", None)
        return say(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "say", interrupted)
        with pytest.raises(KeyboardInterrupt, match="after step 3, which is saved"):
            train.run(config_of(**PPO), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 3
    train.run(config_of(**PPO), tmp_path)
    assert_same_params(tmp_path, whole("ppo"))


@pytest.mark.long
def test_a_kl_that_explodes_stops_with_the_last_good_checkpoint_kept(tmp_path):
    config = config_of("rloo", algorithm__largest_kl=1e-4, train__save_every=1)
    with pytest.raises(
        UserError, match=r"step 2: the KL .* above algorithm.largest_kl \(0.0001\)"
    ) as e:
        train.run(config, tmp_path)
    assert "the checkpoint of step 1 is kept" in str(e.value)
    assert checkpoint.latest_step(tmp_path) == 1


def only_nan(prompts, completions, **columns):
    return [float("nan")] * len(prompts)


def only_one(prompts, completions, **columns):
    return [1.0]


def raises(prompts, completions, **columns):
    raise RuntimeError("no network")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "rloo",
            {"reward__function": "test_online_runs:only_nan"},
            "finite numbers.*the prompt 'G",
        ),
        ("rloo", {"reward__function": "test_online_runs:only_one"}, r"shape \(1,\) .*prompt: 'G"),
        ("rloo", {"reward__function": "test_online_runs:raises"}, "no network .*the prompt 'Guest"),
        ("rloo", {"data__rows": 1, "sampling__samples": 9}, "data.rows is 1, which the"),
        ("rloo", {"reference__mode": "precomputed"}, "yet to be sampled"),
        ("rloo", {"data__batch_size": 3, "algorithm__minibatches": 2}, "should divide"),
        ("rloo", {"sampling__samples": 1}, "it needs at least 2"),
        ("ppo", {"model__lora__rank": 2, "model__lora__dropout": 0.1}, "model.lora.dropout is 0.1"),
        ("ppo", {"algorithm__kl_in": "loss"}, "'k1' in the loss has a gradient of 0"),
        ("ppo", {"algorithm__kl_estimator": "k3"}, "there only 'k1' is right"),
        ("rloo", {"sampling__max_new_tokens": 120}, "a response might find no room"),
        ("rloo", {"data__max_prompt_length": 8}, r"prompt has \d+ tokens, over .*length \(8\)"),
        ("ppo", {"critic__init_from": "/nowhere"}, "the workdir of a run of algorithm reward"),
    ],
)
def test_what_cannot_be_used_is_refused(method, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.run(config_of(method, **changes), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"model__lora__rank": 2, "reference__mode": "adapter"},
        {"train__trainable": "layers/"},
    ],
)
def test_a_critic_beside_a_policy_of_which_a_part_is_trained(changes, tmp_path):
    """It begins with a head of zeros, and warms up before the policy moves."""
    config = config_of(critic__warmup=1, train__steps=2, critic__learning_rate=1e-2, **changes)
    train.run(config, tmp_path)
    first, second = [line for line in lines_of(tmp_path) if "val/mean" in line]
    assert first["val/mean"] == 0
    assert second["val/mean"] != 0
    assert "policy/ratio" not in first
    assert abs(second["objective/kl"]) < 1e-5


@pytest.mark.long
def test_a_critic_begins_as_a_reward_model(tmp_path):
    train.run(small("reward", train__steps=2), tmp_path / "reward")
    config = config_of(critic__init_from=str(tmp_path / "reward"), train__steps=1)
    train.run(config, tmp_path / "ppo")
    (line,) = [line for line in lines_of(tmp_path / "ppo") if "val/mean" in line]
    assert line["val/mean"] != 0
