"""What `jaxpref.data.inspect` says of data whose figures are known."""

import json
import re

import jax
import numpy as np
import pytest

from jaxpref import config as config_lib
from jaxpref.data import Example, inspect, load_tokenizer, statistics, tokenize
from jaxpref.data.tokenize import Limits
from jaxpref.packing import Budget, materialise, plan


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
    assert re.search(r"prompt \(20 tokens\): ' \[... \d+ tokens cut ...\] .*long one:'", said)
    assert re.search(r"chosen \(20 tokens\): ' yes yes.* \[... 17 tokens cut ...\] '", said)
    assert "rejected (4 tokens): ' no</s>'" in said
    assert "the chosen response is the longer one in 100.0% of the pairs" in said
    assert re.search(r"rows of 40 tokens: [\d.]+% full", said)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
