"""From a config to both sides of its data: mixtures, counts, the cache, several processes."""

import json

import numpy as np
import pytest

from jaxpref import config as config_lib, data as data_lib
from jaxpref.data import cache
from jaxpref.data.examples import Example
from jaxpref.data.tokenize import Limits, tokenize
from jaxpref.errors import UserError
from jaxpref.tokenizer import load_tokenizer


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(count, response, **columns):
    return [
        {"prompt": f"question {i}", "chosen": f" {response} {i}", "rejected": " no", **columns}
        for i in range(count)
    ]


def load(kind="pairs", **changes):
    config = config_lib.default("dpo")
    config.update_from_flattened_dict({f"data.{key}": value for key, value in changes.items()})
    config_lib.check(config)
    return data_lib.load(config, load_tokenizer("bytes"), kind)


def texts(dataset):
    """Prompt and first response of every example, as text."""
    groups = [dataset.group(i) for i in range(len(dataset))]
    return [
        tuple(bytes(int(i) - 3 for i in ids if i > 2).decode() for ids in (g.prompt, *g.responses))
        for g in groups
    ]


@pytest.fixture
def mixture(tmp_path):
    """Two files with the same prompts, one of them as rankings."""
    a = write(tmp_path / "a.jsonl", pairs(60, "a"))
    ranked = [
        {"prompt": f"question {i}", "responses": [" b", " c", " d"], "scores": [1, 2, 3]}
        for i in range(30)
    ]
    b = write(tmp_path / "b.jsonl", ranked)
    return {"mixture": ({"path": a, "weight": 3}, {"path": b, "name": "ranked"})}


def test_sources_keep_their_names_and_a_prompt_its_side(mixture):
    data = load(eval_fraction=0.3, **mixture)
    assert data.weights == {"a": 3.0, "ranked": 1.0}
    assert data.counts["train_examples"] + data.counts["held_out_examples"] == 90
    sides = [{prompt for prompt, *_ in texts(side)} for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    for side in (data.train, data.held_out):
        of_b = {i for i, (_, chosen, _) in enumerate(texts(side)) if chosen == " d"}
        assert of_b == set(side.sources["ranked"].tolist())
        assert set(side.sources["a"].tolist()) == set(range(len(side))) - of_b
    assert [note.rpartition("/")[2] for note in data.notes] == [
        "a.jsonl: read as format 'explicit', by its columns",
        "b.jsonl: read as format 'ranked', by its columns",
    ]


def test_a_held_out_source_of_its_own_is_read_whole_and_compared(tmp_path):
    write(tmp_path / "train.jsonl", pairs(5, "a"))
    held_out = write(tmp_path / "test.jsonl", pairs(9, "b"))
    whole = {"path": str(tmp_path), "eval_split": "test"}
    for changes in ({"path": str(tmp_path / "train.jsonl"), "eval_path": held_out}, whole):
        data = load(limit=3, **changes)
        assert [chosen for _, chosen, _ in texts(data.train)] == [" a 0", " a 1", " a 2"]
        assert [chosen for _, chosen, _ in texts(data.held_out)] == [f" b {i}" for i in range(9)]
        assert data.counts["held_out_prompts_trained_on"] == 3


def test_conversations_are_held_out_by_what_is_said(tmp_path):
    records = [
        {
            "prompt": [{"role": "user", "content": f"question {i % 20}", "id": i}],
            "chosen": [{"role": "assistant", "content": f"a {i}"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
        for i in range(80)
    ]
    config = config_lib.default("dpo")
    config.data.update(path=write(tmp_path / "x.jsonl", records), eval_fraction=0.3)
    config.tokenizer.chat_template = "hh"
    data = data_lib.load(config, load_tokenizer("bytes", "hh"), "pairs")
    assert data.held_out is not None
    assert data.counts["held_out_prompts_trained_on"] == 0
    assert not {p for p, *_ in texts(data.train)} & {p for p, *_ in texts(data.held_out)}


def test_no_held_out_response_is_borrowed_for_training(tmp_path):
    records = [{"prompt": f"question {i}", "completion": f" {i}", "label": True} for i in range(60)]
    records += records[:5]
    data = load(
        "mismatched", path=write(tmp_path / "x.jsonl", records), eval_fraction=0.3, deduplicate=True
    )
    assert data.counts["dropped/duplicate"] == 5
    for side in (data.train, data.held_out):
        own = {response for _, response, _ in texts(side)}
        assert {borrowed for *_, borrowed in texts(side)} <= own
    assert len(data.train) + len(data.held_out) == 60


def test_held_out_examples_beyond_the_first_are_counted_and_share_the_cache(tmp_path):
    config = config_lib.default("dpo")
    path = write(tmp_path / "x.jsonl", pairs(40, "a"))
    config.data.update(path=path, eval_fraction=0.5, cache=str(tmp_path / "kept"))
    whole = data_lib.load(config, load_tokenizer("bytes"), "pairs")
    config.eval.max_examples = 3
    part = data_lib.load(config, load_tokenizer("bytes"), "pairs")
    assert "reused" in part.notes[0]
    assert texts(part.held_out) == texts(whole.held_out)[:3]
    assert part.counts["held_out_examples"] == 3
    assert part.counts["held_out_unused"] == len(whole.held_out) - 3
    damaged = next((tmp_path / "kept").rglob("tokens.npy"))
    whole = damaged.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 4])
    for content in (flipped, whole[:-9], b"", None):
        damaged.unlink() if content is None else damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"tokenised data is damaged .*remove it"):
            data_lib.load(config, load_tokenizer("bytes"), "pairs")


def test_the_first_held_out_examples_are_of_all_sources(mixture):
    config = config_lib.default("dpo")
    config.data.update(**mixture, eval_fraction=0.3)
    config.eval.max_examples = 4
    data = data_lib.load(config, load_tokenizer("bytes"), "pairs")
    assert {name: len(rows) for name, rows in data.held_out.sources.items()} == {
        "a": 2,
        "ranked": 2,
    }


def test_nothing_is_dropped_without_a_count(tmp_path):
    records = [
        *pairs(3, "a"),
        *pairs(2, "a"),
        {"prompt": "p", "chosen": "a", "rejected": ""},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p" * 400, "chosen": "a" * 200, "rejected": "a"},
        *pairs(4, "b"),
    ]
    data = load(
        path=write(tmp_path / "x.jsonl", records),
        eval_fraction=0.0,
        on_empty="skip",
        on_identical="skip",
        on_long_prompt="skip",
        deduplicate=True,
        limit=9,
    )
    dropped = {
        "empty_response": 1,
        "identical_responses": 1,
        "duplicate": 2,
        "long_prompt": 1,
        "over_limit": 2,
    }
    assert {f"dropped/{reason}": n for reason, n in dropped.items()}.items() <= data.counts.items()
    assert data.counts["train_examples"] == len(data.train) == 5
    assert len(records) == 5 + sum(dropped.values())


def test_that_nothing_is_held_out_is_said(tmp_path):
    path, said = write(tmp_path / "x.jsonl", pairs(3, "a")), "nothing will be evaluated"
    for _ in range(2):
        data = load(path=path, eval_fraction=1e-6, cache=str(tmp_path / "kept"))
        assert data.held_out is None
        assert said in data.notes[-1]
    assert not any(said in note for note in load(path=path, eval_fraction=0.0).notes)
    held_out = write(tmp_path / "y.jsonl", [{**pairs(1, "a")[0], "prompt": "p" * 600}])
    data = load(path=path, eval_path=held_out, on_long_prompt="skip")
    assert data.held_out is None
    assert said in data.notes[-1]


def test_the_fingerprint_of_what_is_held_out_is_of_all_of_it(tmp_path):
    path = write(tmp_path / "x.jsonl", pairs(40, "a"))
    config = config_lib.default("dpo")
    config.data.update(path=path, eval_fraction=0.5)
    whole = data_lib.load(config, load_tokenizer("bytes"), "pairs")
    config.eval.max_examples = 3
    part = data_lib.load(config, load_tokenizer("bytes"), "pairs")
    assert part.fingerprints == whole.fingerprints
    assert whole.fingerprints["held_out_fingerprint"] == whole.held_out.fingerprint()
    assert part.held_out.fingerprint() != whole.held_out.fingerprint()
    config.data.eval_fraction = 0.0
    assert (
        data_lib.load(config, load_tokenizer("bytes"), "pairs").fingerprints["held_out_fingerprint"]
        == ""
    )


def test_prompts_alone_make_batches(tmp_path):
    from jaxpref.packing import Budget

    data = load("prompts", path=write(tmp_path / "x.jsonl", pairs(6, "a")), eval_fraction=0.0)
    batch = data_lib.BatchStream(data.train, batch_size=4, budget=Budget(64, 16)).batch(0)
    assert batch.lengths.tolist() == [[[0]] * 4]
    assert (batch.tokens > 0).sum() == 4 * len("question 0")


def test_generated_pairs_alone_have_true_rewards():
    def true_rewards(kind):
        return load(kind, format="synthetic", synthetic_pairs=20).train.true_rewards

    assert true_rewards("pairs").shape[1] == 2
    for kind in ("unpaired", "sft", "prompts"):
        assert true_rewards(kind) is None


def test_a_source_with_nothing_left_is_an_error(tmp_path):
    long = [{"prompt": "p" * 600, "chosen": "a", "rejected": "b"}]
    a, b = write(tmp_path / "a.jsonl", pairs(5, "a")), write(tmp_path / "b.jsonl", long)
    options = {"eval_fraction": 0.0, "on_long_prompt": "skip"}
    with pytest.raises(UserError, match=r"no example is left .* source 'b'.*dropped/long_prompt"):
        load(mixture=({"path": a}, {"path": b}), **options)
    with pytest.raises(UserError, match=r"no example is left to train on: .*dropped/long_prompt"):
        load(path=b, **options)


def test_data_of_which_nothing_is_left_says_why(tmp_path):
    same = [{"prompt": f"p{i}", "chosen": "a", "rejected": "a"} for i in range(4)]
    path = write(tmp_path / "x.jsonl", same)
    with pytest.raises(UserError, match=r"no example is left .*'dropped/identical_responses': 4"):
        load(path=path, on_identical="skip")
    with pytest.raises(UserError, match=r"no example is left.* Lower data.eval_fraction \(0.999\)"):
        load(path=path, eval_fraction=0.999)


def test_data_of_another_kind_names_format_and_columns(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "a"}])
    with pytest.raises(
        UserError,
        match=r"x.jsonl:1: the data \(format 'sft'\) holds one response to a prompt, but the "
        r"algorithm needs two responses.*prompt, chosen, rejected",
    ):
        load(path=path)
    assert len(load("sft", path=path, eval_fraction=0.0).train) == 1


def test_several_processes_give_what_one_gives():
    examples = [Example(f"question {i}", (f" {i}" * (i % 90), " no")) for i in range(1, 1300)]
    limits = Limits(96, 48, 1)
    one, two = (tokenize(examples, load_tokenizer("bytes"), limits, processes=n) for n in (1, 2))
    assert one.fingerprint() == two.fingerprint()
    assert one.counts == two.counts
    assert one.counts["responses_cut"]


class _Unused:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self.calls, self._tokenizer = 0, tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **options):
        self.calls += 1
        return self._tokenizer(*args, **options)


def test_tokenised_data_is_kept_and_found_by_content(tmp_path, mixture, monkeypatch):
    def cached(kind="pairs", **changes):
        config = config_lib.default("dpo")
        config.data.update(
            **{**mixture, "cache": str(tmp_path / "kept"), "eval_fraction": 0.3, **changes}
        )
        tokenizer = _Unused(load_tokenizer("bytes"))
        data = data_lib.load(config, tokenizer, kind)
        reused = any("reused" in note for note in data.notes)
        assert reused == (tokenizer.calls == 0)
        return data, reused

    first, reused = cached()
    assert not reused
    again, reused = cached(batch_size=8, num_proc=2)
    assert reused
    assert again.counts == first.counts
    for side, kept in ((first.train, again.train), (first.held_out, again.held_out)):
        assert side.fingerprint() == kept.fingerprint()
        assert side.counts == kept.counts
        np.testing.assert_array_equal(side.group(3).prompt, kept.group(3).prompt)
    assert again.weights == first.weights

    (a, b), moved = mixture["mixture"], tmp_path / "elsewhere"
    moved.mkdir()
    for entry in (a, b):
        name = entry["path"].rpartition("/")[2]
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    there = [{**entry, "path": str(moved / entry["path"].rpartition("/")[2])} for entry in (a, b)]
    assert cached(mixture=tuple(there))[1]
    assert cached(mixture=({**a, "weight": 9}, b))[1]
    assert not cached(max_length=511)[1]
    assert not cached(ranked_pairs="all")[1]
    assert not cached("sft")[1]
    assert not cached(mixture=({**a, "limit": 3}, b))[1]
    write(tmp_path / "b.jsonl", pairs(7, "e"))
    assert [cached()[1], cached()[1]] == [False, True]
    # What another version of the format wrote is not read.
    monkeypatch.setattr(cache, "_VERSION", cache._VERSION - 1)
    assert not cached()[1]


def test_generated_data_is_kept_by_seed(tmp_path):
    def reused(seed):
        config = config_lib.default("dpo")
        config.data.update(format="synthetic", synthetic_pairs=20, cache=str(tmp_path))
        config.seed = seed
        data = data_lib.load(config, load_tokenizer("bytes"), "pairs")
        assert data.train.true_rewards.shape == (len(data.train), 2)
        return "reused" in "".join(data.notes)

    assert [reused(0), reused(1), reused(0)] == [False, False, True]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "x.jsonl", pairs(5, "a"))
    with pytest.raises(UserError, match=r"data.cache is .*nothing can be written"):
        load(path=path, eval_fraction=0.0, cache=str(tmp_path / "file" / "kept"))


def test_hub_data_is_known_by_its_own_fingerprint(tmp_path, monkeypatch):
    import datasets

    rows = {"now": datasets.Dataset.from_list(pairs(9, "a"))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: rows["now"])

    def reused():
        data = load(path="owner/name", eval_fraction=0.0, cache=str(tmp_path))
        return "reused" in "".join(data.notes)

    assert [reused(), reused()] == [False, True]
    rows["now"] = datasets.Dataset.from_list(pairs(8, "a"))
    assert not reused()


FILES = {
    "responses in no order": (
        [{"prompt": "p", "responses": [" one"]}, {"prompt": "p", "responses": [" a", " b", " c"]}],
        [(" one",), (" a", " b", " c")],
    ),
    "a ranking, in the order of the file": (
        [{"prompt": "p", "responses": [" a", " b", " c"], "scores": [1, 5, 3]}],
        [(" a", " b", " c")],
    ),
    "pairs, some with a margin": (
        [*pairs(1, "a", margin=2), *pairs(1, "b")],
        [(" a 0", " no"), (" b 0", " no")],
    ),
    "labelled, one of them blank": (
        [{"prompt": "p", "completion": text, "label": True} for text in (" a", " ")],
        [(" a",)],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_to_be_scored_is_read_as_it_is(tmp_path, case):
    records, expected = FILES[case]
    examples, dataset, counts = data_lib.load_file(
        config_lib.default("reward"),
        load_tokenizer("bytes"),
        write(tmp_path / "x.jsonl", records),
    )
    assert [example.responses for example in examples] == expected
    assert [responses for _, *responses in texts(dataset)] == [list(r) for r in expected]
    assert counts.get("dropped/empty_response", 0) == len(records) - len(expected)


def test_a_file_without_responses_cannot_be_scored(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "p"}])
    with pytest.raises(UserError, match=r"x.jsonl:1: has a prompt, but no response; columns"):
        data_lib.load_file(config_lib.default("reward"), load_tokenizer("bytes"), path)
    path = write(tmp_path / "y.jsonl", [{"text": "p"}])
    with pytest.raises(UserError, match=r"y.jsonl:1: has text alone; columns"):
        data_lib.load_file(config_lib.default("reward"), load_tokenizer("bytes"), path)
