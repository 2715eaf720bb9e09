"""What is to be beaten in experiments, and who says what beats it."""

import json

import numpy as np
import pytest
from judge_server import score_of, serving

from jaxpref.data import synthetic
from jaxpref.errors import UserError
from jaxpref.experiments.baselines import Generated, Judged
from jaxpref.rewards import Sampled

pytest.importorskip("openai")
LINES = [
    {"prompt": "Post: a cat sat. TL;DR:", "completion": " A cat sat."},
    {"prompt": "Post: it rained. TL;DR:", "completion": " Rain."},
    {"prompt": "Post: a cat sat. TL;DR:", "completion": " The cat."},
    {"prompt": "Post: so what. TL;DR:", "completion": " What?"},
]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


@pytest.fixture
def test_set(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return {"path": str(path)}


def sampled(responses, prompts=("?",)):
    count = len(responses)
    ids = [np.ones(2, np.int32)] * count
    return Sampled(list(prompts) * count, responses, ids, ids, np.ones(count, bool))


def judge_at(server, **changes):
    return {"name": "endpoint:m", "base_url": server.url, "template": "summary", **changes}


def test_a_judge_compares_with_each_prompts_first_response(tmp_path, test_set, capsys):
    responses = [" Cats sit.", " A cat sat.", " It rains.", " Wet."]
    with serving(lambda question: verdict(question)) as server:
        found = Judged(tmp_path / "w", judge_at(server), test_set)
        assert found.prompts(2) == [LINES[0]["prompt"], LINES[1]["prompt"]]
        values = found.values(sampled(responses), [0, 0, 1, 1])
        asked = len(server.requests)
        # What is equal to the baseline is a tie, about which nobody is asked.
        assert asked == 2 * 3
        again = Judged(tmp_path / "w", judge_at(server), test_set)
        np.testing.assert_array_equal(
            again.values(sampled(responses), [0, 0, 1, 1])["win_rate"], values["win_rate"]
        )
        assert len(server.requests) == asked
    expected = [score_of("Cats sit.", "A cat sat."), 0.5]
    expected += [score_of(x, "Rain.") for x in ("It rains.", "Wet.")]
    np.testing.assert_array_equal(values["win_rate"], expected)
    np.testing.assert_array_equal(values["no_verdict"], 0)
    assert "3 prompts, 1 prompt again" in capsys.readouterr().out


def verdict(question):
    """The verdict of `judge_server.score_of`, in the form of the template `summary`."""
    from judge_server import responses_in

    return f"Preferred: {'BA'[int(score_of(*responses_in(question)))]}"


def test_no_verdict_is_a_tie_that_is_counted(tmp_path, test_set):
    with serving(lambda question: "Both are fine.") as server:
        judge = judge_at(server, attempts=1)
        values = Judged(tmp_path, judge, test_set).values(sampled([" Dry."]), [1])
    assert (values["win_rate"].tolist(), values["no_verdict"].tolist()) == ([0.5], [1.0])


def test_what_is_compared_is_part_of_a_job(tmp_path, test_set):
    with serving() as server, serving() as moved:
        one = Judged(tmp_path, judge_at(server), test_set).settings
        assert Judged(tmp_path, judge_at(moved), test_set).settings == one
        other = judge_at(server, template="dialogue")
        assert Judged(tmp_path, other, test_set).settings != one


def test_what_cannot_be_used_is_refused_before_anything_is_asked(tmp_path, test_set):
    with serving() as server:
        judge = judge_at(server)
        for test, message in (
            ({"path": ""}, "config.test.path is empty"),
            ({"path": "nowhere.jsonl"}, "config.test.path.: no such file"),
            ({**test_set, "split": "test"}, "is a single file"),
        ):
            with pytest.raises(UserError, match=message):
                Judged(tmp_path, judge, test)
        with pytest.raises(UserError, match=r"3 different prompts.*4 are asked for"):
            Judged(tmp_path, judge, test_set).prompts(4)
        only = Judged(tmp_path, judge, test_set, keep=lambda example: "cat" in example.prompt)
        assert only.prompts(1) == [LINES[0]["prompt"]]
        with pytest.raises(UserError, match="1 different prompts"):
            only.prompts(2)
        assert not server.requests


def test_the_true_reward_compares_with_the_chosen_response():
    baseline = Generated(shifted=True)
    prompts = list(baseline.prompts(20))
    pairs = synthetic.generate(20, 1, shifted=True)
    for place, expected in ((0, 0.5), (1, None)):
        said = [pair.responses[place] for pair in pairs]
        found = baseline.values(sampled(said)._replace(prompts=prompts), range(20))
        true = np.array([pair.true_rewards for pair in pairs])
        np.testing.assert_allclose(found["reward"], true[:, place])
        wins = (1 + np.sign(np.round(true[:, place] - true[:, 0], 6))) / 2
        np.testing.assert_array_equal(found["win_rate"], wins)
        assert expected is None or (wins == expected).all()


def test_samples_that_are_taken_keep_all_that_is_theirs():
    records = [{"n": i} for i in range(3)]
    three = sampled(["a", "b", "c"])._replace(
        response_ids=[np.arange(i + 1) for i in range(3)],
        finished=np.array([True, False, True]),
        records=records,
    )
    found = three.take([2, 1])
    assert found.responses == ["c", "b"]
    assert found.lengths.tolist() == [3, 2]
    assert found.finished.tolist() == [True, False]
    assert found.records == [{"n": 2}, {"n": 1}]
    assert three._replace(records=()).take([0]).records == ()
