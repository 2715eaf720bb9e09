"""Digests of a folder's files, so that damage shows before anything is made of what they hold.

A folder that has been written whole holds `manifest.json`: the size and the SHA-256 of every other
file in it. Neither Orbax nor `.npy` notices a flipped bit by itself. A bucket compares check sums
of its own, and what it holds would have to be fetched for ours, so there are sizes alone there: an
object that is gone is noticed.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxpref import workdir
from jaxpref.workdir import AnyPath

_MANIFEST = "manifest.json"
# Several threads help: digests are computed without Python's lock, and storage is read ahead.
_THREADS = 4


def write(folder: AnyPath) -> None:
    """Describes the files of a folder; the last thing that is written into it."""
    listed = [name for name in workdir.files(folder) if not name.startswith(_MANIFEST)]
    described = _describe(folder, dict.fromkeys(listed, isinstance(folder, Path)))
    workdir.write(folder / _MANIFEST, json.dumps(described, indent=1))


def exists(folder: AnyPath) -> bool:
    """Whether a folder is described, and so was written whole."""
    return (folder / _MANIFEST).exists()


def remove(folder: AnyPath) -> None:
    """Says before all else that is done to a folder that it is not whole any more."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def damage(folder: AnyPath) -> str | None:
    """What is wrong with a folder that `write` described, in words.

    Args:
      folder: with the files to be read; others that have come since do not count.

    Returns:
      None if every file is what it was.
    """
    try:
        if (content := workdir.read(folder / _MANIFEST)) is None:
            return f"{_MANIFEST} is missing"
        described = json.loads(content)
        found = _describe(folder, {name: len(said) > 1 for name, said in described.items()})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, OSError) and not isinstance(folder, Path):
            # A bucket that is out of reach says nothing of what it holds.
            raise
        return f"{_MANIFEST} cannot be read ({error})"
    if missing := [name for name, said in found.items() if said is None]:
        return f"{', '.join(missing[:3])} is missing"
    changed = [name for name in described if found[name] != described[name]]
    return f"{', '.join(changed[:3])}: not what was written" if changed else None


def _describe(folder: AnyPath, names: dict[str, bool]) -> dict[str, list[int | str] | None]:
    """The size of each file, with its digest where that is asked for; None of one that is gone."""

    def describe(name: str) -> list[int | str] | None:
        try:
            if not names[name]:
                return [workdir.size(folder / name)]
            with workdir.open_file(folder / name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return [file.tell(), digest]
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))
