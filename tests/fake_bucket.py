"""A bucket of `gs://` that is a folder here: no rename, no append, listings that are late.

An object is there when it is closed. It is found by its name at once, and in a listing only some
seconds after it was written; a folder is there when there is an object in it, and to make one does
nothing. To remove a folder removes what is listed.

Two things are without delay, since no save of Orbax outlives that they are not: whether a folder
is there, and what is listed in a folder that Orbax has begun. It merges what the processes have
written by a listing, and leaves out with a warning what that lacks.

Two functions of Orbax are replaced as well. The arrays are written by TensorStore, whose own driver
for `gs://` wants a real service: they go into the same folder through its driver for files, which
makes each object whole at once, too. And Orbax would ask Google's client what kind of bucket it is.

As a program it is `python -m jaxpref.main` with such a bucket: FAKE_BUCKET says where its folder
is, and FAKE_BUCKET_LATE how many seconds its listings are late.
"""

import contextlib
import fnmatch
import io
import os
import runpy
import sys
import time
import uuid
from pathlib import Path

from etils.epath import backend, gpath, stat_utils


class Bucket(backend.Backend):
    """Of all names; their objects are files below `root`."""

    def __init__(self, root, late=2.0):
        self._root, self.late = Path(root), late

    def local(self, path):
        """The file of an object."""
        return self._root / str(os.fspath(path)).removeprefix("gs://")

    def _files(self, path):
        """What a listing has of all that is in a folder."""
        folder = self.local(path)
        within = any(
            (above / "_CHECKPOINT_METADATA").exists() for above in (folder, *folder.parents)
        )
        late = 0.0 if within else self.late
        found = []
        for file in folder.rglob("*"):
            # Another process may have removed it since.
            with contextlib.suppress(FileNotFoundError):
                if file.is_file() and time.time() - file.stat().st_mtime >= late:
                    found.append(file)
        return found

    def open(self, path, mode):
        if "a" in mode or "+" in mode:
            raise OSError(f"{path}: nothing can be added to an object")
        if "w" not in mode:
            return self.local(path).open(mode)
        raw = _Written(self.local(path), self._root / f".open-{uuid.uuid4().hex}")
        return io.BufferedWriter(raw) if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    def exists(self, path):
        return self.local(path).is_file() or self.isdir(path)

    def isdir(self, path):
        return any(file.is_file() for file in self.local(path).rglob("*"))

    def listdir(self, path):
        folder = self.local(path)
        found = sorted({file.relative_to(folder).parts[0] for file in self._files(path)})
        if not found:
            raise FileNotFoundError(path)
        return found

    def glob(self, path):
        folder, _, pattern = os.fspath(path).rpartition("/")
        assert "*" not in folder, "not in a bucket"
        with contextlib.suppress(FileNotFoundError):
            return [f"{folder}/{name}" for name in fnmatch.filter(self.listdir(folder), pattern)]
        return []

    def walk(self, top, *, top_down=True, on_error=None):
        raise OSError(f"{top}: what epath gives of a bucket has no address")

    def mkdir(self, path, *, exist_ok=False, mode=None):
        if not exist_ok and self.exists(path):
            raise FileExistsError(path)

    makedirs = mkdir

    def rmtree(self, path):
        files = self._files(path)
        if not files:
            raise FileNotFoundError(path)
        for file in files:
            file.unlink()

    def remove(self, path):
        self.local(path).unlink()

    def rename(self, path, dst):
        raise OSError(f"{path}: an object cannot be renamed")

    replace = rename

    def copy(self, path, dst, overwrite):
        raise OSError(f"{path}: is not copied here")

    def stat(self, path):
        file = self.local(path)
        if not file.is_file() and self.isdir(path):
            return stat_utils.StatResult(is_directory=True, length=0, mtime=0)
        found = file.stat()
        return stat_utils.StatResult(
            is_directory=False, length=found.st_size, mtime=int(found.st_mtime)
        )


class _Written(io.FileIO):
    """An object that is being written."""

    def __init__(self, target, file):
        super().__init__(file, "w")
        self._target, self._file = target, file

    def close(self):
        if not self.closed:
            super().close()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # To rename it must not make it older.
            os.utime(self._file)
            self._file.replace(self._target)


def use(root, late=2.0, replace=setattr):
    """From now on `gs://` is a bucket in the folder `root`; `replace` does what `setattr` does."""
    from orbax.checkpoint._src.path import gcs_utils

    from jaxpref import workdir

    Path(root).mkdir(parents=True, exist_ok=True)
    bucket = Bucket(root, late)

    def kvstore(path):
        return {"driver": "file", "path": str(bucket.local(path))}

    replace(workdir, "_BACKENDS", ("etils",))
    replace(workdir, "_copies", {})
    replace(gpath, "_PREFIX_TO_BACKEND", {**gpath._PREFIX_TO_BACKEND, "gs": bucket})
    replace(gcs_utils, "get_kvstore_for_gcs", kvstore)
    replace(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return bucket


if __name__ == "__main__":
    use(os.environ["FAKE_BUCKET"], float(os.environ.get("FAKE_BUCKET_LATE", "2")))
    sys.argv[0] = "jaxpref.main"
    runpy.run_module("jaxpref.main", run_name="__main__")
