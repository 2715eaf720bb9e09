"""The implicit reward of a policy: what `score` says is what the run itself has measured."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import small

from jaxpref import checkpoint, config as config_lib, evaluation, identity, rewards
from jaxpref.data.examples import hold_out
from jaxpref.data.synthetic import generate
from jaxpref.errors import UserError
from jaxpref.train import assemble

pytestmark = pytest.mark.usefixtures("one_device")


def moved(params, seed, by=0.05):
    """Other parameters nearby, as updates would have left them."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    return tree.unflatten([x + by * jax.random.normal(key, x.shape, x.dtype) for x, key in pairs])


def finished(workdir, config):
    """A run that is over, without the time that updates take; what it has measured at its end."""
    workdir.mkdir()
    with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
        training = assemble.assemble(config, workdir, checkpoints)
        policy = training.state.roles[checkpoint.POLICY]
        state = training.state._replace(
            roles={checkpoint.POLICY: policy._replace(params=moved(policy.params, 1))},
            reference=moved(training.state.reference, 2),
        )
        checkpoints.save(1, state.params, state.rest)
        checkpoints.wait()
        return training.evaluate(1, state, lambda: False)


def held_out(config, path):
    """The pairs that a run on generated data has evaluated, as a file."""
    examples = generate(config.data.synthetic_pairs, config.seed)
    _, held = hold_out(examples, config.data.eval_fraction)
    pairs = held[: config.eval.max_examples]
    lines = [dict(zip(("chosen", "rejected"), e.responses, strict=True)) for e in pairs]
    path.write_text(
        "".join(
            json.dumps({"prompt": e.prompt, **line}) + "\n"
            for e, line in zip(pairs, lines, strict=True)
        )
    )
    return str(path)


def scores_of(workdir, path, **options):
    output = workdir.parent / "scored.jsonl"
    evaluation.score_file(workdir, path, output, **options)
    return np.array([json.loads(line)["scores"] for line in output.read_text().splitlines()])


LONG = [pytest.mark.long]
LORA = {"model__lora__rank": 2}
RUNS = {
    "synced": ({"reference__mode": "synced"}, LONG),
    "the base": ({"reference__mode": "adapter", **LORA}, []),
    "free": ({"reference__mode": "free"}, LONG),
    "adapters on a base in four bits": ({"model__frozen_dtype": "nf4", **LORA}, LONG),
    "adapters, precomputed": (
        {"reference__mode": "precomputed", "model__frozen_dtype": "bfloat16", **LORA},
        LONG,
    ),
}


def assert_as_measured(scores, measured):
    expected = [measured[f"eval/rewards/{side}"] for side in ("chosen", "rejected")]
    np.testing.assert_allclose(scores.mean(0), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(scores).max() > 1e-3


@pytest.mark.parametrize("case", [pytest.param(k, marks=v[1]) for k, v in RUNS.items()])
def test_the_mean_rewards_are_those_that_the_run_has_measured(case, tmp_path):
    config = small(**RUNS[case][0])
    measured = finished(tmp_path / "run", config)
    path = held_out(config, tmp_path / "pairs.jsonl")
    assert_as_measured(scores_of(tmp_path / "run", path), measured)


def test_rewards_do_not_depend_on_the_batch_size(tmp_path):
    config = small()
    measured = finished(tmp_path / "run", config)
    path = held_out(config, tmp_path / "pairs.jsonl")
    scores = scores_of(tmp_path / "run", path)
    assert_as_measured(scores, measured)
    for rows in (1, 3):
        again = scores_of(tmp_path / "run", path, batch_size=rows)
        # Differences of log-probs of some hundred nats, in float32.
        np.testing.assert_allclose(again, scores, atol=2e-5)
    # By itself a pair has the rewards that it has beside others.
    lines = Path(path).read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text(lines[3])
    one = scores_of(tmp_path / "run", str(tmp_path / "one.jsonl"))
    np.testing.assert_allclose(one[0], scores[3], atol=2e-5)

    shutil.rmtree(tmp_path / "run" / "reference")
    with pytest.raises(UserError, match=r"run: the reference of this run, .* cannot be had: .*put"):
        scores_of(tmp_path / "run", path)


def test_a_precomputed_reference_is_read_from_where_it_was_and_compared(tmp_path):
    """Its weights are not kept, so others in their place are refused."""
    begun = tmp_path / "begun"
    finished(begun, small("sft"))
    config = small(reference__mode="precomputed", model__init_from=str(begun))
    measured = finished(tmp_path / "run", config)
    path = held_out(config, tmp_path / "pairs.jsonl")
    assert_as_measured(scores_of(tmp_path / "run", path), measured)

    with pytest.raises(
        UserError, match=r"begun: is a run of sft, which has learned neither .* dpo"
    ):
        scores_of(begun, path)
    shutil.rmtree(begun)
    finished(begun, small("sft", seed=3))
    with pytest.raises(UserError, match=r"model.init_from=.*begun: these are other weights than"):
        scores_of(tmp_path / "run", path)
    shutil.rmtree(begun)
    with pytest.raises(UserError, match=r"the reference of this run, .*begun"):
        scores_of(tmp_path / "run", path)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["live", "precomputed"])
def test_another_policy_as_the_reference(mode, tmp_path):
    other = tmp_path / "other"
    finished(other, small("sft", model__width=24, model__layers=2))
    config = small(reference__mode=mode, reference__init_from=str(other))
    measured = finished(tmp_path / "run", config)
    path = held_out(config, tmp_path / "pairs.jsonl")
    # A live one is kept with the run.
    other.rename(tmp_path / "gone" if mode == "live" else other)
    assert_as_measured(scores_of(tmp_path / "run", path), measured)


def test_a_reward_model_is_told_from_a_policy(tmp_path):
    with pytest.raises(UserError, match="no workdir of a run"):
        rewards.ImplicitReward(tmp_path)
    for name, says in (("rloo", "with algorithm.beta 0"), ("simpo", "a run of simpo, which")):
        config = config_lib.default(name)
        if name == "rloo":
            config.algorithm.beta = 0.0
        identity.write(tmp_path, identity.describe(config))
        (tmp_path / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=f"{says}.*has learned neither"):
            rewards.open_scorer(tmp_path)
