"""Paths on a disk or in a bucket, how files are read there, and how they get there whole.

An object of a bucket is there when it is closed, whole; it has no rename and takes nothing more.
What has just been written may be missing in a listing, and is found by its name.
"""

import atexit
import errno
import fnmatch
import importlib.util
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from jaxpref.errors import UserError

# A path of a disk is pathlib's: epath's own know less, and ask for the names of users.
AnyPath: TypeAlias = Path | epath.Path

# What lies beside weights in Hugging Face's layout: configs, tokenizer files, templates.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "chat_template*")

# Any of these lets epath reach a bucket.
_BACKENDS = ("gcsfs", "tensorflow")
# Names the files of a folder that was put into a bucket, so that it can be had without a listing.
_FILES = "files.txt"
# Seconds after which an object that grows is written again; it takes a tenth of the time at most.
_AGAIN, _SHARE = 30.0, 0.1
# How many objects are asked for at a time.
_REQUESTS = 8
# Bytes of an object that are asked for at a time: what is read whole is in memory twice meanwhile.
_MOST = 2**27
# Bytes that are read ahead of lines and of other small parts.
_AHEAD = 2**20


def as_path(name: str | AnyPath) -> AnyPath:
    """The path that a user gave: of a file or a folder, or an address such as `gs://bucket/run`.

    Raises:
      UserError: it is an address of another kind, or what reaches buckets is not installed, or does
        not reach this one.
    """
    if isinstance(name, epath.Path):
        return name
    # pathlib leaves one slash of two.
    if not is_address(str(name)):
        return Path(name)
    if not str(name).startswith("gs://"):
        raise UserError(
            f"{name}: is an address, and no path of a disk. Of addresses only gs://BUCKET/PATH is "
            "known, as text; mount what is elsewhere, and give the folder that it is mounted to."
        )
    if not any(map(importlib.util.find_spec, _BACKENDS)):
        raise UserError(
            f"{name}: what reaches buckets is not installed. Install it with pip install "
            "'jaxpref[gcs]', or mount the bucket and give the folder that it is mounted to."
        )
    import fsspec.config

    # A listing that gcsfs remembers does not know what other processes write.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    path = epath.Path(name)
    try:
        with _reaching(path):
            path.exists()
    except OSError as error:
        raise UserError(
            f"{name}: cannot be reached ({error.strerror or error}). See to the network and to the "
            "credentials of Google Cloud (gcloud auth application-default login)."
        ) from error
    return path


def as_folder(name: str | Path, what: str) -> Path:
    """The path of what can only be on a disk, and never at an address.

    Args:
      name: as a user gave it.
      what: it is of, for the message.

    Raises:
      UserError: it is an address.
    """
    if is_address(str(name)):
        raise UserError(f"{what}={name}: is an address; give a folder or a file of a disk.")
    return Path(name)


def is_address(name: str) -> bool:
    """Whether a name begins as `gs://` does, or as what pathlib leaves of that."""
    return re.match(r"\w\w+:/", name) is not None


@contextmanager
def _reaching(path: AnyPath) -> Iterator[None]:
    """Makes an `OSError` of whatever the clients of buckets raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise OSError(errno.EIO, f"{type(error).__name__}: {reason}", str(path)) from error


def absolute(path: AnyPath) -> AnyPath:
    """The path from the root, as Orbax wants it; epath would take an address for a folder here."""
    return path.absolute() if isinstance(path, Path) else path


def not_shared(path: AnyPath) -> UserError:
    """For a process that sees something else here than the first one of its run."""
    return UserError(
        f"{path}: is not the same for all processes of this run. Give them a folder or a bucket "
        "that they share."
    )


def make(folder: AnyPath) -> None:
    """Makes a folder if it is not there; a bucket has none, and a mistyped one is not made."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)


def write(path: AnyPath, content: bytes | str) -> None:
    """Writes a file so that it is there whole or not at all."""
    content = content.encode() if isinstance(content, str) else content
    if not isinstance(path, Path):
        with _reaching(path):
            path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def open_file(path: AnyPath) -> io.BufferedReader:
    """Opens a file to read it, from any byte on; of an object only what is read is fetched.

    Returns:
      The file, which raises an `OSError` for whatever the clients of buckets raise.

    Raises:
      OSError: it is not there, or cannot be read.
    """
    if isinstance(path, Path):
        return path.open("rb")
    with _reaching(path):
        return io.BufferedReader(_Object(path, path.open("rb")), _AHEAD)


class _Object(io.RawIOBase):
    """An object of a bucket that is read."""

    def __init__(self, path: AnyPath, file: Any):
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _reaching(self._path):
            self._file.seek(offset, whence)
            return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        with _reaching(self._path):
            # Not all clients can read into memory that is there.
            found = self._file.read(min(len(view), _MOST))
        view[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def read(path: AnyPath) -> bytes | None:
    """What a file holds; None if it is not there."""
    try:
        with _reaching(path):
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_lines(path: AnyPath) -> list[str]:
    """The lines of a text, each of which ends with a newline; none if it is not there.

    Other ends of lines, such as U+2028 in what a model has said, are a part of theirs.
    """
    return (read(path) or b"").decode().split("\n")[:-1]


def names(folder: AnyPath) -> list[str]:
    """What a folder holds as a listing has it, sorted; nothing if there is no such folder."""
    try:
        with _reaching(folder):
            # Google's console makes an object of a folder, which is listed as in itself.
            return sorted(path.name for path in folder.iterdir() if path != folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def files(folder: AnyPath) -> list[str]:
    """The paths of all files below a folder, from there, sorted."""
    if isinstance(folder, Path):
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(_objects(folder, ""))


def _objects(folder: AnyPath, prefix: str) -> list[str]:
    # Not by epath's `walk`, whose paths lack the address.
    inside = names(folder)
    with ThreadPoolExecutor(_REQUESTS) as pool:
        nested = list(pool.map(lambda name: (folder / name).is_dir(), inside))
    return [
        path
        for name, is_folder in zip(inside, nested, strict=True)
        for path in (_objects(folder / name, f"{prefix}{name}/") if is_folder else [prefix + name])
    ]


def size(path: AnyPath) -> int:
    """The bytes of a file."""
    with _reaching(path):
        return path.stat().st_size if isinstance(path, Path) else path.stat().length


def remove(folder: AnyPath) -> None:
    """Removes a folder with all in it, as far as it is there and can be removed."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    # What is left lies in nobody's way, and is seen again at the next start.
    with suppress(OSError), _reaching(folder):
        folder.rmtree(missing_ok=True)


class Pace:
    """When to write an object again that is written whole each time."""

    def __init__(self) -> None:
        """It is time at once."""
        self._next = 0.0

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() >= self._next

    def took(self, seconds: float) -> None:
        """Says how long it took, just now."""
        self._next = time.monotonic() + max(_AGAIN, seconds / _SHARE)


class GrowingObject:
    """An object of a bucket that is added to like a file: it is written whole, now and then."""

    def __init__(self, path: AnyPath):
        """Reads what is there."""
        self._path, self._pace = path, Pace()
        self._content = bytearray(read(path) or b"")
        self._written = len(self._content)

    def write(self, content: bytes) -> int:
        """Adds to it; after an error nothing is added."""
        before = len(self._content)
        self._content += content
        if self._pace.due():
            try:
                self.flush()
            except OSError:
                del self._content[before:]
                raise
        return len(content)

    def flush(self) -> None:
        """Returns when all that was added is in the bucket."""
        if self._written == len(self._content):
            return
        began = time.monotonic()
        write(self._path, bytes(self._content))
        self._written = len(self._content)
        self._pace.took(time.monotonic() - began)

    def close(self) -> None:
        """Ends it without a flush."""


def append(path: AnyPath) -> io.FileIO | GrowingObject:
    """Opens a file to add to it, without a buffer: what is not taken now may be tried again."""
    return path.open("ab", buffering=0) if isinstance(path, Path) else GrowingObject(path)


def put(local: Path, folder: AnyPath) -> None:
    """Copies the files of a folder of a disk into a folder of a bucket."""
    paths = [path for path in sorted(local.iterdir()) if path.is_file()]
    for path in paths:
        write(folder / path.name, path.read_bytes())
    write(folder / _FILES, "\n".join(path.name for path in paths))
    _copies.pop(str(folder), None)


def get(folder: AnyPath) -> Path | None:
    """A folder on a disk: itself, or a copy of its small files that lives as long as this process.

    What was copied once is not looked at again.

    Returns:
      None if there is no such folder, or no small file in it.
    """
    if isinstance(folder, Path):
        return folder if folder.is_dir() else None
    if str(folder) in _copies:
        return _copies[str(folder)]
    listed = read(folder / _FILES)
    # A folder that was copied into the bucket by other means has a listing alone.
    there = names(folder) if listed is None else listed.decode().split("\n")
    there = [name for name in there if any(fnmatch.fnmatchcase(name, x) for x in SMALL_FILES)]
    if not there:
        return None
    local = temporary_folder()
    for name in there:
        with open_file(folder / name) as file:
            (local / name).write_bytes(file.read())
    _copies[str(folder)] = local
    return local


_temporary: list[Path] = []
# Copies of folders of a bucket, by their addresses.
_copies: dict[str, Path] = {}


def temporary_folder() -> Path:
    """A folder of a disk that is removed when this process ends."""
    _temporary.append(Path(tempfile.mkdtemp(prefix="jaxpref-")))
    return _temporary[-1]


@atexit.register
def remove_temporary_folders() -> None:
    """For a process that ends at once; otherwise Python calls it."""
    _copies.clear()
    while _temporary:
        shutil.rmtree(_temporary.pop(), ignore_errors=True)
