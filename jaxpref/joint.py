"""Work in which each process has a part, and which fails in all of them if it fails in one.

It is done in threads of its own, while the processes train on. What they tell each other goes by
the service through which JAX joins processes, under keys that each piece of work has for itself: a
piece that has failed leaves nothing that the next one could take for its own.
"""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax

from jaxpref.processes import service

# Seconds after which one that works looks whether the work has failed.
_ASKED = 1.0
_WORK = "jaxpref/joint"
_numbers = itertools.count()


class Failure(NamedTuple):
    """What has failed first.

    Attributes:
      process: in which one.
      reason: the text of its error.
      error: itself; None in the other processes.
    """

    process: int
    reason: str
    error: Exception | None


class _FailedElsewhereError(Exception):
    """Ends this process's part, since the work has failed in another one."""


class Joint:
    """One piece of such work; all processes make theirs in the same order."""

    def __init__(self) -> None:
        self._number = next(_numbers)
        self._alone = jax.process_count() == 1

    def do(
        self,
        part: Callable[[], object],
        finish: Callable[[], object],
        *,
        stop: Callable[[], object],
    ) -> Failure | None:
        """Does this process's part, and once all are done and good, what remains in the first one.

        Args:
          part: may wait for the others in `barrier`.
          finish: what remains.
          stop: ends a part early, from another thread, since the work has failed. What a part
            waits for may have been the part of the one that has failed; what does not heed `stop`
            ends in its own time.

        Returns:
          None if all is done; else the same failure in all processes, whose parts have ended.
        """
        with self._heeding(stop):
            error = self._try(part)
        # Also where it has failed: nobody clears up behind one that still writes.
        self._meet("parts", heed=False)
        if jax.process_index() == 0:
            if self._failure(error) is None:
                error = self._try(finish)
            if not self._alone and self._number:
                # By now all have read how the last piece has ended.
                service.client().key_value_delete(f"{_WORK}/{self._number - 1}/")
        self._meet("end", heed=False)
        return self._failure(error)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits in a part until all processes are there; as Orbax asks for it.

        It may take as long as the slowest one does: what writes for too long fails by itself.
        """
        self._meet(f"barriers/{key}", heed=True)

    @contextmanager
    def _heeding(self, stop: Callable[[], object]) -> Iterator[None]:
        if self._alone:
            yield
            return
        ended = threading.Event()

        def heed() -> None:
            while not ended.wait(_ASKED):
                if self._failure(None) is not None:
                    stop()
                    return

        thread = threading.Thread(target=heed, daemon=True, name="failure of others")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            # A thread that comes back from asking while Python ends may abort it.
            thread.join()

    def _try(self, action: Callable[[], object]) -> Exception | None:
        try:
            action()
        except Exception as error:
            if not self._alone:
                self._tell(error)
            return error
        return None

    def _tell(self, error: Exception) -> None:
        told = json.dumps([jax.process_index(), str(error)])
        try:
            service.client().key_value_set(self._key("failure"), told)
        except jax.errors.JaxRuntimeError as untold:
            # Another one may have failed before. What nobody hears of would count as done.
            if "ALREADY_EXISTS" not in str(untold):
                raise

    def _failure(self, error: Exception | None) -> Failure | None:
        if self._alone:
            return None if error is None else Failure(0, str(error), error)
        try:
            told = service.client().key_value_try_get(self._key("failure"))
        except jax.errors.JaxRuntimeError as missing:
            if "NOT_FOUND" in str(missing):
                return None
            raise
        process, reason = json.loads(told)
        return Failure(process, reason, error if process == jax.process_index() else None)

    def _meet(self, key: str, *, heed: bool) -> None:
        if self._alone:
            return
        if jax.process_index():
            service.client().key_value_set(self._key(f"{key}/{jax.process_index()}"), "")
            self._await(f"{key}/0", heed)
            return
        for process in range(1, jax.process_count()):
            self._await(f"{key}/{process}", heed)
        service.client().key_value_set(self._key(f"{key}/0"), "")

    def _await(self, key: str, heed: bool) -> None:
        while True:
            try:
                service.ask(self._key(key))
                return
            except jax.errors.JaxRuntimeError as error:
                if not service.is_late(error):
                    raise
            if heed and (failure := self._failure(None)) is not None:
                raise _FailedElsewhereError(f"process {failure.process}: {failure.reason}")

    def _key(self, name: str) -> str:
        return f"{_WORK}/{self._number}/{name}"
