"""What a run samples at its evaluations, against the reference; a run that is resumed does too."""

import json

import numpy as np
import pytest
from test_implicit import finished, moved
from test_train import lines_of, small

from jaxpref import checkpoint, config as config_lib, data as data_lib, evaluation, train
from jaxpref.errors import UserError
from jaxpref.experience import win_rate
from jaxpref.experience.held_out import SCORES, Said
from jaxpref.tokenizer import load_tokenizer
from jaxpref.train import assemble

pytestmark = pytest.mark.usefixtures("one_device")

PROMPTS = 4
NAMES = {"eval/win_rate", "eval/samples/reward", "eval/samples/kl", "eval/samples/length"}


def config_of(method="dpo", **changes):
    settings = {
        "eval__win_rate_prompts": PROMPTS,
        "reward__function": "test_online_runs:length_and_vowels",
        "sampling__max_new_tokens": 8,
        "sampling__shown": PROMPTS,
        "optimizer__learning_rate": 0.1,
        "train__eval_every": 2,
    }
    return small(method, **{**settings, **changes})


def evaluated(workdir, config, seed=None, by=0.05):
    """What is measured before the first step, and with a seed also of another policy."""
    config_lib.check(config)
    workdir.mkdir(exist_ok=True)
    with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
        training = assemble.assemble(config, workdir, checkpoints)
        found = [training.evaluate(0, training.state, lambda: False)]
        if seed is not None:
            policy = training.state.roles[checkpoint.POLICY]
            policy = policy._replace(params=moved(policy.params, seed, by))
            roles = {**training.state.roles, checkpoint.POLICY: policy}
            found.append(training.evaluate(1, training.state._replace(roles=roles), lambda: False))
    return found


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(lines):
    """What is measured of samples, by step."""
    return {
        line["step"]: {name: line[name] for name in NAMES}
        for line in lines
        if "eval/win_rate" in line
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has stopped."""
    workdir = tmp_path_factory.mktemp("win_rate") / "whole"
    train.run(config_of(), workdir)
    return workdir


def test_the_win_rate_is_that_of_the_samples_that_are_kept(whole):
    lines = {line["step"]: line for line in lines_of(whole) if "eval/win_rate" in line}
    assert [*lines] == [0, 2, 4]
    assert lines[0]["eval/win_rate"] == 0.5
    assert lines[0]["eval/samples/kl"] == pytest.approx(0, abs=1e-5)
    theirs = read(whole / "reference_samples.jsonl")
    assert len(theirs) == PROMPTS
    rates = set()
    for step, line in lines.items():
        ours = [x for x in read(whole / "samples.jsonl") if x["step"] == step]
        assert [x["prompt"] for x in ours] == [x["prompt"] for x in theirs]
        signs = [
            np.sign(round(a[SCORES], 3) - round(b["reward"], 3))
            for a, b in zip(ours, theirs, strict=True)
        ]
        assert line["eval/win_rate"] == pytest.approx((1 + np.mean(signs)) / 2)
        assert line["eval/samples/reward"] == pytest.approx(
            np.mean([x[SCORES] for x in ours]), abs=1e-3
        )
        assert line["eval/samples/length"] == np.mean([x["completions/length"] for x in ours])
        rates.add(line["eval/win_rate"])
    assert len(rates) > 1


def test_a_run_that_is_resumed_measures_the_same(whole, tmp_path):
    train.run(config_of(train__steps=2), tmp_path)
    train.run(config_of(), tmp_path)
    assert sampled(lines_of(tmp_path)) == sampled(lines_of(whole))
    for name in ("samples.jsonl", "reference_samples.jsonl"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()
    (tmp_path / "reference_samples.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"reference_samples.jsonl: what the reference .* put the"):
        train.run(config_of(train__steps=6), tmp_path)


def test_a_method_that_samples_measures_the_same_samples(whole, tmp_path):
    """Of the same policy; once, and over as many prompts as are asked for."""
    config = config_of(
        "rloo",
        sampling__samples=2,
        eval__max_examples=6,
        data__batch_size=4,
        eval__win_rate_prompts=PROMPTS,
        sampling__shown=6,
    )
    first, after = evaluated(tmp_path, config, seed=1)
    before = sampled(lines_of(whole))[0]
    assert {name: first[name] for name in NAMES} == pytest.approx(before, abs=1e-5)
    theirs = read(tmp_path / "reference_samples.jsonl")
    assert [x["response_ids"] for x in theirs] == [
        x["response_ids"] for x in read(whole / "reference_samples.jsonl")
    ]
    ours = [line for line in read(tmp_path / "samples.jsonl") if line["step"] == 1]
    assert len(ours) == 6
    for name, known in (("reward", "objective/scores"), ("kl", "objective/kl")):
        values = [line[known] for line in ours]
        assert after[f"eval/samples/{name}"] == pytest.approx(np.mean(values[:PROMPTS]), abs=1e-3)
        assert after[f"eval/{known}"] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize("mode", [pytest.param("precomputed", marks=pytest.mark.long), "free"])
def test_without_the_references_weights_there_is_a_win_rate_and_no_kl(
    mode, whole, tmp_path, capsys
):
    first, after = evaluated(tmp_path, config_of(reference__mode=mode), seed=1)
    assert NAMES - first.keys() == {"eval/samples/kl"}
    assert first["eval/win_rate"] == 0.5
    assert after["eval/samples/reward"] != first["eval/samples/reward"]
    kept = (tmp_path / "reference_samples.jsonl").read_text()
    assert kept == (whole / "reference_samples.jsonl").read_text()
    assert f"{mode!r}, so eval/samples/kl is not measured" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("mode", ["live", "synced", "precomputed"])
def test_another_policy_as_the_reference_answers_for_itself(mode, tmp_path):
    other = tmp_path / "other"
    finished(other, small("sft"))
    itself = config_of("sft", model__init_from=str(other))
    evaluated(tmp_path / "itself", itself)
    changes = {"reference__mode": mode, "reference__init_from": str(other)}
    evaluated(tmp_path / "run", config_of(**changes))
    ours, theirs = (
        [x["response_ids"] for x in read(tmp_path / name / "reference_samples.jsonl")]
        for name in ("run", "itself")
    )
    assert ours == theirs
    own = [x["response"] for x in read(tmp_path / "run" / "samples.jsonl")]
    assert own != [x["response"] for x in read(tmp_path / "itself" / "samples.jsonl")]


@pytest.mark.long
@pytest.mark.parametrize("method", ["sft", "kto", "plackett_luce_dpo", "simpo"])
def test_every_family_answers_the_same_prompts(method, whole, tmp_path):
    (found,) = evaluated(tmp_path, config_of(method))
    assert found["eval/win_rate"] == 0.5
    assert (tmp_path / "reference_samples.jsonl").read_text() == (
        whole / "reference_samples.jsonl"
    ).read_text()


@pytest.mark.long
def test_several_devices_say_the_same(whole, tmp_path):
    config = config_of(mesh__data=2, mesh__fsdp=2)
    first, _ = evaluated(tmp_path, config, seed=1)
    assert {name: first[name] for name in NAMES} == pytest.approx(
        sampled(lines_of(whole))[0], abs=1e-4
    )


def file_of(path, count=40):
    lines = [{"prompt": f"{i % 20}?", "chosen": " a", "rejected": " b"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data__format": "auto", "data__path": str(path), "data__eval_fraction": 0.4}


def test_without_a_reward_there_is_no_win_rate_and_a_kl_at_the_temperature(tmp_path, capsys):
    """In DPO's updates the reference has no temperature; the policy is the reference at any."""
    given = file_of(tmp_path / "x.jsonl")
    config = config_of(reward__function="", sampling__temperature=0.5, **given)
    first, after = evaluated(tmp_path / "run", config, seed=1)
    assert NAMES & first.keys() == {"eval/samples/kl", "eval/samples/length"}
    assert first["eval/samples/kl"] == pytest.approx(0, abs=1e-5)
    assert first["eval/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(after["eval/samples/kl"]) > 1e-3
    assert not (tmp_path / "run" / "reference_samples.jsonl").exists()
    assert "there is no eval/win_rate, since no reward says" in capsys.readouterr().out
    table = evaluation.samples_table(read(tmp_path / "run" / "samples.jsonl"))
    assert [column.header for column in table.columns] == ["prompt", "step 0", "step 1"]


def test_equal_responses_are_a_tie_whatever_their_rewards():
    def said(rewards):
        ids = [np.array(x) for x in ([1, 2], [3], [4], [5])]
        return Said(["p"] * 4, ["r"] * 4, ids, {SCORES: np.array(rewards)})

    theirs = win_rate._Theirs([[1, 2], [9], [9], [9]], np.array([0.0, 0.0, 1.0, 2.0]))
    scores = win_rate._scores(said([5.0, 3.0, 1.0, 1.0]), theirs)
    np.testing.assert_array_equal(scores, [0.5, 1, 0.5, 0])


def loaded(config, kind="pairs"):
    return data_lib.load(config, load_tokenizer("bytes"), kind)


def test_prompts_are_different_cut_counted_and_the_same_from_a_cache(tmp_path):
    given = file_of(tmp_path / "x.jsonl", count=60)
    config = config_of(eval__win_rate_prompts=5, eval__max_examples=2, **given)
    data = loaded(config)
    prompts = [example.prompt for example in data.prompts.examples]
    # Each stands three times in the file.
    assert len(set(prompts)) == len(prompts) == data.counts["win_rate_prompts"] == 5
    assert data.prompts.examples[0].record["chosen"] == " a"
    assert data.prompts.response_lengths.shape[1] == 1
    assert not data.prompts.response_lengths.any()
    config.data.cache = str(tmp_path / "kept")
    for _ in range(2):
        again = loaded(config)
        assert again.prompts.fingerprint() == data.prompts.fingerprint()
        assert again.counts == data.counts
    assert "reused" in again.notes[0]
    config.data.update(max_length=8, max_prompt_length=1, on_long_prompt="truncate")
    assert loaded(config).counts["win_rate_prompts_cut"] == 5
    config.data.on_long_prompt = "error"
    with pytest.raises(UserError, match=r"eval.win_rate_prompts is 5, and one .* prompt has \d"):
        loaded(config)
    config.data.on_long_prompt = "skip"
    config.data.max_length = 64
    skipped = loaded(config)
    assert skipped.counts["win_rate_dropped/long_prompt"] == 5
    assert not len(skipped.prompts)


def test_what_cannot_be_answered_is_refused(tmp_path):
    lines = [json.dumps({"text": f"number {i}"}) for i in range(30)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    changes = {"data__format": "auto", "data__path": str(tmp_path / "x.jsonl")}
    with pytest.raises(UserError, match=r"x.jsonl.* is plain text, which has no prompt"):
        loaded(config_of("sft", **changes), "sft")
    config = config_of(eval__win_rate_prompts=1, **file_of(tmp_path / "y.jsonl"))
    with pytest.raises(UserError, match=r"is 1, and 1 of .* at least 2: ask for more"):
        evaluated(tmp_path / "run", config)


BAD = [
    ({"eval__win_rate_prompts": 0}, "only where eval.win_rate_prompts is above 0"),
    ({"sampling__max_new_tokens": 100}, "together more than data.max_length"),
    ({"reward__path": "x"}, "reward.path and reward.function given"),
    ({"reward__function": "x"}, "should be module:function"),
    ({"eval__win_rate_prompts": -1}, "should be at least 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_cannot_be_sampled_or_rewarded_is_refused_at_once(changes, message):
    config_lib.check(config_of())
    with pytest.raises(UserError, match=message):
        config_lib.check(config_of(**changes))


def test_only_language_models_have_these_knobs():
    assert config_lib.max_new_tokens(config_of(sampling__max_new_tokens=0)) == 64
    # What is sampled at evaluations changes nothing in training.
    assert config_lib.temperature(config_of(sampling__temperature=0.5)) == 1
    assert config_lib.temperature(config_of("rloo", sampling__temperature=0.5)) == 0.5
    config = small("reward", eval__win_rate_prompts=2)
    assert "sampling" not in config
    with pytest.raises(UserError, match=r"only where algorithm.name is not 'reward'"):
        config_lib.check(config)


def test_the_closing_table_says_everything_once():
    both = {**dict.fromkeys(NAMES, 0.25), "eval/loss": 1.0}

    def titles(line):
        table = evaluation.closing_table([{"step": 0, **line}, {"step": 1, **line}])
        return {*table.columns[0].cells}

    on_data = titles(both)
    assert {"win rate against the reference", "reward of samples"} < on_data
    sampled = titles({**both, "eval/objective/scores": 0.5, "eval/objective/kl": 0.5})
    assert "win rate against the reference" in sampled
    assert not any("samples" in title for title in sampled)
