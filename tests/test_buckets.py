"""What is read from a bucket is what is read from a disk."""

import gzip
import json

import fake_bucket
import numpy as np
import pyarrow.parquet
import pytest
from test_data import PAIR, write

from jaxpref import config as config_lib, data as data_lib, workdir
from jaxpref.data.records import check_source, fingerprint, read_records
from jaxpref.errors import UserError
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
