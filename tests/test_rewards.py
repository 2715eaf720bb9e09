"""Rewards: what they look at, where they are read, what is refused; and the chain of files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_classifiers import tokenizer_that_pads
from test_weights import QWEN3, write_model
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from jaxpref import config as config_lib, data as data_lib, evaluation, models, rewards
from jaxpref.data import read_examples
from jaxpref.errors import UserError
from jaxpref.knobs import REWARD_KNOBS
from jaxpref.models import ModelOutput, ScalarHead
from jaxpref.packing import Budget, Group
from jaxpref.rewards import Sampled, scoring, shaping
from jaxpref.rewards.model import same_tokens
from jaxpref.terminal import console
from jaxpref.tokenizer import TEMPLATES, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_device")

ASKED = [{"role": "user", "content": "Which soup?"}]
SAMPLED = [
    {
        "prompt": "Is it good?",
        "responses": [" Yes.", "", " Yes. Y"],
        "finish": ["stop", "stop", "length"],
        "logps": [-1.5, -0.5, -2.0],
        "answer": "yes",
    },
    {"prompt": "One?", "responses": [" 1"], "finish": ["length"], "logps": [-1.0], "answer": "1"},
]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A sequence classifier with one label and random weights, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("rewards")
    write_model(folder / "hf", QWEN3)
    model, params = models.from_pretrained(folder / "hf")
    model, params = models.with_scalar_head(model, params, jax.random.key(1))
    tokenizer = load_tokenizer("bytes")
    models.save_pretrained(model, params, folder / "classifier", tokenizer=tokenizer)
    return folder / "classifier"


def test_what_was_generated_is_scored_and_its_best_response_trained_on(classifier, tmp_path):
    """Three commands: generate, score, SFT. Nothing that the first one wrote is lost."""
    generated = write_lines(tmp_path / "generated.jsonl", SAMPLED)
    scored, again = tmp_path / "scored.jsonl", tmp_path / "again.jsonl"
    done = evaluation.score_file(classifier, generated, scored, max_length=64)
    lines = read_lines(scored)
    assert done.prompts == 2
    assert not any(done.counts.values())
    for given, line in zip(SAMPLED, lines, strict=True):
        assert given.items() <= line.items()
        assert len(line["scores"]) == len(given["responses"])
    assert lines[0]["where"] == f"{generated}:1"

    # Scored again, its first scores are replaced, and all else stays.
    spoiled = [{**line, "scores": [7.0] * len(line["scores"])} for line in lines]
    evaluation.score_file(
        classifier, write_lines(tmp_path / "x.jsonl", spoiled), again, max_length=64
    )
    assert read_lines(again) == lines

    examples, _ = read_examples(str(scored))
    assert [example.scores for example in examples] == [tuple(line["scores"]) for line in lines]
    config = config_lib.default("sft")
    config.data.update(path=str(scored), eval_fraction=0.0)
    tokenizer = load_tokenizer("bytes")
    data = data_lib.load(config, tokenizer, "sft").train
    for index, line in enumerate(lines):
        best = int(np.argmax(line["scores"]))
        # A response that was cut by length does not end.
        end = [tokenizer.eos_token_id] * (line["finish"][best] == "stop")
        expected = [*tokenizer(line["responses"][best], add_special_tokens=False).input_ids, *end]
        assert [ids.tolist() for ids in data.group(index).responses] == [expected]


def test_a_sampled_turn_may_say_nothing_or_be_cut_before_its_end(tmp_path):
    """In a conversation too: EOS alone, or no token that ends the turn."""
    line = {
        "prompt": ASKED,
        "responses": ["Leek", "Leek", ""],
        "finish": ["stop", "length", "stop"],
    }
    tokenizer = load_tokenizer("bytes", "alpaca")
    config = config_lib.default("reward")
    path = write_lines(tmp_path / "x.jsonl", [line])
    (example,), dataset, _ = data_lib.load_file(config, tokenizer, path)
    leek, eos = tokenizer("Leek", add_special_tokens=False).input_ids, tokenizer.eos_token_id
    found = [ids.tolist() for ids in dataset.group(0).responses]
    assert found == [[*leek, eos], leek, [eos]]
    assert example.record == line


def last_token(params, batch, key=None):
    """A reward of a hundred times the place in the sequence, plus the id that stands there."""
    hidden = jnp.stack([batch.tokens, batch.positions], -1).astype(jnp.float32)
    return ModelOutput(hidden, ScalarHead(jnp.asarray([1.0, 100.0])))


EOS, TURN = 1, 2
ENDS = {
    "EOS, which is also what pads": ([7, 8], [5, 6, EOS]),
    "another stop": ([7, 8], [5, TURN]),
    "EOS inside the prompt, and at its end": ([7, EOS, 8, EOS], [5, EOS]),
    "EOS at once": ([7, 8], [EOS]),
    "cut by length": ([7, 8], [5, 6, 5, 6]),
    "a stop that did not stop": ([7, 8], [TURN, 5, EOS]),
}


@pytest.mark.parametrize(("rows", "window"), [(1, 256), (2, 3), (8, 256)])
def test_the_score_is_read_at_the_last_token_whatever_it_is(rows, window, monkeypatch):
    """In blocks of any number of rows, of one shape, with several responses to a prompt."""
    monkeypatch.setattr(scoring, "_WINDOW", window)
    cases = [(np.asarray(p), [np.asarray(r)]) for p, r in ENDS.values()]
    cases.append((np.asarray([3]), [np.asarray([EOS]), np.asarray([4, 4, TURN]), np.asarray([9])]))
    groups = [Group(prompt, responses) for prompt, responses in cases]
    expected = [
        100 * (len(prompt) + len(response) - 1) + response[-1]
        for prompt, responses in cases
        for response in responses
    ]
    score, shapes = rewards.rewards_of(last_token), set()

    def rewarded(batch):
        shapes.add((batch.tokens.shape, batch.lengths.shape))
        return score({}, batch)

    found = rewards.score(rewarded, groups, Budget(8, 8), rows=rows)
    assert found.tolist() == expected
    assert shapes == {((1, rows, 8), (1, len(expected), 1))}


def test_rewards_of_a_model_do_not_depend_on_the_batch_size(classifier, tmp_path):
    path = write_lines(tmp_path / "x.jsonl", SAMPLED)
    scores = []
    for rows in (1, 16):
        evaluation.score_file(
            classifier, path, tmp_path / "out.jsonl", max_length=64, batch_size=rows
        )
        lines = read_lines(tmp_path / "out.jsonl")
        scores.append([score for line in lines for score in line["scores"]])
    np.testing.assert_allclose(scores, scores[:1] * 2, atol=2e-6)
    assert np.ptp(scores[0]) > 1e-3


SAID = {"prompt": "Which soup?", "rejected": "None", "subset": "donotanswer"}
COLOR = {"prompt": "A color?", "rejected": ["two", ""], "subset": "Ties"}
BENCHMARK = {
    1: [
        *({**SAID, "chosen": f"Leek{i}"} for i in range(3)),
        {**SAID, "chosen": "Pea", "subset": "hep-js"},
    ],
    2: [
        {"prompt": "2+3?", "chosen": ["5"], "rejected": ["4", "", "6"], "subset": "Math"},
        {**COLOR, "chosen": ["red"], "id": "ref:1"},
        {**COLOR, "chosen": ["red", "blue"], "id": "tied:1"},
    ],
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_reward_bench_is_scored_and_summed_up(version, classifier, tmp_path):
    """What is printed is what follows from the scores that are written."""
    lines = BENCHMARK[version]
    path = write_lines(tmp_path / "x.jsonl", lines)
    done = evaluation.score_file(
        classifier,
        path,
        tmp_path / "out.jsonl",
        data_format="reward_bench",
        max_length=64,
        chat_template="hh",
    )
    assert not any(done.counts.values())
    written = read_lines(tmp_path / "out.jsonl")
    for given, line in zip(lines, written, strict=True):
        assert {**line, "prompt": given["prompt"]}.items() >= given.items()
        count = len(given["chosen"]) + len(given["rejected"]) if version == 2 else 2
        assert len(line["scores"]) == len(line["responses"]) == count
    if version == 1:
        right = [line["scores"][0] > line["scores"][1] for line in written]
        assert done.benchmark.sections == {
            "Safety": pytest.approx(np.mean(right[:3])),
            "Reasoning": float(right[3]),
        }
    else:
        assert set(done.benchmark.subsets) == {"Math", "Ties"}
        best = np.argmax(written[0]["scores"]) == 0
        assert done.benchmark.subsets["Math"] == (1, float(best))
    with console.capture() as said:
        console.print(evaluation.reward_bench.report(done.benchmark))
    assert f"{done.benchmark.score:.3f}" in said.get()
    assert "this is not the benchmark's score: the file lacks" in said.get()


def sampled_by(tokenizer, prompts=None, *, texts=None, finished=None, records=()):
    """What a policy with this tokenizer has sampled."""
    prompts = prompts or ["Is it good?", "Is it good?", "One?"]
    texts, finished = texts or [" Yes", "", " 1"], finished or [True, True, False]

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    said = [
        [*ids(t), *[tokenizer.eos_token_id] * end] for t, end in zip(texts, finished, strict=True)
    ]
    asked = [ids(p if isinstance(p, str) else p[-1]["content"]) for p in prompts]
    return Sampled(
        prompts,
        texts,
        [np.asarray(x, np.int32) for x in asked],
        [np.asarray(x, np.int32) for x in said],
        np.asarray(finished),
        records,
    )


def group_of(**knobs):
    """The group `reward` of a config."""
    defaults = {key.partition(".")[2]: knob.default for key, knob in REWARD_KNOBS.items()}
    return ConfigDict({**defaults, **knobs})


def test_a_reward_model_gives_the_same_by_token_ids_and_through_text(classifier, monkeypatch):
    """The policy's ids are read as they are where they mean the same, else the texts are."""
    policy, other = load_tokenizer("bytes"), tokenizer_that_pads("eos")
    assert same_tokens(policy, load_tokenizer("bytes"))
    assert not same_tokens(other, policy)
    reward = group_of(path=str(classifier), batch_size=2)
    by_ids, through_text = (
        rewards.build(reward, tokenizer, max_length=32) for tokenizer in (policy, other)
    )
    assert by_ids.names == through_text.names == ("classifier",)
    ids, texts = by_ids(sampled_by(policy)), through_text(sampled_by(other))
    np.testing.assert_allclose(ids.total, texts.total, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ids.total, ids.by_name["classifier"])
    assert ids.total.dtype == np.float32
    assert np.ptp(ids.total) > 1e-3
    # In half the memory it says nearly the same.
    half = rewards.build(group_of(path=str(classifier), dtype="bfloat16"), policy, max_length=32)
    np.testing.assert_allclose(half(sampled_by(policy)).total, ids.total, atol=0.1)


def test_a_reward_model_that_cannot_read_conversations_is_refused_with_both_names(classifier):
    other = tokenizer_that_pads("eos")
    other.chat_template, other.name_or_path = TEMPLATES["hh"], "the/policy"
    with pytest.raises(UserError, match=r"ByT5Tokenizer of .* of the/policy.* no chat"):
        rewards.build(group_of(path=str(classifier)), other, max_length=32, conversations=True)


def test_a_reward_model_that_would_not_see_all_of_a_response_is_refused(classifier):
    reward = group_of(path=str(classifier), max_length=16)
    with pytest.raises(UserError, match=r"reward.max_length is 16, .* may have 32 tokens"):
        rewards.build(reward, load_tokenizer("bytes"), max_length=32)


def test_a_reward_model_that_gives_nan_writes_nothing(classifier, tmp_path, monkeypatch):
    nan = np.asarray([1.0, np.nan, 1.0, 1.0], np.float32)
    monkeypatch.setattr(rewards.RewardModel, "score", lambda *_, **options: nan)
    path = write_lines(tmp_path / "x.jsonl", SAMPLED)
    with pytest.raises(UserError, match=r"x.jsonl:1: the reward model gives 1.0, nan, 1.0, which"):
        evaluation.score_file(classifier, path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_padding_token_more_makes_no_other_tokenizer(monkeypatch):
    policy, padded, renamed = (tokenizer_that_pads("eos") for _ in range(3))
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_tokens(policy, padded)
    assert not same_tokens(padded, policy)
    renamed.eos_token = "<pad>"
    assert not same_tokens(policy, renamed)
    ids = policy.get_vocab()
    swapped = {**ids, "a": ids["b"], "b": ids["a"]}
    monkeypatch.setattr(renamed, "get_vocab", lambda: swapped)
    renamed.eos_token = policy.eos_token
    assert not same_tokens(policy, renamed)


def test_a_larger_vocabulary_is_another_tokenizer():
    """Its first ids are those of the smaller one, but it reads the same text as longer tokens."""
    small, large = (bpe_tokenizer(size) for size in (260, 280))
    known = large.get_vocab()
    assert all(known[name] == id for name, id in small.get_vocab().items())
    assert len(large("the tea, the tea").input_ids) < len(small("the tea, the tea").input_ids)
    assert not same_tokens(small, large)
    assert same_tokens(small, bpe_tokenizer(260))


def bpe_tokenizer(size):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["the tea, the toast"] * 4, vocab_size=size, special_tokens=["</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>")


def length_of(prompts, completions, answer=None, **columns):
    return [len(text) + (answer is not None and answer[0] == "yes") for text in completions]


def contents(prompts, completions, completion_ids, finished, **columns):
    assert not columns
    assert prompts == [ASKED, "p"]
    assert completions == [[{"role": "assistant", "content": "Leek"}], "Leek"]
    assert completion_ids == [ids.tolist() for ids in sampled_by_two().response_ids]
    return jnp.asarray([1.0, 0.5]) * jnp.asarray(finished)


def sampled_by_two():
    return sampled_by(
        load_tokenizer("bytes"), [ASKED, "p"], texts=["Leek", "Leek"], finished=[True, False]
    )


def test_a_function_is_called_as_trl_calls_it():
    reward = rewards.build(
        group_of(function="test_rewards:contents"), load_tokenizer("bytes"), max_length=32
    )
    assert reward.names == ("contents",)
    assert reward(sampled_by_two()).total.tolist() == [1.0, 0.0]


def test_several_rewards_are_added_by_weight_and_each_is_told_by_its_name():
    mixture = (
        {"function": "test_rewards:length_of", "weight": -0.5},
        {"function": "test_rewards:length_of", "name": "again", "weight": 2},
    )
    reward = rewards.build(group_of(mixture=mixture), load_tokenizer("bytes"), max_length=32)
    sampled = sampled_by(load_tokenizer("bytes"), records=[{"answer": "yes"}] * 2 + [{}])
    scores = reward(sampled)
    lengths = np.asarray([5.0, 1.0, 3.0])
    assert set(scores.by_name) == {"length_of", "again"} == set(reward.names)
    for values in scores.by_name.values():
        np.testing.assert_array_equal(values, lengths)
    np.testing.assert_array_equal(scores.total, 1.5 * lengths)


BAD = {
    "raises": (lambda p, c, **_: [1 / (t != "") for t in c], "raised ZeroDivisionError.*'Empty.'"),
    "nan": (
        lambda p, c, **_: [float("nan") if t == "" else 1.0 for t in c],
        "it gave nan for a response to the prompt 'Empty.' .1 of 3 are not",
    ),
    "infinite in float32": (
        lambda p, c, **_: [1e39 if t == "" else 1.0 for t in c],
        r"it gave 1e\+39 for a response to the prompt 'Empty",
    ),
    "none": (lambda p, c, **_: [1.0, None, 2.0], "it gave None for a response to the prompt 'Emp"),
    "text": (lambda p, c, **_: ["1", "high", "2"], "finite numbers; it gave '1'"),
    "too few": (lambda p, c, **_: [1.0], r"each of 3 responses; it gave .* shape \(1,\) .*'Full"),
    "one number": (lambda p, c, **_: 1.0, r"it gave an array of shape \(\)"),
    "a table": (lambda p, c, **_: np.zeros((3, 1)), r"it gave an array of shape \(3, 1\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_function_that_gives_no_rewards_is_refused_with_the_prompt(case):
    function, message = BAD[case]
    named = lambda prompts, completions, **rest: function(prompts, completions, **rest)  # noqa: E731
    prompts = ["Full?" + 100 * "x", "Empty?", "Full?"]
    sampled = sampled_by(load_tokenizer("bytes"), prompts, texts=["a", "", "b"])
    with pytest.raises(UserError, match=f"the function 'f' .*{message}") as caught:
        rewards.from_function("the function 'f'", named)(sampled)
    assert "x" * 80 not in str(caught.value)


SOURCES = {
    "none": ({}, "no reward given"),
    "two": ({"path": "a", "function": "m:f"}, "reward.path and reward.function given"),
    "no function": ({"function": "len"}, "is 'len'; it should be module:function"),
    "no entry": ({"mixture": ({"weight": 1.0},)}, "a dict with a 'path' or a 'function'; got"),
    "a typo": ({"mixture": ({"path": "a", "wieght": 1.0},)}, "Did you mean 'weight'"),
    "no weight": ({"mixture": ({"path": "a", "weight": 0},)}, "other than 0; got 0"),
    "one name": ({"mixture": ({"path": "a/x"}, {"path": "b/x"})}, r"of the same name .x, x."),
    "no module": ({"function": "no_such_module:f"}, "cannot be imported .*no_such_module"),
    "no such function": ({"function": "math:f"}, "cannot be imported .*'f'"),
    "not callable": ({"function": "math:pi"}, "is of type float, no function"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_rewards_that_cannot_be_had_are_refused(case):
    knobs, message = SOURCES[case]
    with pytest.raises(UserError, match=message):
        rewards.build(group_of(**knobs), load_tokenizer("bytes"), max_length=32)


def test_running_moments_do_not_depend_on_how_values_were_divided():
    values = 1e6 + np.random.default_rng(0).normal(size=50)
    for dtype, tolerance in ((np.float64, 1e-9), (np.float32, 1e-6)):
        moments = rewards.no_moments(dtype)
        for part in np.split(values, [0, 1, 7, 30]):
            moments = shaping.update(moments, part)
        assert moments.count == 50
        assert moments.mean.dtype == dtype
        np.testing.assert_allclose(moments.mean, values.mean(), rtol=tolerance)
        if dtype == np.float64:
            np.testing.assert_allclose(moments.variance, values.var(ddof=1), rtol=1e-6)
    normal = shaping.normalise(values, shaping.update(rewards.no_moments(), values))
    assert normal.mean() == pytest.approx(0, abs=1e-6)
    assert normal.std(ddof=1) == pytest.approx(1, rel=1e-6)
    # One value deviates from nothing.
    one = np.ones(1)
    assert shaping.normalise(one, shaping.update(rewards.no_moments(), one)).tolist() == [0.0]


def test_rewards_are_normalised_then_clipped_then_charged_for_length_and_for_being_cut():
    knobs = {"normalize": True, "clip": 0.5, "length_penalty": 0.01, "truncation_penalty": 2.0}
    reward = rewards.build(
        group_of(function="test_rewards:length_of", **knobs), load_tokenizer("bytes"), max_length=32
    )
    sampled = sampled_by(load_tokenizer("bytes"))
    scores = reward(sampled)
    assert scores.total.tolist() == [4.0, 0.0, 2.0]
    moments = shaping.update(rewards.no_moments(), scores.total)
    shaped = reward.shaped(scores, sampled, moments)
    assert (moments.count, moments.mean, moments.m2) == (3.0, 2.0, 8.0)
    # " Yes" and EOS; EOS alone; " 1", cut by length.
    expected = [0.5 - 0.05, -0.5 - 0.01, 0.0 - 0.02 - 2.0]
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)
    assert shaping.clip(scores.total, 0).tolist() == scores.total.tolist()
