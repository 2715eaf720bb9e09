"""What `jaxpref.data.inspect` says of data whose figures are known."""

import json
import re

import jax
import numpy as np
import pytest

from jaxpref import config as config_lib
from jaxpref.data import Example, inspect, statistics, tokenize
from jaxpref.data.tokenize import Limits
from jaxpref.packing import Budget, materialise, plan
from jaxpref.tokenizer import load_tokenizer


def dataset_of(*examples):
    tokenizer = load_tokenizer("bytes")
    return tokenize([Example(*e) for e in examples], tokenizer, Limits(64, 32, 1))


def test_figures_of_pairs():
    # Bytes, and EOS after each response.
    data = dataset_of(
        ("aaaa", ("bbb", "c")), ("aaaa", ("b", "ccc")), ("dd", ("b", "b")), ("dd", ("b", "b"))
    )
    found = statistics.describe(data)
    assert found.lengths["prompt"].tolist() == [2, 2, 3, 4, 4, 4]
    assert found.lengths["chosen"][-1] == found.lengths["rejected"][-1] == 4
    assert found.lengths["prompt + response"][-1] == 8
    together, saved = 12 + 6 + 6 + 4 + 4, 12
    assert found.shared == pytest.approx(saved / (together + saved))
    assert found.longer == (1 + 0 + 0.5 + 0.5) / 4
    assert (found.same_prompt, found.repeated) == (4, 1)


def test_the_longer_response_is_the_one_before_truncation():
    data = dataset_of(("a", ("b" * 100, "c" * 200)), ("a", ("b" * 300, "c" * 200)))
    assert data.response_lengths.tolist() == [[63, 63]] * 2
    assert statistics.describe(data).longer == 0.5
    # Of which the second response is another's.
    assert statistics.describe(data, borrowed=True).lengths["response"].tolist() == [63] * 6


def test_what_is_borrowed_makes_no_example_another():
    data = dataset_of(("a", ("b", "c")), ("a", ("b", "d")), ("a", ("e", "c")))
    assert statistics.describe(data, borrowed=True).repeated == 1
    assert statistics.describe(data).repeated == 0


def test_figures_of_other_kinds():
    data = dataset_of(("aa", ("b", "cc", "ddd")), ("aaa", ("b",)))
    found = statistics.describe(data)
    assert found.longer is None
    assert found.lengths["response"].tolist()[0] == 2
    assert found.lengths["response"].tolist()[-1] == 4
    assert found.repeated == found.same_prompt == 0


def test_fill_is_the_share_of_places_that_are_used():
    data = dataset_of(("aaaa", ("bbb", "c")), ("dd", ("b", "b")))
    groups = [data.group(i) for i in range(2)]
    budget = Budget(20, 16)
    batch = materialise(plan(groups, budget), groups, budget)
    batch = jax.tree.map(lambda x: np.asarray(x)[None], batch)
    found = statistics.fill([batch, batch])
    assert found.rows == {1: 2}
    assert found.tokens == 16 / 20
    assert found.scored == 10 / 16


def said_of(tmp_path, capsys, algorithm, records, **changes):
    """What is printed of a file's records, without the line breaks of a narrow terminal."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    config = config_lib.default(algorithm)
    config.data.update(path=str(tmp_path / "x.jsonl"), batch_size=2, eval_fraction=0.0)
    config.tokenizer.chat_template = "alpaca"
    config.data.update(**changes)
    inspect.run(config, tmp_path / "lengths.png", examples=2)
    return " ".join(capsys.readouterr().out.split())


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKING = {"prompt": "p", "responses": ["a", "b"], "scores": [1.5, 4]}
READ = {
    "kto": (
        [{"prompt": str(i), "completion": "a", "label": i < 1} for i in range(3)],
        r"labels: good .* labels: not good .* labels: 1 good, 2 not good",
    ),
    "reward": (
        [{**PAIR, "margin": m} for m in (1, 2.5, 4)],
        r"margins: 1 .* margins: 2.5 .* margins: 1 to 4, half of them up to 2.5",
    ),
    "rrhf": (
        [RANKING, {**RANKING, "responses": ["a", "b", "c"], "scores": [3, 2, 1]}],
        r"scores: 4, 1.5 .* scores: 3, 2, 1 .* scores: 1 to 4, half of them up to 2",
    ),
    "dpo": (
        [{**PAIR, "margin": 1, "score_chosen": 2, "score_rejected": 1}] * 2,
        r"in the data, but not read by dpo: margins, scores",
    ),
}


@pytest.mark.parametrize("algorithm", READ)
def test_it_shows_what_the_method_reads_beside_the_tokens(tmp_path, capsys, algorithm):
    records, wanted = READ[algorithm]
    said = said_of(tmp_path, capsys, algorithm, records)
    assert re.search(wanted, said), said
    if algorithm == "dpo":
        assert "margins: 1" not in said


def test_it_shows_what_is_seen_but_not_scored(tmp_path, capsys):
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(("Hello", "Hi!", "How are you?", "Well."))
    ]
    said = said_of(tmp_path, capsys, "sft", [{"messages": turns}] * 2)
    assert re.search(
        r"response \(\d+ tokens, 10 scored\): 'Hi!</s>' \[seen, not scored: '### Instruction:"
        r"\\nHow are you\?.*Response:\\n'\] 'Well.</s>'",
        said,
    ), said
    assert re.search(r"scored( 10){6} ", said)


def test_it_prints_what_the_model_sees_and_draws_the_lengths(tmp_path, capsys):
    pairs = [
        {"prompt": f"Question {i}, and a long one:", "chosen": " yes" * 9, "rejected": " no"}
        for i in range(30)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    config = config_lib.default("dpo")
    config.data.path = str(tmp_path / "pairs.jsonl")
    config.data.batch_size = 4
    config.data.max_length, config.data.max_prompt_length = 40, 20
    config.data.on_long_prompt = "truncate"
    inspect.run(config, tmp_path / "lengths.png", examples=2)
    said = capsys.readouterr().out
    assert "read as format 'explicit'" in said
    assert re.search(r"prompt \(20 tokens\): \[... \d+ tokens cut ...\] '.*long one:'", said)
    assert re.search(r"chosen \(20 tokens\): ' yes yes.*' \[... 17 tokens cut ...\]", said)
    assert "rejected (4 tokens): ' no</s>'" in said
    assert "the chosen response is the longer one in 100.0% of the pairs" in said
    assert re.search(r"rows of 40 tokens: [\d.]+% full", said)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
