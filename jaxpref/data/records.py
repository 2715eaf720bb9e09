"""Raw records from local files or the hub, each with the place it came from."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxpref.errors import UserError

# A record and where it stands, as "file:line".
Record = tuple[Mapping[str, Any], str]

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def read_records(path: str, *, subset: str = "", split: str = "train") -> Iterator[Record]:
    """Reads a `.jsonl`, `.jsonl.gz` or `.parquet` file, or a data set of the hub.

    Args:
      path: a file, or a hub name such as "Anthropic/hh-rlhf".
      subset: a folder of the hub data set, such as "harmless-base".
      split: a split of the hub data set.

    Raises:
      UserError: the source is missing, truncated or malformed; says where.
    """
    check_source(path, "the data")
    if not path.endswith(_SUFFIXES):
        yield from _read_hub(path, subset, split)
    elif path.endswith(".parquet"):
        yield from _read_parquet(path)
    else:
        yield from _read_jsonl(path)


def check_source(path: str, key: str) -> None:
    """Refuses a path, given as `key`, that is neither a file of a known kind nor a hub name."""
    if Path(path).is_file() and not path.endswith(_SUFFIXES):
        raise UserError(f"{path} ({key}): expected a file ending in {', '.join(_SUFFIXES)}.")
    if path.endswith(_SUFFIXES):
        if not Path(path).is_file():
            raise UserError(f"{path} ({key}): no such file, seen from {Path.cwd()}.")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"{path} ({key}): neither a file ({', '.join(_SUFFIXES)}) nor a hub name "
            "like owner/name."
        )


def _read_jsonl(path: str) -> Iterator[Record]:
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
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


def _parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object a line; got {type(record).__name__}.")
    return record


def _read_parquet(path: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    row += 1
                    yield record, f"{path}:{row}"
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file after row {row}: {error}") from error


def fingerprint(path: str, subset: str, split: str) -> str:
    """A digest of a file's content, or the hub data set's own.

    Raises:
      UserError: the source cannot be read.
    """
    if not path.endswith(_SUFFIXES):
        return _load_hub(path, subset, split)._fingerprint
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _load_hub(name: str, subset: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, data_dir=subset or None, split=split)
    except Exception as error:  # The hub's client raises many kinds, none of them ours.
        raise UserError(
            f"{name} (split {split!r}): the hub gave no such data set, or cannot be reached: "
            f"{error}\nWithout a network, give a local .jsonl, .jsonl.gz or .parquet file as "
            "data.path."
        ) from error


def _read_hub(name: str, subset: str, split: str) -> Iterator[Record]:
    for row, record in enumerate(_load_hub(name, subset, split), start=1):
        yield record, f"{name}[{split}]:{row}"
