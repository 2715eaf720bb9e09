"""A workdir has one owner: `run.lock` says who, and shows that the owner lives.

On a disk the file is locked as well, which is certain among the processes of one machine. Other
machines may not see that, and a bucket has no locks. There the owner changes a number in the file
every few seconds, and who comes watches whether it changes: clocks of two machines are never
compared. The file has two lines, `process PID on HOST` and `ID MACHINE NUMBER`.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from jaxpref import processes, workdir as workdir_lib
from jaxpref.errors import UserError
from jaxpref.terminal import console
from jaxpref.workdir import AnyPath

_LOCK = "run.lock"
# Seconds between two signs of life, and how long without any the owner of a workdir is dead.
_BEAT, _DEAD = 10.0, 35.0
# Seconds until what another one has written in the meantime would be seen: longer than it takes
# from looking whether there is an owner to writing down that one is it.
_SETTLED = 2.0


@contextmanager
def hold(workdir: AnyPath) -> Iterator[Callable[[], None]]:
    """Makes the workdir, and keeps other runs out of it until this process ends, however it ends.

    Yields:
      Raises a `UserError` if another run has taken the workdir over, because this one gave no sign
      of life for a while.

    Raises:
      UserError: another run is training there, it cannot be written, or this process does not
        see what the first one has written.
    """
    held: list[_Held] = []
    processes.in_first(lambda: held.append(_take(workdir)))
    if not held:
        # It would wait for what the first process makes, when all of them save.
        if workdir_lib.read(workdir / _LOCK) is None:
            raise workdir_lib.not_shared(workdir)
        yield lambda: None
        return
    with processes.at_any_end(held[0].release):
        yield held[0].require


class _Owner(NamedTuple):
    """What a lock says.

    Attributes:
      name: in words, with process and host.
      id: random; empty in a lock that has no signs of life.
      machine: see `_machine`.
      number: that changes while the owner lives.
    """

    name: str
    id: str
    machine: str
    number: str


def _take(workdir: AnyPath) -> "_Held":
    path = workdir / _LOCK
    descriptor, locked = None, False
    try:
        workdir_lib.make(workdir)
        if isinstance(path, Path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = _flock(descriptor, workdir)
        there = _read(path)
        if there is not None and not _is_dead(there, locked):
            _await_death(workdir, there)
        held = _Held(path, descriptor)
        if not locked:
            time.sleep(_SETTLED)
            held.require()
    except BaseException as error:
        if descriptor is not None:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise UserError(
                f"--workdir={workdir}: cannot be written ({error.strerror or error}); give a "
                "directory that can."
            ) from error
        raise
    held.start()
    return held


def _flock(descriptor: int, workdir: AnyPath) -> bool:
    """Locks the file; False where there are no locks.

    Raises:
      UserError: it is locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _taken(workdir, _read(workdir / _LOCK)) from error
    except OSError:
        return False
    return True


def _taken(workdir: AnyPath, there: _Owner | None) -> UserError:
    who = there.name if there else "just begun"
    return UserError(
        f"--workdir={workdir}: another run is training there, {who}. Wait for it, end it, or give "
        "another --workdir."
    )


def _is_dead(there: _Owner, locked: bool) -> bool:
    """Whether the owner is known to have ended, without watching."""
    if locked:
        return there.name.endswith(f" on {socket.gethostname()}")
    if not there.id or there.machine != _machine():
        return False
    try:
        os.kill(int(there.name.split()[1]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, IndexError, OSError):
        return False
    return False


def _await_death(workdir: AnyPath, there: _Owner) -> None:
    """Returns when the owner has shown no sign of life for long enough.

    Raises:
      UserError: it lives.
    """
    path = workdir / _LOCK
    if not there.id:
        console.print(
            f"{path}: the last run here, {there.name}, has not ended as it should. If it still "
            "trains, this file system does not share its locks between hosts: end one of the two."
        )
        return
    console.print(
        f"{path}: the last run here, {there.name}, has not ended as it should; whether it still "
        f"trains shows within {_DEAD:.0f} s"
    )
    end = time.monotonic() + _DEAD
    while time.monotonic() < end:
        time.sleep(min(1.0, _BEAT))
        now = _read(path)
        if now is None:
            return
        if now != there:
            raise _taken(workdir, now)


class _Held:
    """A lock that this process holds, with the thread that shows that it lives."""

    def __init__(self, path: AnyPath, descriptor: int | None):
        """Writes down that this process is the owner."""
        self._path, self._descriptor = path, descriptor
        self._id, self._number = uuid.uuid4().hex, 0
        self._lost: _Owner | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True, name="workdir's owner")
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
        self._beat()

    def start(self) -> None:
        self._thread.start()

    def require(self) -> None:
        """Refuses to go on if the workdir has another owner."""
        there = self._lost or _read(self._path)
        if there is not None and there.id != self._id:
            self._lost = there
            raise UserError(
                f"--workdir={self._path.parent}: {there.name} has taken it over, since this run "
                "gave no sign of life for a while, or began at the same time. This one ends; give "
                "it another --workdir."
            )

    def release(self) -> None:
        self._ending.set()
        # A thread that lives while Python ends may abort JAX.
        self._thread.join()
        # A bucket may be out of reach; then the next run sees that nobody lives here.
        with suppress(OSError):
            there = _read(self._path)
            if there is None or there.id != self._id:
                pass
            elif self._descriptor is not None:
                os.ftruncate(self._descriptor, 0)
            else:
                self._path.unlink(missing_ok=True)
        if self._descriptor is not None:
            os.close(self._descriptor)

    def _live(self) -> None:
        while not self._ending.wait(_BEAT):
            try:
                self.require()
                self._beat()
            except UserError as error:
                console.print(str(error))
                return
            except OSError:
                # What is out of reach now may be in reach again at the next time.
                continue

    def _beat(self) -> None:
        self._number += 1
        text = (
            f"process {os.getpid()} on {socket.gethostname()}\n"
            f"{self._id} {_machine() or '-'} {self._number:010d}\n"
        )
        if self._descriptor is None:
            workdir_lib.write(self._path, text)
        else:
            # In place, since the lock is of this very file; it stays as long as it is, so that
            # nobody reads a part.
            os.pwrite(self._descriptor, text.encode(), 0)
            # Over a network it would stay on this machine for a while.
            os.fsync(self._descriptor)


def _read(path: AnyPath) -> _Owner | None:
    content = workdir_lib.read(path)
    if content is None:
        return None
    lines = content.decode(errors="replace").split("\n")
    said = lines[1].split() if len(lines) > 1 else []
    beating = said if len(said) == 3 else ["", "", ""]
    return _Owner(lines[0].strip(), *beating) if lines[0].strip() else None


def _machine() -> str:
    """Of processes whose numbers mean the same; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # A container counts its processes by itself.
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
