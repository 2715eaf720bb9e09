"""What is read from a bucket is what is read from a disk."""

import gzip
import json
import shutil

import fake_bucket
import jax
import numpy as np
import pretrained
import pyarrow.parquet
import pytest
import ranged
from test_adapters import adapted
from test_data import PAIR, write
from test_rewards import read_lines
from test_weights import QWEN3, small, write_model

from jaxpref import (
    config as config_lib,
    data as data_lib,
    evaluation,
    identity,
    models,
    sharding,
    weights,
    workdir,
)
from jaxpref.data import cache
from jaxpref.data.records import check_source, fingerprint, read_records
from jaxpref.errors import UserError
from jaxpref.models import huggingface
from jaxpref.sampling import Sampling
from jaxpref.tokenizer import load_tokenizer

ADDRESS = "gs://bucket"


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """A bucket with objects that have been there for long."""
    return fake_bucket.use(tmp_path / "objects", late=0.0, replace=monkeypatch.setattr)


@pytest.fixture
def disk(objects):
    """A folder of a disk that is the bucket at `ADDRESS`, too."""
    folder = objects.local(ADDRESS)
    folder.mkdir(parents=True)
    return folder


def pairs(*names):
    return [{**PAIR, "chosen": name} for name in names]


def outcome(act, place, disk):
    """What an act gives for a place, or says of it; places on the disk as those in the bucket."""
    try:
        found = json.dumps(act(place))
    except UserError as error:
        found = f"UserError: {error}"
    return found.replace(str(disk), ADDRESS)


@pytest.fixture
def files(disk):
    """Files of all kinds, some in folders, some of which cannot be read."""
    folder = disk / "set" / "base"
    (folder / "test").mkdir(parents=True)
    write(disk / "a.jsonl", pairs("a", "b\u2028c"))
    write(folder / "train.jsonl.gz", pairs("d"), gzip.open)
    (folder / "train-00001-of-00002.json").write_text(json.dumps(pairs("e", "f")))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(pairs(*"ghi")), folder / "test" / "0.parquet"
    )
    (disk / "rows.json").write_text("\n".join(map(json.dumps, pairs("j", "k"))))
    (disk / "cut.jsonl.gz").write_bytes((folder / "train.jsonl.gz").read_bytes()[:-9])
    (disk / "bad.jsonl").write_text('{"prompt": "?"}\n{"prompt"\n')
    (disk / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    (disk / "README.md").write_text("none")
    return disk


@pytest.mark.parametrize(
    ("path", "part"),
    [
        *((name, {}) for name in ("a.jsonl", "rows.json", "set/base/train.jsonl.gz")),
        *((name, {}) for name in ("cut.jsonl.gz", "bad.jsonl", "bad.parquet", "README.md", "none")),
        ("a.jsonl", {"split": "test"}),
        *(("set", {"subset": "base", "split": split}) for split in ("train", "test", "valid")),
    ],
)
def test_records_of_a_bucket_are_those_of_a_disk(path, part, files):
    for act in (
        lambda place: list(read_records(place, **part)),
        lambda place: fingerprint(place, part.get("subset", ""), part.get("split", "train")),
    ):
        here, there = (outcome(act, f"{root}/{path}", files) for root in (files, ADDRESS))
        assert there == here


def test_an_object_that_stands_for_its_folder_is_no_file_in_it(files, objects, monkeypatch):
    listed = objects.listdir
    before = workdir.files(workdir.as_path(ADDRESS))
    monkeypatch.setattr(objects, "listdir", lambda path: ["", *listed(path)])
    assert workdir.files(workdir.as_path(ADDRESS)) == before


def test_a_run_reads_its_data_from_a_bucket(files, tmp_path):
    """And knows it again by its content, wherever it lies."""
    write(files / "pairs.jsonl", [{**PAIR, "prompt": f"{n}?"} for n in range(20)])
    found = []
    for root in (files, ADDRESS):
        config = config_lib.default("dpo")
        config.data.path, config.data.eval_path = f"{root}/pairs.jsonl", f"{root}/rows.json"
        config.data.cache = str(tmp_path / "cache")
        config_lib.check(config)
        data_lib.check(config)
        found.append(data_lib.load(config, load_tokenizer("bytes"), "pairs"))
    here, there = found
    assert there.fingerprints == here.fingerprints
    assert ["reused" in data.notes[0] for data in found] == [False, True]


def test_what_cannot_be_had_of_a_bucket_is_told_before_anything_else(files, objects, monkeypatch):
    with pytest.raises(
        UserError, match=r"gs://b/x.jsonl \(data.path\): no such file in the bucket"
    ):
        check_source("gs://b/x.jsonl", "data.path")
    with pytest.raises(UserError, match=r"s3://b/x.jsonl: is an address, and no path"):
        check_source("s3://b/x.jsonl", "data.path")
    config = config_lib.default("dpo")
    config.data.path = f"{ADDRESS}/a.jsonl"
    config.data.cache = f"{ADDRESS}/cache"
    with pytest.raises(UserError, match=r"data.cache=gs://bucket/cache: is an address"):
        data_lib.load(config, load_tokenizer("bytes"), "pairs")

    def broken(*_):
        raise RuntimeError("403\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(objects, "open", broken)
        for name in ("a.jsonl", "set/base/train.jsonl.gz"):
            with pytest.raises(UserError, match=rf"{name}: cannot be read: RuntimeError: 403\.$"):
                list(read_records(f"{ADDRESS}/{name}"))
    monkeypatch.setattr(objects, "exists", broken)
    with pytest.raises(UserError, match=r"cannot be reached \(RuntimeError: 403\)\. .*credentials"):
        data_lib.check(config)
    monkeypatch.setattr(workdir, "_BACKENDS", ("no_such_module",))
    with pytest.raises(UserError, match=r"pip install 'jaxpref\[gcs\]'"):
        data_lib.check(config)


def test_of_an_object_no_more_is_fetched_than_is_read(disk, objects, monkeypatch):
    """However much is asked for, and from wherever on."""
    content = np.random.default_rng(0).bytes(3 * 2**20)
    (disk / "x").write_bytes(content)
    monkeypatch.setattr(workdir, "_MOST", 2**20 + 3)
    monkeypatch.setattr(workdir, "_AHEAD", 16)
    fetched, opened = [], objects.open

    class Counted:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def read(self, size):
            fetched.append(size)
            return self._file.read(size)

    monkeypatch.setattr(objects, "open", lambda *args: Counted(opened(*args)))
    with workdir.open_file(workdir.as_path(f"{ADDRESS}/x")) as file:
        for begin, end in ((5, 7), (2**20, 3 * 2**20), (9, 9), (3 * 2**20 - 1, 3 * 2**20 + 1)):
            file.seek(begin)
            assert file.read(end - begin) == content[begin:end]
        assert sum(fetched) < 2**21 + 200
        assert max(fetched) <= 2**20 + 3


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_of_a_bucket_are_those_of_a_disk(shards, disk, monkeypatch):
    """From the same ranges of the same files, whatever else these hold."""
    source = pretrained.FIXTURES / "phi3"
    if shards > 1:
        models.save_pretrained(*models.from_pretrained(source), disk / "hf", shard_bytes=20_000)
    else:
        shutil.copytree(source, disk / "hf")
    read = ranged.note(monkeypatch.setattr)
    found = []
    for root in (disk, ADDRESS):
        mesh = sharding.make_mesh(2, 2, 2)
        model, params = models.from_pretrained(f"{root}/hf", mesh=mesh)
        found.append((jax.tree.leaves(sharding.fetch(params)), read.copy()))
        assert model.origin.directory == f"{root}/hf"
        read.clear()
    (here, ranges), (there, same) = found
    assert same == ranges != []
    copied = {path.name for path in workdir.get(workdir.as_path(f"{ADDRESS}/hf")).iterdir()}
    assert "config.json" in copied
    assert not any(name.endswith(".safetensors") for name in copied)
    files = list((disk / "hf").glob("*.safetensors"))
    assert (len(files) > 1) == (shards > 1)
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("begin", ["hf", "adapters"])
def test_a_run_begins_with_a_model_of_a_bucket_as_with_that_of_a_disk(begin, disk, tmp_path):
    """And keeps the same of it, so that it needs nothing there any more."""
    shutil.copytree(pretrained.FIXTURES / "llama3", disk / "hf")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    load_tokenizer("bytes", template).save_pretrained(disk / "hf")
    model, params, _ = adapted("llama3")
    models.save_adapters(model, params, disk / "adapters", base=f"{ADDRESS}/hf")
    found = []
    for root, run in ((disk, tmp_path / "here"), (ADDRESS, tmp_path / "there")):
        config = config_lib.default("sft")
        config.model.init_from, config.data.max_length = f"{root}/{begin}", 32
        source = weights.find(config, run)
        model = weights.build_model(config, source, 40)
        tokenizer = load_tokenizer(source.tokenizer)
        assert tokenizer.chat_template == template
        run.mkdir()
        weights.keep(source, model, run)
        params = weights.load(config, source, model, huggingface.abstract_params(model))
        kept = {path.name: path.read_bytes() for path in (run / "huggingface").iterdir()}
        found.append((params, kept, cache._digest(tokenizer), model.config))
    (here, *described), (there, *same) = found
    assert same == described
    assert "tensors.json" in described[0]
    for a, b in zip(*map(jax.tree.leaves, (here, there)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("one_device")
def test_commands_read_models_and_files_of_a_bucket(disk, tmp_path):
    write_model(disk / "hf", QWEN3)
    model, params = models.from_pretrained(disk / "hf")
    model, params = models.with_scalar_head(model, params, jax.random.key(1))
    models.save_pretrained(model, params, disk / "rewards", tokenizer=load_tokenizer("bytes"))
    write(disk / "prompts.jsonl", [{**PAIR, "prompt": f"{n}?"} for n in range(3)])
    found = []
    for number, root in enumerate((disk, ADDRESS)):
        said, scored, judged = (tmp_path / f"{name}-{number}" for name in "abc")
        prompts = f"{root}/prompts.jsonl"
        settings = Sampling(samples=2, max_new_tokens=3)
        evaluation.generate_file(f"{root}/hf", prompts, said, settings)
        evaluation.score_file(f"{root}/rewards", prompts, scored)
        shutil.copy(said, disk / "said.jsonl")
        same = f"{root}/said.jsonl"
        evaluation.judge_files(same, same, judge=f"{root}/rewards", output=judged)
        lines = json.dumps([read_lines(path) for path in (said, scored, judged)])
        found.append(lines.replace(str(disk), ADDRESS))
    assert found[0] == found[1]


def test_a_model_of_a_bucket_that_cannot_be_used_is_told_as_one_of_a_disk(disk, tmp_path, objects):
    source = disk / "hf"
    shutil.copytree(pretrained.FIXTURES / "phi3", source)

    def read(place):
        return str(models.from_pretrained(place)[0].config)

    def same(message):
        # What was read before is looked at anew.
        workdir._copies.clear()
        here, there = (outcome(read, f"{root}/hf", disk) for root in (disk, ADDRESS))
        assert here == there
        assert message in here

    same("vocabulary_size")
    weights_file = source / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-100])
    same("gs://bucket/hf/model.safetensors: ")
    weights_file.rename(source / "pytorch_model.bin")
    same("a pickle")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    same("b.safetensors, which is not there")
    (source / "config.json").write_text("{")
    same("gs://bucket/hf/config.json: is no JSON")
    (source / "config.json").unlink()
    same("gs://bucket/hf: is no Hugging Face model: it has no config.json")
    with pytest.raises(UserError, match=r"gs://bucket/none: no such folder in the bucket"):
        models.from_pretrained(f"{ADDRESS}/none")
    with pytest.raises(UserError, match=r"tokenizer.name is 'gs://bucket/none', and there is no"):
        load_tokenizer(f"{ADDRESS}/none")


def test_adapters_are_not_exported_for_a_base_that_peft_cannot_read(disk, tmp_path):
    shutil.copytree(pretrained.FIXTURES / "llama3", disk / "hf")
    config = small("sft", f"{ADDRESS}/hf", model__lora__rank=2)
    identity.write(tmp_path, identity.describe(config))
    with pytest.raises(UserError, match=r"of gs://bucket/hf, where peft cannot read it; .*--base"):
        weights.base_of(tmp_path)


def test_a_template_of_a_bucket_is_read(disk):
    (disk / "chat.jinja").write_text("{{ messages }}")
    assert load_tokenizer("bytes", f"{ADDRESS}/chat.jinja").chat_template == "{{ messages }}"
    with pytest.raises(UserError, match=r"tokenizer.chat_template is 'gs://bucket/none'"):
        load_tokenizer("bytes", f"{ADDRESS}/none")
