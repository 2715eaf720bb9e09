"""Published data sets, from a few records in their own columns."""

import hashlib
import json
from pathlib import Path

import pytest

from jaxpref.data import sources
from jaxpref.data.chat import Chat
from jaxpref.data.convert import adapt
from jaxpref.data.examples import Example
from jaxpref.data.read import FORMATS, detect, read_examples
from jaxpref.errors import UserError

FOLDER = Path(__file__).parent / "data"
SOURCES = sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def records(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def read(name, **options):
    examples, dropped = read_examples(str(FOLDER / f"{name}.jsonl"), name, **options)
    return examples, dict(dropped)


def user(text):
    return {"content": text, "role": "user"}


def assistant(text):
    return {"content": text, "role": "assistant"}


def post(subreddit, title, body):
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


# The first example of each source, but for its place.
FIRST = {
    "hh": Example(
        "\n\nHuman: How long do I boil an egg?\n\nAssistant:",
        (" Seven minutes for a soft one.", " I don't know."),
    ),
    "shp": Example(
        "\n\nHuman: Why does my bread not rise?\n\nAssistant:",
        (" Is the yeast fresh?", " Mine never does."),
        (12.0, 4.0),
    ),
    "stack_exchange": Example(
        "\n\nHuman: Is 2 < 3 cups of water enough for rice?\n\nAssistant:",
        (" Rarely.", " Yes:\n\nrinse it\ncover it", " No."),
        (1.0, 4.0, 0.0),
        ordered=False,
    ),
    "tldr": Example(
        post("cooking", "Soup too salty", "I made soup and put in salt twice. What now?"),
        (" Soup is twice salted; how to save it?", " I made soup."),
    ),
    "tldr_sft": Example(
        post("cooking", "Burnt rice", "The rice burnt while I was on the phone."),
        (" Burnt the rice during a call.",),
    ),
    "ultrafeedback": Example(
        Chat((user("Name three herbs."),)),
        (assistant("Basil, thyme and sage."), assistant("Basil.")),
        (8.5, 5.0),
    ),
    "cnn_dailymail": Example(
        "The village fair drew a record crowd on Sunday. Its largest pumpkin weighed as much as "
        "a pony.\n\nTL;DR:",
        (" Record crowd at village fair .\nPumpkin as heavy as a pony .",),
    ),
}
OPTIONS = {"hh": {"on_divergent": "skip"}}
KEPT = {
    "hh": (2, {"divergent_prompt": 1}),
    "shp": (3, {"score_ratio": 1}),
    "stack_exchange": (2, {"few_answers": 1}),
    "imdb": (4, {}),
}
KINDS = {"tldr_sft": "sft", "imdb": "unpaired", "cnn_dailymail": "sft"}


def test_every_source_has_a_fixture():
    assert set(SOURCES) == {*FIRST, "imdb"}
    assert set(SOURCES) <= set(FORMATS)


@pytest.mark.parametrize("name", FIRST)
def test_a_record_is_read_by_the_published_rule(name):
    examples, _ = read(name, **OPTIONS.get(name, {}))
    where = f"{FOLDER / name}.jsonl:1"
    assert examples[0] == Example(**{**vars(FIRST[name]), "where": where})


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_rule_leaves_out_is_counted(name):
    examples, dropped = read(name, **OPTIONS.get(name, {}))
    count, reasons = KEPT.get(name, (3, {}))
    assert len(examples) == count
    assert dropped == reasons
    kind = KINDS.get(name, "pairs")
    assert len(adapt(examples, kind, on_tie="skip")[0]) == count - (name == "ultrafeedback")


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"imdb"}))
def test_the_columns_tell_the_source(name):
    assert detect(records(name)[0], "x:1") == name


def test_the_preferred_response_comes_first_whichever_column_it_is_in():
    (_, second, _), _ = read("shp")
    assert second.responses == (" Durum, for the bite.", " Any.")
    assert second.scores == (30.0, 3.0)
    (_, second, third), _ = read("tldr")
    assert second.responses == (" Plum tree blooms late, in June.", " It is a tree.")
    assert third.responses[1] == " Roads have tires.\n"


def test_news_among_the_posts_is_left_out(tmp_path):
    news = {"article": "x", "post": None, "title": None, "subreddit": None}
    lines = [json.dumps(record) for record in (records("tldr")[0], changed("tldr", info=news))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    examples, dropped = read_examples(str(tmp_path / "x.jsonl"))
    assert (len(examples), dropped) == (1, {"not_a_post": 1})


def test_shp_takes_another_ratio():
    assert len(read("shp", min_score_ratio=1.0)[0]) == 4
    assert len(read("shp", min_score_ratio=5.0)[0]) == 1


def test_html_keeps_code_and_line_breaks():
    (_, code), _ = read("stack_exchange")
    assert code.responses == (" So:\n\nprint(1)\nprint(2)", " With a pen.\nOr a press.")


def test_equal_ratings_are_a_tie():
    examples, _ = read("ultrafeedback")
    with pytest.raises(UserError, match=r"ultrafeedback.jsonl:2: two responses .*score \(9, 9\)"):
        adapt(examples, "pairs")
    kept, counts = adapt(examples, "pairs", on_tie="skip")
    assert [example.scores for example in kept] == [(8.5, 5.0), (9.0, 3.0)]
    assert counts == {"dropped/tie": 1}


def test_imdb_prompts_are_as_many_words_as_the_hash_says():
    examples, _ = read("imdb")
    assert read("imdb")[0] == examples
    for record, example in zip(records("imdb"), examples, strict=True):
        digest = hashlib.sha256(record["text"].encode()).digest()
        words = record["text"].split()[: 2 + int.from_bytes(digest[:8], "big") % 7]
        assert example.prompt + example.responses[0] == record["text"]
        assert example.prompt.split() == words
        assert example.label == record["label"]


def test_a_review_of_one_word_is_a_prompt_too_and_none_needs_a_label():
    known, none, missing = (
        sources.imdb({"text": "Short.", **label}, "x:1")
        for label in ({"label": 0}, {"label": -1}, {})
    )
    assert known == Example("Short.", ("",), where="x:1", label=False)
    assert none == missing == Example("Short.", ("",), where="x:1")


def changed(name, **columns):
    return {**records(name)[0], **columns}


BAD = {
    "shp label": (changed("shp", labels=2), "shp", "'labels' should be true or false .*got 2"),
    "shp score": (changed("shp", score_A=None), "shp", "'score_A' should be a finite number"),
    "answers": (changed("stack_exchange", answers="x"), "stack_exchange", "list of objects.*str"),
    "answer text": (
        changed("stack_exchange", answers=[{"text": 1, "pm_score": 1}] * 2),
        "stack_exchange",
        "answer 0: column 'text' should be text; got int",
    ),
    "three summaries": (
        changed("tldr", summaries=[{"text": "a"}] * 3),
        "tldr",
        "should be two summaries; got 3",
    ),
    "info": (changed("tldr", info=None), "tldr", "'info' should be an object; got NoneType"),
    "no post": (
        changed("tldr", info={"subreddit": "a", "title": "b", "post": None}),
        "tldr",
        "'post' should be text; got NoneType",
    ),
    "score": (
        changed("ultrafeedback", score_chosen=float("nan")),
        "ultrafeedback",
        "'score_chosen' should be a finite number; got nan",
    ),
    "empty summary": (changed("tldr_sft", summary=" \n"), "tldr_sft", "summary response is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_errors_that_say_where(tmp_path, case):
    record, name, message = BAD[case]
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"x.jsonl:1: .*{message}"):
        read_examples(str(tmp_path / "x.jsonl"), name)
