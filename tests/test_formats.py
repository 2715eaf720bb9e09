"""Formats by their columns, conversions between kinds, and what cannot be read or converted."""

import dataclasses
import json

import pytest

from jaxpref.data.chat import Chat
from jaxpref.data.examples import Example
from jaxpref.data.read import FORMATS, read_examples
from jaxpref.errors import UserError
from jaxpref.knobs import DATA_FORMATS

ASKED = [{"role": "user", "content": "Which soup?"}]
ONION = {"role": "assistant", "content": "Onion."}
LEEK = {"role": "assistant", "content": "Leek."}
STONE = {"role": "assistant", "content": "Stone."}
CHAT = Chat(tuple(ASKED))
HH = "\n\nHuman: a\n\nAssistant:"


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


# Format as the columns tell it, record, and the example that it is.
RECORDS = {
    "explicit": (
        "explicit",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        Example("p", ("a", "b")),
    ),
    "explicit, margin": (
        "explicit",
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2},
        Example("p", ("a", "b"), margin=2.0),
    ),
    "explicit, messages": (
        "explicit",
        {"prompt": ASKED, "chosen": [ONION], "rejected": STONE},
        Example(CHAT, (ONION, STONE)),
    ),
    "explicit, prompt said again": (
        "explicit",
        {"prompt": ASKED, "chosen": [*ASKED, ONION], "rejected": [*ASKED, STONE]},
        Example(CHAT, (ONION, STONE)),
    ),
    "implicit": (
        "implicit",
        {"chosen": [*ASKED, ONION], "rejected": [*ASKED, STONE], "margin": 0.5},
        Example(CHAT, (ONION, STONE), margin=0.5),
    ),
    "implicit, prompt said again": (
        "implicit",
        {"prompt": "Which soup?", "chosen": [*ASKED, ONION], "rejected": [*ASKED, STONE]},
        Example(CHAT, (ONION, STONE)),
    ),
    "hh": ("hh", {"chosen": f"{HH} x", "rejected": f"{HH} y"}, Example(HH, (" x", " y"))),
    "hh, margin": (
        "hh",
        {"chosen": f"{HH} x", "rejected": f"{HH} y", "margin": 2},
        Example(HH, (" x", " y"), margin=2.0),
    ),
    "unpaired": (
        "unpaired",
        {"prompt": "p", "completion": "a", "label": True},
        Example("p", ("a",), label=True),
    ),
    "unpaired, messages and a number": (
        "unpaired",
        {"prompt": ASKED, "completion": [STONE], "label": 0},
        Example(CHAT, (STONE,), label=False),
    ),
    "ranked": (
        "ranked",
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 3, 2.5]},
        Example("p", ("a", "b", "c"), (1.0, 3.0, 2.5), ordered=False),
    ),
    "ranked, messages": (
        "ranked",
        {"prompt": ASKED, "responses": [[STONE], LEEK, [ONION]], "scores": [0, 1, 1]},
        Example(CHAT, (STONE, LEEK, ONION), (0.0, 1.0, 1.0), ordered=False),
    ),
    "ranked, one response": (
        "ranked",
        {"prompt": "p", "responses": ["a"], "scores": [1]},
        Example("p", ("a",), (1.0,), ordered=False),
    ),
    "responses": (
        "responses",
        {"prompt": "p", "responses": ["a"]},
        Example("p", ("a",), ordered=False),
    ),
    "responses that were sampled": (
        "responses",
        {"prompt": ASKED, "responses": [STONE["content"], ""], "finish": ["length", "stop"]},
        Example(
            CHAT,
            (STONE, {"role": "assistant", "content": ""}),
            ordered=False,
            finished=(False, True),
        ),
    ),
    "sft": ("sft", {"prompt": "p", "completion": "a"}, Example("p", ("a",))),
    "sft, messages": ("sft", {"prompt": ASKED, "completion": [LEEK]}, Example(CHAT, (LEEK,))),
    "messages": ("messages", {"messages": [*ASKED, LEEK]}, Example(CHAT, (LEEK,))),
    "alpaca": (
        "alpaca",
        {"instruction": "Count.", "input": "a b", "output": "2"},
        Example(
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nCount.\n\n### Input:\na b\n\n### Response:",
            ("2",),
        ),
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "Sing.", "input": "", "output": "La."},
        Example(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nSing.\n\n### Response:",
            ("La.",),
        ),
    ),
    "prompts": ("prompts", {"prompt": "p", "id": 3}, Example("p", ())),
    "prompts, messages": ("prompts", {"prompt": ASKED}, Example(CHAT, ())),
    "text": ("text", {"text": "Once.", "id": 3}, Example(None, ("Once.",))),
    # Further columns that change nothing.
    "explicit, scores": (
        "explicit",
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1},
        Example("p", ("a", "b"), (2.0, 1.0)),
    ),
    "explicit, messages and scores": (
        "explicit",
        {
            "prompt": ASKED,
            "chosen": [ONION],
            "rejected": [STONE],
            "score_chosen": 2,
            "score_rejected": 1,
        },
        Example(CHAT, (ONION, STONE), (2.0, 1.0)),
    ),
    "explicit, one score": (
        "explicit",
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": None},
        Example("p", ("a", "b")),
    ),
    "explicit beside a labelled completion": (
        "explicit",
        {
            **dict(zip(("prompt", "chosen", "rejected"), "pab", strict=True)),
            "completion": "a",
            "label": 1,
        },
        Example("p", ("a", "b")),
    ),
    "explicit beside an instruction": (
        "explicit",
        {
            **dict(zip(("prompt", "chosen", "rejected"), "pab", strict=True)),
            "instruction": "i",
            "output": "o",
        },
        Example("p", ("a", "b")),
    ),
    "explicit beside what is no ranking": (
        "explicit",
        {
            **dict(zip(("prompt", "chosen", "rejected"), "pab", strict=True)),
            "responses": "two",
            "scores": 7,
        },
        Example("p", ("a", "b")),
    ),
    "hh, scores": (
        "hh",
        {"chosen": f"{HH} x", "rejected": f"{HH} y", "score_chosen": 2, "score_rejected": 1},
        Example(HH, (" x", " y"), (2.0, 1.0)),
    ),
    "sft beside texts of other names": (
        "sft",
        {"prompt": "p", "completion": "a", "question": 3, "answers": "none", "text": "p a"},
        Example("p", ("a",)),
    ),
}


@pytest.mark.parametrize("case", RECORDS)
@pytest.mark.parametrize("named", [False, True])
def test_the_columns_tell_how_a_record_is_read(tmp_path, case, named):
    format, record, expected = RECORDS[case]
    path = write(tmp_path / "x.jsonl", record)
    (example,), dropped = read_examples(path, format if named else "auto")
    assert example == dataclasses.replace(expected, where=f"{path}:1")
    assert not dropped


def test_the_config_knows_all_formats():
    assert set(DATA_FORMATS) == {"auto", "synthetic", *FORMATS}


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
UNPAIRED = {"prompt": "p", "completion": "a", "label": True}
RANKED = {"prompt": "p", "responses": ["a", "b"], "scores": [2, 1]}
BAD = {
    "unknown columns": (
        {"question": "q", "reply": "r"},
        r"no format has the columns 'question', 'reply'. Known are\n(.*\n)*  explicit: prompt, "
        r"chosen, rejected\n(.*\n)*.*--config.data.format",
    ),
    "two texts": (
        {"chosen": "a", "rejected": "b"},
        "where their prompt ends is not said.*'prompt'",
    ),
    "label is text": ({**UNPAIRED, "label": "yes"}, "true or false .or 1 or 0.; got 'yes'"),
    "label is 2": ({**UNPAIRED, "label": 2}, "true or false .or 1 or 0.; got 2"),
    "a response without an end": (
        {**RANKED, "finish": ["stop"]},
        "'finish' should say 'stop' or 'length' of each of the 2 responses; got .'stop'.",
    ),
    "another end": (
        {**RANKED, "finish": ["stop", "eos"]},
        "'finish' should say 'stop' or 'length' of each of the 2 responses; got .'stop', 'eos'.",
    ),
    "a score too few": ({**RANKED, "scores": [1]}, "there are 2 responses and 1 scores"),
    "responses is text": ({**RANKED, "responses": "ab"}, "'responses' should be a list; got str"),
    "score is nan": (
        {**RANKED, "scores": [float("nan"), 1]},
        "'scores', place 0 should be a finite number; got nan",
    ),
    "score is text": ({**RANKED, "scores": ["1", 1]}, "a finite number; got '1'"),
    "response is a number": (
        {**RANKED, "responses": ["a", 7]},
        r"'responses\[1\]' should be text; got int",
    ),
    "response is empty": ({**RANKED, "responses": ["a", ""]}, r"responses\[1\] response is empty"),
    "margin is infinite": (
        {**PAIR, "margin": float("inf")},
        "'margin' should be a finite number; got inf",
    ),
    "margin is true": ({**PAIR, "margin": True}, "'margin' should be a finite number; got True"),
    "prompt is a number": ({**PAIR, "prompt": 1}, "'prompt' should be text; got int"),
    "input is a list": (
        {"instruction": "a", "input": ["b"], "output": "c"},
        "'input' should be text; got list",
    ),
    "text and label": (
        {"text": "a", "label": 1},
        r"no format has the columns 'label', 'text'\. (.*\n)*.*--config.data.format",
    ),
    "text is a number": ({"text": 7}, "'text' should be text; got int"),
    "a score is text": (
        {**PAIR, "score_chosen": "high", "score_rejected": 1},
        "'score_chosen' should be a finite number; got 'high'",
    ),
    "half a character": ({**UNPAIRED, "completion": "a\ud83d"}, "holds half of a character at 1"),
    "prompt is an empty list": ({"prompt": []}, "list of messages; got an empty list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_errors_that_say_where(tmp_path, case):
    record, message = BAD[case]
    with pytest.raises(UserError, match=f"x.jsonl:1: .*{message}"):
        read_examples(write(tmp_path / "x.jsonl", record))


def test_what_a_detected_format_cannot_read_names_the_format(tmp_path):
    path = write(tmp_path / "x.jsonl", PAIR, {**PAIR, "chosen": 7, "id": None})
    wanted = (
        r"x.jsonl:2: column 'chosen' should be text; got int.* The record has 'prompt' \(str\), "
        r"'chosen' \(int\), 'rejected' \(str\), 'id' \(NoneType\). It is read as format "
        r"'explicit', which the columns of the first records tell; .*--config.data.format"
    )
    with pytest.raises(UserError, match=wanted):
        read_examples(path)
    with pytest.raises(UserError) as caught:
        read_examples(path, "explicit")
    assert "which the columns" not in str(caught.value)


def test_a_record_nested_too_deeply_is_an_error(tmp_path):
    parts = "[" * 900 + "]" * 900
    message = f'{{"role": "user", "content": {parts}}}'
    (tmp_path / "x.jsonl").write_text(f'{{"messages": [{message}]}}\n')
    with pytest.raises(UserError, match=r"x.jsonl:1: .*(nested too deeply|cannot be read as JSON)"):
        read_examples(str(tmp_path / "x.jsonl"))


def test_a_later_record_with_other_columns_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"x.jsonl:2: no column 'chosen'"):
        read_examples(write(tmp_path / "x.jsonl", PAIR, UNPAIRED))


@pytest.mark.parametrize("name", ["explicit", "sft", "messages"])
def test_further_columns_do_not_hide_a_format(tmp_path, name):
    format, record, _ = RECORDS[name]
    _, expected, _ = RECORDS["responses"]
    path = write(
        tmp_path / "x.jsonl", {"prompt": "p", **record, "responses": expected["responses"]}
    )
    assert read_examples(path)[0] == read_examples(path, format)[0]


def test_an_unknown_format_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"the format is .rankd..*Did you mean .ranked."):
        read_examples(write(tmp_path / "x.jsonl", PAIR), "rankd")


def test_a_limit_takes_the_first_and_counts_the_others(tmp_path):
    path = write(tmp_path / "x.jsonl", *({**PAIR, "prompt": str(i)} for i in range(5)))
    examples, dropped = read_examples(path, limit=2)
    assert [example.prompt for example in examples] == ["0", "1"]
    assert dropped == {"over_limit": 3}


def test_a_column_that_the_first_records_lack_counts(tmp_path):
    """Else a file of labelled responses, the bad ones too, would be taken for answers to learn."""
    lines = [{"prompt": "p", "completion": "a"}] + 3 * [
        {"prompt": "q", "completion": "b", "label": False}
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"x.jsonl:1: no column 'label'.* format 'unpaired'"):
        read_examples(str(tmp_path / "x.jsonl"))
