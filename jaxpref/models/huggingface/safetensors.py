"""Tensors in safetensors files, read and written one at a time.

A file in this format (https://huggingface.co/docs/safetensors) begins with the length of its
header in eight bytes, then has the header in JSON, then the tensors. The library `safetensors`
has no bfloat16 for NumPy, and holds a whole file in memory to write it. Here a tensor, or a block
of its rows, is read by itself, and a file is written tensor by tensor.
"""

import io
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxpref import workdir
from jaxpref.errors import UserError
from jaxpref.workdir import AnyPath

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD_BYTES = 5 * 10**9
# How many headers are read at a time.
_HEADERS = 8

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Stored(NamedTuple):
    """Where a tensor lies.

    Attributes:
      file: the name of the file.
      shape: of the tensor.
      dtype: as safetensors names it.
      start: its first byte.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def place(self) -> tuple[str, int]:
        """A key to sort tensors by, in the order in which the files hold them."""
        return self.file, self.start


class TensorFiles:
    """The tensors of one or several safetensors files, by name and in their order.

    The file that was read last stays open as long as they are used: a bucket is slow to open one.
    """

    def __init__(self, directory: AnyPath, single: str = SINGLE):
        """Reads the headers.

        Args:
          directory: holds the files; may be in a bucket.
          single: name of the file where there is one alone.

        Raises:
          UserError: there is no such file, or one is damaged or not there.
        """
        self._directory, self._single = directory, single
        self._opened: tuple[str, io.BufferedReader] | None = None
        self.stored: dict[str, Stored] = {}
        try:
            with ThreadPoolExecutor(_HEADERS) as pool:
                for found in pool.map(lambda name: _header(directory / name), self._files()):
                    self.stored.update(found)
        except OSError as error:
            raise UserError(
                f"{directory}: its weights cannot be read: {error.strerror or error}."
            ) from error

    def __del__(self) -> None:
        """Closes the file that was read last."""
        self._close()

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or a block of it, which is one range of its file.

        Args:
          name: of the tensor.
          rows: entries of its first axis, without gaps; rows beyond the last are left out.

        Raises:
          UserError: the tensor has a dtype that jaxpref does not read (float8, for example), or
            the file cannot be read.
        """
        stored = self.stored[name]
        dtype = _DTYPES.get(stored.dtype)
        path = self._directory / stored.file
        if dtype is None:
            raise UserError(f"{path}: {name} has dtype {stored.dtype}; only {', '.join(_DTYPES)}.")
        begin, end, _ = rows.indices(stored.shape[0])
        found = np.empty((end - begin, *stored.shape[1:]), dtype)
        offset = stored.start + begin * math.prod(stored.shape[1:]) * dtype.itemsize
        try:
            file = self._file(stored.file)
            file.seek(offset)
            # Read rather than mapped: file systems over a network are quick only at that.
            got = file.readinto(found.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
        if got < found.nbytes:
            raise UserError(f"{path}: ends within {name}; it has been cut off since it was opened.")
        return found

    def _file(self, name: str) -> io.BufferedReader:
        if self._opened is None or self._opened[0] != name:
            self._close()
            self._opened = name, workdir.open_file(self._directory / name)
        return self._opened[1]

    def _close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
        self._opened = None

    def _files(self) -> list[str]:
        present = set(workdir.names(self._directory))
        if INDEX in present:
            index = self._directory / INDEX
            try:
                weight_map = json.loads(workdir.read(index) or b"")["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise UserError(
                    f"{index}: not an index of safetensors files ({error!r})."
                ) from error
            names = sorted(set(weight_map.values()))
            missing = [
                name
                for name in names
                if name not in present
                # A listing does not show what lies deeper.
                and not ("/" in name and (self._directory / name).exists())
            ]
            if missing:
                raise UserError(
                    f"{self._directory}: {INDEX} names {', '.join(missing)}, which "
                    f"{'is' if len(missing) == 1 else 'are'} not there; download again."
                )
            return names
        if self._single in present:
            return [self._single]
        pickles = sorted(name for name in present if name.endswith((".bin", ".pt", ".pth")))
        if pickles:
            raise UserError(
                f"{self._directory}: holds weights as {pickles[0]}, a pickle, which can run "
                "any code when it is read. Convert it to safetensors where you trust it: load it "
                "with transformers and save_pretrained it."
            )
        raise UserError(f"{self._directory}: holds neither {self._single} nor {INDEX}.")


def _header(path: AnyPath) -> dict[str, Stored]:
    """The tensors of a file, after its header and its size are checked against each other."""
    size = workdir.size(path)

    def damaged(why: str) -> UserError:
        return UserError(f"{path}: {why}; the file is damaged or cut off. Download it again.")

    with workdir.open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged(f"its header should have {length} bytes, but the file has {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise damaged(f"its header is no JSON ({error})") from error
    header.pop("__metadata__", None)
    stored = {}
    # Sorted by place in the file, so that reading or writing them all goes from its beginning to
    # its end.
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise damaged(f"{name} should end at byte {8 + length + end}, but the file has {size}")
        itemsize = _DTYPES[entry["dtype"]].itemsize if entry["dtype"] in _DTYPES else None
        if itemsize and end - start != int(np.prod(entry["shape"])) * itemsize:
            raise damaged(f"{name} of shape {entry['shape']} has {end - start} bytes")
        shape = tuple(entry["shape"])
        stored[name] = Stored(path.name, shape, entry["dtype"], 8 + length + start)
    return stored


def dtype_name(dtype: np.dtype) -> str:
    """What safetensors calls a dtype."""
    return _NAMES[np.dtype(dtype)]


def write(
    directory: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    get: Callable[[str], np.ndarray],
    *,
    shard_bytes: int = _SHARD_BYTES,
    writer: bool = True,
) -> None:
    """Writes tensors, one in memory at a time, to one file or to several with an index.

    Args:
      directory: receives the files.
      tensors: shape and dtype of each, in the order in which they are written.
      get: gives a tensor by name, in any dtype.
      shard_bytes: the size in bytes beyond which a file is split.
      writer: whether this process writes. `get` is called in every process, because all of
        them take part in gathering a tensor.
    """
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, (shape, dtype) in tensors.items():
        size = int(np.prod(shape)) * _DTYPES[dtype].itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    count = len(shards)
    names = [
        SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
        for i in range(1, count + 1)
    ]
    for file, shard in zip(names, shards, strict=True):
        write_file(directory / file, {name: tensors[name] for name in shard}, get, writer=writer)
    if writer and count > 1:
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard
        }
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    get: Callable[[str], np.ndarray],
    *,
    writer: bool = True,
) -> None:
    """Writes one file; see `write`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + int(np.prod(shape)) * _DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") if writer else open(os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in tensors.items():
            tensor = np.ascontiguousarray(get(name), _DTYPES[dtype])
            assert tensor.shape == shape, (name, tensor.shape, shape)
            file.write(tensor.reshape(-1).view(np.uint8).data)
    if writer:
        os.replace(temporary, path)
