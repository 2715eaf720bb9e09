"""Files before judges: what is compared with what, functions, reward models, and persons."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from test_rewards import read_lines, write_lines
from test_weights import QWEN3, write_model

from jaxpref import evaluation, models
from jaxpref.errors import UserError
from jaxpref.evaluation import judges
from jaxpref.evaluation.judges import Comparison, Reading, Verdicts, judging, person, report
from jaxpref.evaluation.judges.compare import compare_files
from jaxpref.evaluation.judges.function import from_function
from jaxpref.sampling import Sampling
from jaxpref.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_device")


def longer(prompts, firsts, seconds, **columns):
    """The longer response is better."""
    return [(1 + np.sign(len(a) - len(b))) / 2 for a, b in zip(firsts, seconds, strict=True)]


LONGER = from_function("the longer one", longer)


def lines_of(*responses):
    """A file's lines, with the responses to prompt 0, 1, ..."""
    return [{"prompt": f"Question {i}?", "responses": said} for i, said in enumerate(responses)]


def judged(tmp_path, a, b, judge=LONGER, **options):
    """Lines before a judge."""
    paths = [write_lines(tmp_path / f"{name}.jsonl", x) for name, x in (("a", a), ("b", b))]
    return evaluation.judge_files(*paths, judge, tmp_path / "out.jsonl", **options)


ASKED = [{"role": "user", "content": "Which soup?"}]
A = lines_of(["leek soup"], ["pea"], ["stew", "stew, or two"], [""])
B = lines_of(["leek"], ["pea"], ["a big pie"], ["no"])


def test_what_is_written_says_what_the_rate_is_of(tmp_path):
    found = judged(tmp_path, A, B)
    # A win; equal responses; a loss and a win of two samples, which are averaged; a loss.
    assert [line["scores"] for line in read_lines(tmp_path / "out.jsonl")] == [
        [1.0],
        [0.5],
        [0.0, 1.0],
        [0.0],
    ]
    assert found.win_rate.rate == (1 + 0.5 + 0.5 + 0) / 4
    assert found.win_rate[2:] == (1, 2, 1)
    assert (found.prompts, found.comparisons, found.comparisons_without_score) == (4, 5, 0)
    assert found.position_bias == 0
    assert (found.length_a, found.length_b) == ((9 + 3 + 8 + 0) / 4, (4 + 3 + 9 + 2) / 4)
    assert found.counts["comparisons_with_an_empty_response_of_A"] == 1
    assert found.counts["comparisons_of_equal_responses"] == 1
    line = read_lines(tmp_path / "out.jsonl")[2]
    assert line["where"] == f"{tmp_path}/a.jsonl:3"
    assert line["responses_b"] == ["a big pie", "a big pie"]
    assert (line["lengths_a"], line["a_first"], line["a_second"]) == ([4, 12], [0, 1], [0, 1])
    summary = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    assert summary["win_rate"]["rate"] == found.win_rate.rate
    assert summary["judge"] == "a function"


SAID = st.lists(st.lists(st.text("xy", max_size=3), min_size=2, max_size=2), min_size=2, max_size=6)


@settings(max_examples=10, deadline=None)
@given(SAID, st.randoms())
def test_swapping_the_files_gives_1_less_and_a_file_is_as_good_as_itself(
    tmp_path_factory, said, random
):
    folder = tmp_path_factory.mktemp("swapped")
    a, b = (lines_of(*([texts[i]] for texts in said)) for i in range(2))
    ours = judged(folder, a, b)
    random.shuffle(a)
    theirs = judged(folder, b, a)
    assert ours.win_rate.rate == pytest.approx(1 - theirs.win_rate.rate, abs=1e-12)
    assert ours.win_rate.interval.low == pytest.approx(1 - theirs.win_rate.interval.high)
    itself = judged(folder, a, a)
    assert itself.win_rate.rate == itself.at_equal_lengths.rate == 0.5
    assert itself.position_bias is None


def test_a_judge_of_places_calls_ties_and_has_a_bias_of_1(tmp_path):
    first = from_function("first", lambda prompts, **_: [1.0] * len(prompts))
    found = judged(tmp_path, A, B, first)
    assert (found.win_rate.rate, found.win_rate.ties, found.position_bias) == (0.5, 4, 1.0)
    second = from_function("second", lambda prompts, **_: np.zeros(len(prompts)))
    assert judged(tmp_path, A, B, second).position_bias == -1.0


def test_everything_won_is_told_with_the_bound(tmp_path):
    found = judged(tmp_path, lines_of(*[["longer"]] * 3), lines_of(*[["no"]] * 3))
    assert found.win_rate.rate == 1
    assert found.at_equal_lengths.bounded
    assert "held at a bound" in [*judges.table(found, "a", "b", "x").columns[2].cells]


def test_verdicts_that_are_missing_are_counted_and_bound_the_rate():
    comparisons = [Comparison(n, f"f:{n}", "p", "p", "a", "bb") for n in (0, 0, 1, 2, 3)]
    nan = np.nan
    first, second = np.array([1, nan, 1, nan, 0]), np.array([1, 1, 0, nan, 1])
    found = report.judged(comparisons, Verdicts(first, second), {})
    # Prompt 0 by its first sample alone; prompt 2 has none.
    assert found.win_rate.rate == (1 + 0.5 + 0.5) / 3
    assert (found.prompts, found.prompts_without_score, found.comparisons_without_score) == (
        3,
        1,
        2,
    )
    assert found.if_all_lost == pytest.approx(((1 + 0.5) / 2 + 0.5 + 0 + 0.5) / 4)
    assert found.if_all_won == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    # Of what was asked in both orders: 0, 1, -1.
    assert found.position_bias == 0
    cells = [*judges.table(found, "a", "b", "x").columns[1].cells]
    assert "2 of 5" in cells
    with pytest.raises(UserError, match="4 of 5 comparisons have no verdict"):
        report.judged(comparisons, Verdicts(np.array([1, *[nan] * 4])), {})


def test_files_meet_by_their_prompts_whatever_form_they_have(tmp_path):
    """AlpacaEval's records, what `generate` makes of them, texts, and conversations."""
    alpaca = [
        {"instruction": "Which soup?", "output": "Leek.", "generator": "g"},
        {"instruction": "Why?", "output": "", "generator": "g"},
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(alpaca))
    wrapped = evaluation.judges.compare._wrapped
    others = [
        [{"prompt": "Why?", "responses": ["So."]}, {"prompt": ASKED, "responses": ["Pea.", "No."]}],
        [
            {**x, "prompt": wrapped(x, ""), "responses": [y], "finish": ["length"]}
            for x, y in zip(alpaca, ("Pea.", "So."), strict=True)
        ],
    ]
    for lines in others:
        compared = compare_files(path, write_lines(tmp_path / "b.jsonl", lines))
        assert compared.comparisons[0].text == "Which soup?"
        assert {(x.a, x.b) for x in compared.comparisons} >= {("Leek.", "Pea."), ("", "So.")}
        assert compared.counts["comparisons_with_an_empty_response_of_A"] == 1
    assert [x.finished for x in compared.comparisons] == [(True, False)] * 2
    talk = [*ASKED, {"role": "assistant", "content": "Pea."}, {"role": "user", "content": "No?"}]
    talks = write_lines(
        tmp_path / "c.jsonl", [{"prompt": x, "responses": ["y"]} for x in (talk, ASKED)]
    )
    texts = [x.text for x in compare_files(talks, talks).comparisons]
    assert texts == ["User: Which soup?\n\nAssistant: Pea.\n\nUser: No?", "Which soup?"]


def test_a_prompt_that_occurs_twice_is_one_prompt_with_two_samples(tmp_path):
    twice = [*lines_of(["x"], ["yy"]), *lines_of(["xxx"])]
    found = judged(tmp_path, twice, [*lines_of(["vv"], ["v"]), *lines_of(["vv"])])
    assert (found.prompts, found.comparisons, found.win_rate.ties) == (2, 3, 1)
    assert found.counts["prompts_that_occur_several_times"] == 1


REFUSED = {
    "other prompts": (
        lines_of(*[["x"]] * 4),
        [*lines_of(["x"], ["x"]), {"prompt": "Else?", "responses": ["x"]}],
        r"2 of the 4 prompts of .*a.jsonl are not in .*b.jsonl, the first at .*a.jsonl:3: "
        r"'Question 2\?'. 1 of the 3 prompts of .*b.jsonl .* 'Else\?'",
    ),
    "duplicates": (
        lines_of(["x"], ["x"]) + lines_of(["x"]),
        lines_of(["x"], ["x"]),
        r"a.jsonl:1: the prompt occurs 2 times in .*a.jsonl and 1 times in .*b.jsonl",
    ),
    "numbers of responses": (
        lines_of(["x"], ["x", "y"]),
        lines_of(["x"], ["x", "y", "z"]),
        r"a.jsonl:2: the prompt has 2 responses here and 3 at .*b.jsonl:2",
    ),
    "one prompt": (lines_of(["x"]), lines_of(["y"]), "has one prompt"),
    "pairs": (
        [{"prompt": "p", "chosen": "x", "rejected": "y"}],
        lines_of(["x"]),
        r"a.jsonl:1: has the columns 'chosen', 'prompt', 'rejected'. A judge reads",
    ),
    "no response": (lines_of([], ["x"]), lines_of(["x"], ["x"]), "should not be empty"),
    "no text": (lines_of([1], ["x"]), lines_of(["x"], ["x"]), "should be text; got int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_fit_are_refused_before_the_judge_is_asked(case, tmp_path):
    a, b, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        judged(tmp_path, a, b)
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_is_refused_first(tmp_path):
    for output, message in (("a.jsonl", "is read, so it cannot be"), ("no/x", "should be a file")):
        with pytest.raises(UserError, match=message):
            evaluation.judge_files(
                str(tmp_path / "a.jsonl"), "b.jsonl", "terminal", tmp_path / output
            )
    with pytest.raises(UserError, match="no such file"):
        evaluation.judge_files("no.jsonl", "b.jsonl", "terminal", tmp_path / "x")
    with pytest.raises(UserError, match="both policies"):
        evaluation.judge_files("one", "two", "terminal", tmp_path / "x")


def test_another_judging_is_not_written_over(tmp_path):
    """Neither with another judge nor with other files; the same one may be done again."""
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        judged(tmp_path, A, B, "test_judges:longer")
    a, b = (str(tmp_path / f"{name}.jsonl") for name in "ab")
    before = output.read_bytes()
    with pytest.raises(UserError, match=r"holds another judging, whose judge was test_judges:lon"):
        evaluation.judge_files(a, b, "endpoint:m", output)
    with pytest.raises(UserError, match=r"whose a was .*Give another output"):
        evaluation.judge_files(b, a, "test_judges:longer", output)
    assert output.read_bytes() == before


WRONG = {
    "raises": (lambda prompts, **_: [1 / ("2" not in p) for p in prompts], "Zero.* 'Question 2"),
    "nan": (lambda prompts, **_: [float("nan" if "2" in p else 1) for p in prompts], "nan.*tion 2"),
    "above 1": (lambda prompts, **_: [2] * len(prompts), r"from 0 to 1; it gave 2 .*Question 0"),
    "length": (lambda prompts, **_: [1], r"each of 3 pairs .* shape \(1,\) .*Question 0"),
    "no number": (lambda prompts, **_: ["A"] * len(prompts), "gave 'A' for"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_function_that_gives_no_scores_is_told_with_the_prompt(case, tmp_path):
    function, message = WRONG[case]
    judge = from_function("the judge 'f'", function)
    with pytest.raises(UserError, match=f"the judge 'f' .*{message}"):
        judged(tmp_path, lines_of(["a"], ["a"], ["a"]), lines_of(["b"], ["b"], ["b"]), judge)


def test_a_function_sees_the_prompts_columns_but_not_whose_a_response_is(tmp_path):
    a, b = lines_of(["x"], ["x"]), lines_of(["yy"], ["yy"])
    a[0] |= {"answer": "7", "logps": [-1.0], "who": "ours", "finish": ["length"]}
    b[0] |= {"answer": "7", "logps": [-2.0], "who": "theirs", "hint": "odd"}
    seen = []

    def judge(prompts, firsts, seconds, **columns):
        seen.append((firsts, seconds, columns))
        return [0.5, 0.5]

    judged(tmp_path, a, b, from_function("it", judge))
    columns = {"answer": ["7", None], "hint": ["odd", None]}
    assert seen == [(["x"] * 2, ["yy"] * 2, columns), (["yy"] * 2, ["x"] * 2, columns)]


def test_two_judgings_of_the_same_responses_are_compared(tmp_path):
    judged(tmp_path, A, B)
    other = tmp_path / "other.jsonl"
    (tmp_path / "out.jsonl").rename(other)
    assert judged(tmp_path, A, B, compare=str(other)).agreement[::2] == (1.0, 1.0)
    shorter = from_function("shorter", lambda firsts, seconds, **_: longer(0, seconds, firsts))
    # The two are of one mind where they call ties: equal responses, and a win and a loss.
    found = judged(tmp_path, A, B, shorter, compare=str(other))
    assert found.agreement.share == 0.5
    with pytest.raises(UserError, match=r"other.jsonl: has a score for 1 of these prompts"):
        judged(tmp_path, B, A, compare=str(other))
    with pytest.raises(UserError, match=r"a.jsonl:1: is no line of a judging's output"):
        judged(tmp_path, A, B, compare=str(tmp_path / "a.jsonl"))


def test_another_judging_of_other_responses_is_refused_before_anybody_is_asked(tmp_path):
    one, two = lines_of(["long one"], ["pea"]), lines_of(["x"], ["y"])
    judged(tmp_path, one, two)
    other = tmp_path / "other.jsonl"
    (tmp_path / "out.jsonl").rename(other)

    def never(comparisons):
        raise AssertionError("somebody was asked")

    third = lines_of(["u"], ["v"])
    for sides, message in (((two, one), "A and B the other way round"), ((one, third), "nothing")):
        with pytest.raises(UserError, match=f"other.jsonl: judges other responses.*{message}"):
            judged(tmp_path, *sides, never, compare=str(other))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model and a language model of the same shape, with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    write_model(folder / "model", QWEN3)
    model, params = models.from_pretrained(folder / "model")
    model, params = models.with_scalar_head(model, params, jax.random.key(1))
    models.save_pretrained(model, params, folder / "rewards", tokenizer=load_tokenizer("bytes"))
    return folder


def test_a_reward_model_prefers_the_higher_reward(folder, tmp_path):
    a, b = lines_of(["x", "leek"], ["pea"], ["", "z"]), lines_of(["pie"], ["tea"], ["z", "z"])
    a[1]["finish"] = ["length"]
    judged(tmp_path, a, b, str(folder / "rewards"))
    for name in "ab":
        # In one row as in another, what `score` reads are responses that were sampled.
        lines = read_lines(tmp_path / f"{name}.jsonl")
        given = [{"finish": ["stop"] * len(x["responses"]), **x} for x in lines]
        write_lines(tmp_path / f"{name}.jsonl", given)
        evaluation.score_file(
            folder / "rewards", str(tmp_path / f"{name}.jsonl"), tmp_path / f"{name}.scored.jsonl"
        )
    ours, theirs = (
        [x["scores"] for x in read_lines(tmp_path / f"{name}.scored.jsonl")] for name in "ab"
    )
    lines = read_lines(tmp_path / "out.jsonl")
    for line, one, other in zip(lines, ours, theirs, strict=True):
        wins = np.sign(np.subtract(one, other))
        np.testing.assert_array_equal(line["scores"], (1 + wins) / 2)
    assert lines[2]["scores"][1] == 0.5
    assert "a_first" not in lines[0]


@pytest.mark.long
def test_a_policy_is_sampled_first_and_once(folder, tmp_path, monkeypatch):
    """With the prompts of the other file; a second call has what was sampled."""
    b = write_lines(tmp_path / "b.jsonl", lines_of(["x"], ["y"]))
    output = tmp_path / "out.jsonl"
    reading = Reading(sampling=Sampling(max_new_tokens=3))
    args = (str(folder / "model"), b, LONGER, output)
    found = evaluation.judge_files(*args, reading=reading, seed=3)
    said = read_lines(tmp_path / "out.jsonl.a.jsonl")
    lines = read_lines(output)
    assert [x["responses_a"] for x in lines] == [x["responses"] for x in said]

    def sampled_again(*_):
        raise AssertionError

    monkeypatch.setattr(evaluation.generation.Sampler, "as_they_end", sampled_again)
    assert evaluation.judge_files(*args, reading=reading, seed=3) == found
    another = tmp_path / "another.jsonl"
    with pytest.raises(UserError, match="nothing is sampled; leave"):
        evaluation.judge_files(b, b, LONGER, another, reading=Reading(prompts=b))


class Typed:
    """A person who types lines, and what the terminal shows before each."""

    def __init__(self, capsys, lines):
        self.capsys, self.lines, self.seen = capsys, [*lines], []

    def __call__(self, question):
        assert "1, 2, t for a tie, q to stop" in question
        self.seen.append(self.capsys.readouterr().out)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def test_a_person_answers_blind_and_goes_on_where_he_stopped(tmp_path, capsys):
    a = lines_of(*([f"ours {i}"] for i in range(8)))
    b = lines_of(*([f"theirs {i}"] for i in range(8)))

    def judge(lines, **options):
        typed = Typed(capsys, lines)
        return typed, person.from_person(tmp_path / "out.answers", ask=typed, **options)

    typed, one = judge(["1", "what?", " T ", "q"])
    with pytest.raises(KeyboardInterrupt, match="6 of 8 comparisons remain, so there is no rate"):
        judged(tmp_path, a, b, one)
    assert not (tmp_path / "out.jsonl").exists()
    first = typed.seen
    assert "Prompt 1 of 8" in first[0]
    assert first[0].index("Response 1") < first[0].index("Response 2")
    assert not any(name in "".join(first) for name in ("a.jsonl", "b.jsonl"))

    # The end of the input stops it, too.
    with pytest.raises(KeyboardInterrupt, match="6 of 8"):
        judged(tmp_path, a, b, judge([])[1])
    typed, other = judge(["1"] * 6)
    found = judged(tmp_path, a, b, other)
    shown = [first[0], first[1], *typed.seen]
    ours_first = [text.index("ours") < text.index("theirs") for text in shown]
    assert 0 < sum(ours_first) < 8
    expected = [float(ours) for ours in ours_first]
    expected[1] = 0.5
    scores = [line["scores"] for line in read_lines(tmp_path / "out.jsonl")]
    assert scores == [[score] for score in expected]
    assert found.position_bias is None

    # All is known of the swapped files, too, and of the same ones with nobody there.
    assert judged(tmp_path, b, a, judge([])[1]).win_rate.rate == 1 - found.win_rate.rate
    orders = [person._order(Comparison(0, "", "p", "p", "x", str(i)), seed=0) for i in range(200)]
    assert 60 < sum(order[0] == "x" for order in orders) < 140


def test_judges_are_found_by_their_names(monkeypatch, tmp_path, folder):
    def opened(name):
        return judging.open_judge(name, tmp_path / "x", judges.Asking(), Reading(), 0)

    assert "from_person" in opened("terminal").__qualname__
    assert "from_function" in opened("test_judges:longer").__qualname__
    assert "from_reward_model" in opened(str(folder / "rewards")).__qualname__
    with pytest.raises(UserError, match="judge=no_such_module:f: cannot be imported"):
        opened("no_such_module:f")
    with pytest.raises(UserError, match="endpoint: names no model"):
        opened("endpoint:")
    with pytest.raises(UserError, match="has no scalar head"):
        opened(str(folder / "model"))
