"""Digests of a folder's files, so that damage shows before anything is made of what they hold.

A folder that has been written whole holds `manifest.json`: the size and the SHA-256 of every other
file in it. Neither Orbax nor `.npy` notices a flipped bit by itself.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_MANIFEST = "manifest.json"
# Several threads help: digests are computed without Python's lock, and storage is read ahead.
_THREADS = 4


def write(folder: Path) -> None:
    """Describes the files of a folder; the last thing that is written into it."""
    temporary = folder / f"{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(_describe(folder, _files(folder)), indent=1))
    os.replace(temporary, folder / _MANIFEST)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write` described, in words.

    Args:
      folder: with the files to be read; others that have come since do not count.

    Returns:
      None if every file is what it was.
    """
    try:
        described = json.loads((folder / _MANIFEST).read_bytes())
        found = _describe(folder, list(described))
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    changed = [name for name in described if found[name] != described[name]]
    return f"{', '.join(changed[:3])}: not what was written" if changed else None


def _files(folder: Path) -> list[str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if not name.startswith(_MANIFEST)]


def _describe(folder: Path, names: list[str]) -> dict[str, list[int | str]]:
    def describe(name: str) -> list[int | str]:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return [file.tell(), digest]

    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))
