"""Tokenised data kept in a directory, under a key of all that it was made from.

DIR/KEY/manifest.json         digests of the other files
DIR/KEY/counts.json           what was dropped or cut, and how many examples are left
DIR/KEY/train/tokens.npy ...  the arrays of a `TokenizedDataset`
DIR/KEY/held_out/...          the same of what is held out, if there is any
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxpref import config as config_lib, manifest
from jaxpref.data.dataset import TokenizedDataset
from jaxpref.data.records import fingerprint
from jaxpref.errors import UserError
from jaxpref.workdir import as_folder

# The version of the files' format. It is a part of the key, so that a directory written in
# another version is not read, and the data is tokenised anew.
_VERSION = 3
_COUNTS = "counts.json"
_SIDES = ("train", "held_out")
_ARRAYS = (
    "tokens",
    "context",
    "piece_offsets",
    "example_offsets",
    "true_rewards",
    "uncut",
    "prompts",
)
# A data set may be without these arrays.
_OPTIONAL = ("context", "true_rewards")
_GROUPS = ("extras", "sources")
# These settings are no part of the key. They change no token, or they are paths and names, in
# whose place the key has the content.
_IRRELEVANT = (
    "data.batch_size",
    "data.cache",
    "data.eval_path",
    "data.mixture",
    "data.num_proc",
    "data.path",
    "data.row_length",
    "data.scored_length",
    "tokenizer.name",
)


def folder(config: ConfigDict, tokenizer: Any, kind: str) -> Path:
    """The directory in data.cache for this data, this tokenizer and these settings."""
    data = config.data
    of_data = {key: value for key, value in config_lib.flatten(config) if _matters(key)}
    sources: list[Any] = [
        {
            **{key: value for key, value in source.items() if key not in ("path", "weight")},
            "content": fingerprint(source["path"], source["subset"], source["split"]),
        }
        for source in config_lib.sources(config)
    ]
    held_out = config_lib.held_out_source(config)
    if held_out:
        sources.append(fingerprint(held_out["path"], held_out["subset"], held_out["split"]))
    if data.format == "synthetic":
        sources.append(config.seed)
    versions = [importlib.metadata.version(name) for name in ("jaxpref", "transformers")]
    parts = [_VERSION, of_data, sources, kind, versions, _digest(tokenizer)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return as_folder(data.cache, "data.cache") / key


def read(folder: Path) -> tuple[TokenizedDataset, TokenizedDataset | None, dict[str, int]] | None:
    """Reads what `write` has kept; None if there is nothing.

    The arrays are mapped from the files, so that only the parts that are used are read.

    Raises:
      UserError: the files are damaged.
    """
    if not folder.exists():
        return None
    if damaged := manifest.damage(folder):
        raise UserError(f"{folder}: tokenised data is damaged ({damaged}); remove it.")
    counts = json.loads((folder / _COUNTS).read_text())
    train = _read_dataset(folder / "train")
    held_out = _read_dataset(folder / "held_out") if counts["held_out_examples"] else None
    return train, held_out, counts


def write(
    folder: Path, train: TokenizedDataset, held_out: TokenizedDataset | None, counts: dict[str, int]
) -> None:
    """Keeps both sides of the data. A run that is killed meanwhile leaves nothing to be read.

    Raises:
      UserError: the directory cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="tmp.") as name:
            temporary = Path(name) / folder.name
            for side, dataset in zip(_SIDES, (train, held_out), strict=True):
                if dataset is not None:
                    _write_dataset(temporary / side, dataset)
            (temporary / _COUNTS).write_text(json.dumps(counts))
            manifest.write(temporary)
            os.replace(temporary, folder)
    except OSError as error:
        if folder.exists():
            # Another run wrote the same data in the meantime.
            return
        raise UserError(
            f"data.cache is {str(folder.parent)!r}, where nothing can be written "
            f"({error.strerror or error}); name another directory, or leave it empty."
        ) from error


def _matters(key: str) -> bool:
    return key.startswith(("data.", "tokenizer.")) and key not in _IRRELEVANT


def _digest(tokenizer: Any) -> str:
    """A digest of all files that the tokenizer consists of, wherever it came from."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        for path in sorted(Path(name).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _write_dataset(folder: Path, dataset: TokenizedDataset) -> None:
    folder.mkdir(parents=True)
    arrays = {name: getattr(dataset, name) for name in _ARRAYS}
    for group in _GROUPS:
        (folder / group).mkdir()
        names = list(getattr(dataset, group))
        (folder / group / "names.json").write_text(json.dumps(names))
        arrays |= {f"{group}/{i}": getattr(dataset, group)[name] for i, name in enumerate(names)}
    for name, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / _COUNTS).write_text(json.dumps(dataset.counts))


def _read_dataset(folder: Path) -> TokenizedDataset:
    def array(name: str) -> np.ndarray | None:
        path = folder / f"{name}.npy"
        if name in _OPTIONAL and not path.exists():
            return None
        # This is a view of the memmap as a plain array, because slicing a memmap is slow.
        return np.load(path, mmap_mode="r").view(np.ndarray)

    fields: dict[str, Any] = {name: array(name) for name in _ARRAYS}
    for group in _GROUPS:
        names = json.loads((folder / group / "names.json").read_text())
        fields[group] = {name: array(f"{group}/{i}") for i, name in enumerate(names)}
    counts = Counter(json.loads((folder / _COUNTS).read_text()))
    # Examples are there only where responses are yet to be sampled, which are not kept.
    known = {f.name for f in dataclasses.fields(TokenizedDataset)}
    assert {*fields, "counts", "examples"} == known
    return TokenizedDataset(**fields, counts=counts)
