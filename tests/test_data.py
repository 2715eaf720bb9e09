import gzip
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from jaxpref.data import synthetic
from jaxpref.data.examples import Example, hold_out
from jaxpref.data.read import read_examples
from jaxpref.data.records import fingerprint, read_records
from jaxpref.data.tokenize import Limits, complete, tokenize, truncate
from jaxpref.errors import UserError
from jaxpref.tokenizer import begins_with_bos, load_tokenizer

PAIR = {"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No."}


def write(path, records, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    return str(path)


def dialogue(*turns):
    return "".join(
        f"\n\n{'Assistant' if i % 2 else 'Human'}:{turn}" for i, turn in enumerate(turns)
    )


def test_explicit_format_from_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [PAIR, {**PAIR, "prompt": "Sag hallo: \u00e4\U0001f600", "extra": 1}]
    plain = write(tmp_path / "a.jsonl", records)
    zipped = write(tmp_path / "a.jsonl.gz", records, gzip.open)
    parquet = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), parquet)
    for path in (plain, zipped, parquet):
        examples, dropped = read_examples(path, "explicit")
        assert not dropped
        assert [(e.prompt, e.responses, e.where) for e in examples] == [
            (r["prompt"], (r["chosen"], r["rejected"]), f"{path}:{i}")
            for i, r in enumerate(records, start=1)
        ]


def test_hh_prompt_runs_through_the_last_assistant_mark(tmp_path):
    shared = [" a question", " an answer", " another question"]
    path = write(
        tmp_path / "hh.jsonl",
        [{"chosen": dialogue(*shared, " good"), "rejected": dialogue(*shared, " bad, longer")}],
    )
    (example,), _ = read_examples(path, "hh")
    assert example.prompt == dialogue(*shared, "")
    assert example.prompt.endswith("\n\nAssistant:")
    assert example.responses == (" good", " bad, longer")


DIVERGENT = {
    "earlier turn differs": (dialogue(" q", " a", " r", " x"), dialogue(" q", " b", " r", " y")),
    "rejected has more turns": (dialogue(" q", " a"), dialogue(" q", " a", " r", " y")),
    "rejected has fewer turns": (dialogue(" q", " a", " r", " y"), dialogue(" q", " a")),
    "prompt differs by a letter": (dialogue(" q1", " a"), dialogue(" q2", " b")),
}


@pytest.mark.parametrize("case", DIVERGENT)
def test_hh_rows_that_part_early_are_errors_or_counted(tmp_path, case):
    chosen, rejected = DIVERGENT[case]
    good = {"chosen": dialogue(" q", " a"), "rejected": dialogue(" q", " b")}
    records = [good, {"chosen": chosen, "rejected": rejected}]
    path = write(tmp_path / "hh.jsonl", records)
    with pytest.raises(UserError, match=r"hh.jsonl:2: .*--config.data.on_divergent=skip"):
        read_examples(path, "hh")
    examples, dropped = read_examples(path, "hh", on_divergent="skip")
    assert len(examples) == 1
    assert dropped == {"divergent_prompt": 1}


BAD_FILES = {
    "invalid json": (b'{"prompt": "a"\n', r"x.jsonl:1: not valid JSON"),
    "second line": (b'{"prompt":"a","chosen":"b","rejected":"c"}\n{,}\n', "x.jsonl:2: not valid"),
    "not an object": (b"[1]\n", "x.jsonl:1: expected a JSON object a line; got list"),
    "not utf-8": (b'{"prompt": "\xff"}\n', "x.jsonl:1: not UTF-8"),
    "column missing": (
        b'{"prompt": "a", "chosen": "b", "reject": "c"}\n',
        "x.jsonl:1: no column 'rejected'; the record has 'prompt', 'chosen', 'reject'",
    ),
    "not text": (
        b'{"prompt": {"role": "user"}, "chosen": "b", "rejected": "c"}\n',
        "x.jsonl:1: column 'prompt' should be text; got dict",
    ),
    "empty response": (
        b'{"prompt": "a", "chosen": "b", "rejected": ""}\n',
        "x.jsonl:1: the rejected response is empty.*on_empty=skip",
    ),
    "half a character": (
        b'{"prompt": "a\\ud83d", "chosen": "b", "rejected": "c"}\n',
        "x.jsonl:1: column 'prompt' holds half of a character at 1",
    ),
    "empty file": (b"", "holds no usable record"),
    "a key twice": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "prompt": "b"}\n',
        "x.jsonl:2: the key 'prompt' stands twice in one JSON object",
    ),
    "a key twice inside": (
        b'{"prompt": [{"role": "user", "content": "a", "role": "system"}]}\n',
        "x.jsonl:1: the key 'role' stands twice",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_errors_that_say_where(tmp_path, case):
    content, message = BAD_FILES[case]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_examples(str(path), "explicit")


def test_empty_responses_are_counted_when_skipped(tmp_path):
    path = write(tmp_path / "x.jsonl", [PAIR, {**PAIR, "chosen": ""}])
    examples, dropped = read_examples(path, "explicit", on_empty="skip")
    assert len(examples) == 1
    assert dropped == {"empty_response": 1}


def test_truncated_gzip_is_an_error_that_says_so(tmp_path):
    rng = np.random.default_rng(0)
    records = [{**PAIR, "prompt": str(rng.random(50))} for _ in range(200)]
    path = tmp_path / "x.jsonl.gz"
    write(path, records, gzip.open)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="the file is truncated or damaged"):
        list(read_records(str(path)))
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match="the file is truncated or damaged"):
        list(read_records(str(path)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such.jsonl", "no such file"),
        ("./no/such/dir", "neither a file"),
        ("a/b/c", "neither a file"),
    ],
)
def test_missing_sources_are_errors(path, message):
    with pytest.raises(UserError, match=message):
        list(read_records(path))


def test_a_directory_holds_the_files_of_its_splits(tmp_path):
    import pyarrow.parquet

    def pair(name):
        return {**PAIR, "chosen": name}

    folder = tmp_path / "set" / "base"
    (folder / "test").mkdir(parents=True)
    write(folder / "train.jsonl.gz", [pair("a")], gzip.open)
    (folder / "train-00001-of-00002.json").write_text(json.dumps([pair("b"), pair("c")]))
    table = pyarrow.Table.from_pylist([pair("d")])
    pyarrow.parquet.write_table(table, folder / "test" / "0.parquet")
    (folder / "README.md").write_text("none")
    path = str(tmp_path / "set")
    by_split = {
        split: [r["chosen"] for r, _ in read_records(path, subset="base", split=split)]
        for split in ("train", "test")
    }
    assert by_split == {"train": ["b", "c", "a"], "test": ["d"]}
    with pytest.raises(UserError, match=r"named after the split 'valid'.*holds README.md, test/0"):
        list(read_records(path, subset="base", split="valid"))
    before = fingerprint(path, "base", "train")
    write(folder / "train.jsonl.gz", [pair("e")], gzip.open)
    assert fingerprint(path, "base", "train") != before


def test_a_split_is_in_the_name_of_a_file_before_that_of_a_folder(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("train", "test"):
        write(folder / f"{name}.jsonl", [{**PAIR, "chosen": name}])
    for split in ("train", "test"):
        assert [r["chosen"] for r, _ in read_records(str(folder), split=split)] == [split]
    (tmp_path / "valid").mkdir()
    write(tmp_path / "valid" / "0.jsonl", [PAIR])
    assert len(list(read_records(str(tmp_path / "valid"), split="valid"))) == 1


@pytest.mark.parametrize("part", [{"split": "test"}, {"subset": "base"}])
def test_a_file_has_no_splits(tmp_path, part):
    write(tmp_path / "x.jsonl", [PAIR])
    with pytest.raises(UserError, match=r"x.jsonl .*is a single file, which has no subset"):
        list(read_records(str(tmp_path / "x.jsonl"), **part))


@pytest.mark.parametrize("start", ["\ufeff", " \n"])
def test_an_array_may_begin_with_blanks(tmp_path, start):
    (tmp_path / "x.json").write_text(start + json.dumps([PAIR]))
    assert [record for record, _ in read_records(str(tmp_path / "x.json"))] == [PAIR]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{}, 1]", "x.json:2: expected a JSON object a record; got int"),
        ("[{]", "not valid JSON"),
        ('[{"a": 1}, {"a": 1, "a": 2}]', "x.json:2: the key 'a' stands twice"),
    ],
)
def test_bad_arrays_are_errors_that_say_where(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_records(str(tmp_path / "x.json")))


def test_unreadable_parquet_is_an_error(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a readable parquet file"):
        list(read_records(str(path)))


def test_a_parquet_column_that_stands_twice_is_an_error(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array([text]) for text in "abcd"]
    names = ["prompt", "chosen", "rejected", "prompt"]
    table = pyarrow.Table.from_arrays(columns, names=names)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: the column 'prompt' stands twice"):
        list(read_records(str(tmp_path / "x.parquet")))


def test_hub_data_sets_come_through_datasets(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([PAIR, PAIR])
    asked = {}

    def load_dataset(path, **kwargs):
        asked.update(path=path, **kwargs)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["3.0.0"])
    examples, _ = read_examples("owner/name", "explicit", subset="3.0.0", split="test")
    assert asked == {"path": "owner/name", "name": "3.0.0", "split": "test"}
    asked.clear()
    examples, _ = read_examples("owner/name", "explicit", subset="folder", split="test")
    assert asked == {"path": "owner/name", "data_dir": "folder", "split": "test"}
    assert [e.where for e in examples] == ["owner/name[test]:1", "owner/name[test]:2"]


def test_unreachable_hub_says_how_to_do_without(monkeypatch):
    import datasets

    def load_dataset(name, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"cannot be reached: offline\n.*local file or directory"):
        read_examples("owner/name", "explicit")


def test_hold_out_splits_by_prompt_whatever_the_order():
    examples = [Example(f"prompt {i % 500}", (str(i), "b")) for i in range(1000)]
    kept, held = hold_out(examples, 0.1)
    assert len(kept) + len(held) == 1000
    assert 0.05 < len(held) / 1000 < 0.15
    assert not {e.prompt for e in kept} & {e.prompt for e in held}
    _, again = hold_out(reversed(examples), 0.1)
    assert set(again) == set(held)
    assert hold_out(examples, 0.0)[1] == []


EOS, BOS = 1, 2


def run_encode(prompt, responses, *, max_length=10, max_prompt=4, bos=None, **kwargs):
    counts = Counter()
    limits = Limits(max_length, max_prompt, EOS, bos, **kwargs)
    whole = complete(prompt, responses, limits, "file:7")
    return truncate(whole[0], whole[1:], limits, counts, "file:7"), dict(counts)


def test_specials_are_added_once():
    (prompt, chosen, rejected), _ = run_encode([5, 6], [[7], [8, EOS]], bos=BOS)
    assert (prompt, chosen, rejected) == ([BOS, 5, 6], [7, EOS], [8, EOS])
    (prompt, _, _), _ = run_encode([BOS, 5], [[7], [8]], bos=BOS)
    assert prompt == [BOS, 5]
    (prompt, _, _), _ = run_encode([5], [[7], [8]])
    assert prompt == [5]


def test_nothing_is_cut_if_all_fits():
    (prompt, *_), counts = run_encode([5] * 7, [[7, 8], [9]])
    assert len(prompt) == 7
    assert counts["responses_cut"] == 0
    assert "prompts_cut" not in counts


def test_prompt_keeps_its_end_and_bos_and_responses_their_start():
    (prompt, chosen, rejected), counts = run_encode(
        [11, 12, 13, 14, 15, 16], [[21, 22, 23, 24, 25, 26, 27], [31]], bos=BOS
    )
    assert prompt == [BOS, 14, 15, 16]
    assert chosen == [21, 22, 23, 24, 25, 26]  # Cut, so without EOS.
    assert rejected == [31, EOS]
    assert counts == {"prompts_cut": 1, "responses_cut": 1}


def test_short_prompt_leaves_its_room_to_the_response():
    (prompt, chosen, _), counts = run_encode([11], [[21] * 20, [31]])
    assert prompt == [11]
    assert len(chosen) == 9
    assert counts == {"responses_cut": 1}


def test_long_prompt_is_an_error_if_asked():
    with pytest.raises(UserError, match=r"file:7: .* 6 tokens .*on_long_prompt=truncate"):
        run_encode([11] * 6, [[21] * 6, [31]], on_long_prompt="error")


def test_empty_prompt_needs_bos():
    (prompt, *_), _ = run_encode([], [[7]], bos=BOS)
    assert prompt == [BOS]
    with pytest.raises(UserError, match="file:7: the prompt is empty"):
        run_encode([], [[7]])


def test_tokens_are_the_bytes_apart_at_the_boundary():
    tokenizer = load_tokenizer("bytes")
    text = "Grüße </s>"
    limits = Limits(64, 32, tokenizer.eos_token_id, begins_with_bos(tokenizer, "auto"))
    data = tokenize([Example(text, (" a", " b\n"), true_rewards=(1.0, 2.0))], tokenizer, limits)
    group = data.group(0)
    # ByT5 ids are bytes + 3, and the name of a special token inside a text is just text.
    assert bytes(int(i) - 3 for i in group.prompt) == text.encode()
    assert [r.tolist() for r in group.responses] == [[35, 100, 1], [35, 101, 13, 1]]
    assert data.true_rewards.tolist() == [[1.0, 2.0]]
    parsed = tokenize([Example(text, (" a",))], tokenizer, limits, parse_special_tokens=True)
    assert int(parsed.group(0).prompt[-1]) == tokenizer.eos_token_id


def test_bos_policy():
    class Tokenizer:
        bos_token_id = None
        puts_bos = False

        def __call__(self, text):
            return SimpleNamespace(input_ids=[3, 9] if self.puts_bos else [9])

    tokenizer = Tokenizer()
    assert begins_with_bos(tokenizer, "auto") is None
    with pytest.raises(UserError, match="has no BOS"):
        begins_with_bos(tokenizer, "always")
    tokenizer.bos_token_id = 3
    assert begins_with_bos(tokenizer, "auto") is None
    tokenizer.puts_bos = True
    assert begins_with_bos(tokenizer, "auto") == begins_with_bos(tokenizer, "always") == 3
    assert begins_with_bos(tokenizer, "never") is None


def test_dataset_gives_back_every_piece_and_knows_its_lengths():
    tokenizer = load_tokenizer("bytes")
    examples = [
        Example("p" * i, tuple("r" * (i + k) for k in range(i % 3 + 1))) for i in range(1, 8)
    ]
    data = tokenize(examples, tokenizer, Limits(64, 32, 1))
    assert len(data) == 7
    assert data.responses == 3
    assert data.prompt_lengths.tolist() == [len(e.prompt) for e in examples]
    assert data.response_lengths.tolist() == [
        [*(len(r) + 1 for r in e.responses), 0, 0][:3] for e in examples
    ]
    for i, example in enumerate(examples):
        group = data.group(i)
        assert len(group.prompt) == len(example.prompt)
        assert [len(r) for r in group.responses] == [len(r) + 1 for r in example.responses]


def test_fingerprint_sees_text_and_division():
    tokenizer, limits = load_tokenizer("bytes"), Limits(64, 32, 1)

    def fingerprint(*examples):
        return tokenize([Example(*e) for e in examples], tokenizer, limits).fingerprint()

    base = fingerprint(("ab", ("c", "d")))
    assert base == fingerprint(("ab", ("c", "d")))
    others = {
        fingerprint(("ab", ("d", "c"))),
        fingerprint(("a", ("bc", "d"))),
        fingerprint(("ab", ("c",)), ("d", ("e",))),
        fingerprint(("ab", ("c", "d"), (1.0, 0.0))),
    }
    assert len(others | {base}) == 5


def test_missing_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in that directory"):
        load_tokenizer(str(tmp_path))


def test_synthetic_labels_follow_bradley_terry():
    examples = synthetic.generate(4000, seed=3)
    assert examples == synthetic.generate(4000, seed=3)
    assert examples[:10] != synthetic.generate(10, seed=4)
    margins = np.array([e.true_rewards[0] - e.true_rewards[1] for e in examples])
    # Of pairs this far apart, a share sigmoid(|margin|) is labelled by the true reward.
    for low, high in ((0.2, 0.8), (0.8, 1.6), (1.6, 3.0)):
        near = (np.abs(margins) > low) & (np.abs(margins) < high)
        expected = (1 / (1 + np.exp(-np.abs(margins[near])))).mean()
        error = 3 * np.sqrt(expected * (1 - expected) / near.sum())
        assert abs((margins[near] > 0).mean() - expected) < error


@pytest.mark.parametrize("shifted", [False, True])
def test_synthetic_rewards_are_those_of_the_text(shifted):
    usual = {e.prompt.rpartition(" ")[2] for e in synthetic.generate(50, seed=5)}
    for example in synthetic.generate(50, seed=5, shifted=shifted):
        assert (example.prompt.rpartition(" ")[2] in usual) != shifted
        dish = example.prompt.removesuffix("?").rpartition(" ")[2]
        for response, reward in zip(example.responses, example.true_rewards, strict=True):
            _, described, _, *words = (
                response.strip(" .").replace(",", "").replace(" and", "").split()
            )
            assert reward == synthetic.true_reward(tuple(words), described == dish)
        prompts = [example.prompt] * 2
        assert synthetic.true_rewards(prompts, example.responses) == [*example.true_rewards]


def test_a_text_that_describes_no_dish_has_the_lowest_of_all_true_rewards():
    prompt = "Guest 7: how is the tea?"
    coldest = synthetic.true_rewards([prompt], [" The pie is dreadful, stale and bitter."])
    others = (
        "",
        " The tea",
        " The tea is superb, lovely and tasty. ",
        " The tea is superb, lovely and tasty. It is.",
        "The tea is superb, lovely and tasty.",
        " The tea is superb and lovely.",
    )
    lowest = synthetic.true_rewards([prompt] * len(others), others, answer=[None] * len(others))
    assert set(lowest) == {synthetic.LOWEST_REWARD}
    assert coldest[0] > synthetic.LOWEST_REWARD
    warm, wrong_dish, unknown, repeated = synthetic.true_rewards(
        [prompt] * 4,
        [
            " The tea is superb, lovely and tasty.",
            " The sea is superb, lovely and tasty.",
            " The tea is superb, lovely and tosty.",
            " The tea is superb, lovely and superb.",
        ],
    )
    assert wrong_dish == warm - 2
    coldest_word = min(synthetic.WARMTH.values())
    assert unknown == repeated == pytest.approx(warm - synthetic.WARMTH["tasty"] + coldest_word)
    with pytest.raises(ValueError, match="should ask how a dish is; got 'Why"):
        synthetic.true_rewards(["Why tea?"], [""])
