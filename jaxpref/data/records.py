"""Raw records from files or the hub, each with the place that it came from."""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from jaxpref import workdir
from jaxpref.config import DATA_SUFFIXES, is_file
from jaxpref.errors import UserError
from jaxpref.workdir import AnyPath, as_path

# A record and its place, as "file:line".
Record = tuple[Mapping[str, Any], str]

# What may stand before a JSON array.
_BLANK = b"\xef\xbb\xbf \t\r\n"


def read_records(path: str, *, subset: str = "", split: str = "train") -> Iterator[Record]:
    """Reads a file, a directory of files as the hub has them, or a data set of the hub.

    Args:
      path: a `.jsonl`, `.jsonl.gz`, `.json` or `.parquet` file, or a directory, either of which
        may be in a bucket (`gs://BUCKET/PATH`); or a hub name such as "Anthropic/hh-rlhf".
      subset: a folder of the directory or the hub data set, such as "harmless-base".
      split: a split of the hub data set, or of the directory, where it is the files that are
        named after it.

    Raises:
      UserError: the source is missing, truncated or malformed; the message says where.
    """
    check_source(path, "the data", subset=subset, split=split)
    files = _files(path, subset, split)
    if files is None:
        yield from _read_hub(path, subset, split)
        return
    for file in files:
        read = _read_parquet if file.suffix == ".parquet" else _read_json_lines
        yield from read(file)


def check_source(path: str, key: str, *, subset: str = "", split: str = "train") -> None:
    """Refuses a path, given as `key`, that is no file of a known kind, directory or hub name."""
    suffixes, place = ", ".join(DATA_SUFFIXES), as_path(path)
    if place.is_dir():
        if not _files(path, subset, split):
            folder = place / subset
            present = workdir.files(folder)
            raise UserError(
                f"{path} ({key}): {folder} holds no file ({suffixes}) named after the split "
                f"{split!r}, as in {split}.jsonl or {split}-00000-of-00001.parquet; it holds "
                f"{', '.join(present[:8]) or 'nothing'}. Name the file itself, or the split."
            )
        return
    if place.is_file() and not path.endswith(DATA_SUFFIXES):
        raise UserError(f"{path} ({key}): expected a file ending in {suffixes}.")
    if is_file(path):
        if not place.is_file():
            where = f", seen from {Path.cwd()}" if isinstance(place, Path) else " in the bucket"
            raise UserError(f"{path} ({key}): no such file{where}.")
        if subset or split != "train":
            raise UserError(
                f"{path} ({key}): is a single file, which has no subset and no split (got "
                f"{subset!r}, {split!r}); those are of directories and of data sets on the hub. "
                "Leave data.subset and data.eval_split empty and data.split at 'train', and name "
                "a held-out file in data.eval_path."
            )
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"{path} ({key}): neither a file ({suffixes}), nor a directory, nor a hub name like "
            "owner/name."
        )


def _files(path: str, subset: str, split: str) -> list[AnyPath] | None:
    """The files that a path stands for; None for a hub name."""
    place = as_path(path)
    if not place.is_dir():
        return [place] if is_file(path) else None
    folder = place / subset
    found = [PurePosixPath(name) for name in workdir.files(folder) if name.endswith(DATA_SUFFIXES)]
    # The split is a part of a file's name, or else the name of a folder that the file lies in, or
    # else the name of the folder that was given.
    named = [p for p in found if split in re.split("[-.]", p.name)]
    inside = [p for p in found if split in p.parts[:-1]]
    whole = found if folder.name == split else []
    return [folder / p for p in named or inside or whole]


def _read_json_lines(path: AnyPath) -> Iterator[Record]:
    number = 0
    try:
        with workdir.open_file(path) as stored:
            file = gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored
            if path.suffix == ".json" and file.read(64).lstrip(_BLANK)[:1] == b"[":
                file.seek(0)
                yield from _array(file.read(), path)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}"), f"{path}:{number}"
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: the gzip stream breaks after line {number} ({error}): the file is truncated "
            "or damaged; fetch it again."
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _array(text: bytes, path: AnyPath) -> Iterator[Record]:
    """The records of a .json file that is one JSON array."""
    try:
        records = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}.") from error
    for number, record in enumerate(records, start=1):
        yield _checked(record, f"{path}:{number}", "a record"), f"{path}:{number}"


def _parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}.") from error
    return _checked(record, where, "a line")


class _Ambiguous(dict):
    """A JSON object in which a key stands twice, so that one of its values is lost."""

    names: list[str]


def _object(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        record = _Ambiguous()
        record.names = [name for name, _ in pairs]
    return record


def _checked(record: Any, where: str, what: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object {what}; got {type(record).__name__}.")
    values: list[Any] = [record]
    while values:
        value = values.pop()
        if isinstance(value, _Ambiguous):
            _check_names(value.names, where, "key", "JSON object")
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return record


def _check_names(names: list[str], where: str, what: str, whole: str) -> None:
    """Refuses a name that stands twice, because one of its values would be lost."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"{where}: the {what} {twice!r} stands twice in one {whole}, and which of its values "
            "is meant cannot be known; remove one."
        )


def _read_parquet(path: AnyPath) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with workdir.open_file(path) as stored, pyarrow.parquet.ParquetFile(stored) as file:
            _check_names(file.schema_arrow.names, str(path), "column", "parquet file")
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    row += 1
                    yield record, f"{path}:{row}"
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file after row {row}: {error}") from error


def fingerprint(path: str, subset: str, split: str) -> str:
    """A digest of a file's content, or the hub data set's own.

    Raises:
      UserError: the source is missing, or cannot be read.
    """
    check_source(path, "the data", subset=subset, split=split)
    files = _files(path, subset, split)
    if files is None:
        return _load_hub(path, subset, split)._fingerprint
    digest = hashlib.sha256()
    try:
        for name in files:
            with workdir.open_file(name) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def _load_hub(name: str, subset: str, split: str) -> Any:
    import datasets

    try:
        # A part of a data set is a configuration in some data sets, and a folder in others.
        named = subset and subset in datasets.get_dataset_config_names(name)
        part = {"name": subset} if named else {"data_dir": subset or None}
        return datasets.load_dataset(name, split=split, **part)
    except Exception as error:  # The hub's client raises errors of many classes.
        raise UserError(
            f"{name} (split {split!r}): the hub gave no such data set, or cannot be reached: "
            f"{error}\nWithout a network, give a local file or directory as "
            "data.path."
        ) from error


def _read_hub(name: str, subset: str, split: str) -> Iterator[Record]:
    for row, record in enumerate(_load_hub(name, subset, split), start=1):
        yield record, f"{name}[{split}]:{row}"
