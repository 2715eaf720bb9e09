"""All processes of a run end with the one that fails, dies or hangs, each with a message."""

import os
import re
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax

from jaxpref.errors import INTERRUPTED, UserError
from jaxpref.processes import failure, life, service
from jaxpref.processes.last_acts import end_at_once

_AWAY = (
    "of this run does not answer, so this one ends, too. The same command goes on from the last "
    "checkpoint."
)
_UNSAVED = (
    "interrupted: there is nothing to save, since no step was done that is not saved. The same "
    "command goes on from there."
)


@contextmanager
def together() -> Iterator[None]:
    """Ends all processes with the one that fails, each with a message.

    A process that waits for another one on its devices would wait for ever, or until the service
    misses the other's heartbeat. What is raised inside has been told on this process's terminal; a
    `SystemExit` is of the error that it comes from.
    """
    if jax.process_count() == 1:
        yield
        return
    watch = _Watch()
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.ending.set()
        if _of_all(error):
            raise
        _end_by(error)
    finally:
        watch.ending.set()
        # A thread that comes back from asking while Python ends may abort it.
        watch.join()
        # The first process may be gone.
        with suppress(jax.errors.JaxRuntimeError):
            life.give_pulse(done=True)


def leave_unsaved() -> NoReturn:
    """Ends all processes as interrupted, from any thread, whatever their main ones wait for."""
    _print(f"\n{_UNSAVED}")
    if jax.process_count() > 1:
        failure.tell(_UNSAVED, code=INTERRUPTED)
        failure.leave()
    end_at_once(INTERRUPTED)


class _Watch(threading.Thread):
    """Waits for the failure of another process, and ends this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        self._pulses = life.Pulses()

    def run(self) -> None:
        """Asks until this process ends, and says now and then that it is there."""
        looked = 0.0
        while not self.ending.is_set():
            try:
                if time.monotonic() - looked > life.EVERY:
                    looked = time.monotonic()
                    life.give_pulse()
                    self._pulses.look()
                    if jax.process_index() == 0 and (dead := self._pulses.dead()):
                        _end_for(f"process {_names(dead)} {_AWAY}", dead)
                told = failure.ask()
            except jax.errors.JaxRuntimeError as error:
                if service.is_late(error):
                    if life.progress.hangs and not self.ending.is_set():
                        self._end_hanging()
                    continue
                if "UNAVAILABLE" in str(error) and not self.ending.is_set():
                    # The service itself is gone, and with it the first process. JAX aborts this one
                    # for that at the same time, which says neither who is missing nor what to do.
                    _print(f"jaxpref: process 0 {_AWAY}")
                    end_at_once(1)
                self.ending.wait(1.0)
                continue
            if self.ending.is_set() or told.process == jax.process_index():
                failure.hear()
                return
            reason = told.reason
            if told.code != INTERRUPTED:
                reason = f"jaxpref: process {told.process} of this run cannot go on: {reason}"
            _print(reason)
            failure.hear()
            if jax.process_index() == 0:
                failure.await_others(told.process)
            end_at_once(told.code)

    def _end_hanging(self) -> NoReturn:
        """Ends all processes, saying which one the others wait for."""
        self._pulses.look()
        missed = self._pulses.missed()
        if missed:
            why = f"process {_names(missed)} does not answer"
        elif behind := self._pulses.behind():
            why = f"process {_names(behind)} is behind the others"
        else:
            why = "all processes wait"
        progress = life.progress
        reason = (
            f"nothing has ended for {progress.seconds:.0f} s (train.hang_seconds is "
            f"{progress.limit:g}): {why}. The same command goes on from the last checkpoint."
        )
        _end_for(reason, missed)


def _end_for(reason: str, missed: Collection[int]) -> NoReturn:
    """Ends all processes from the thread that watches, whatever the main one waits for."""
    _print(f"jaxpref: {reason}")
    failure.tell(reason, missed)
    failure.leave()
    end_at_once(1)


def _end_by(error: BaseException) -> NoReturn:
    """Tells all others of this process's error, and ends."""
    told = isinstance(error, SystemExit)
    reason = error.__context__ if told else error
    sentence = (
        str(reason) if isinstance(reason, UserError) else f"{type(reason).__name__}: {reason}"
    )
    silent = failure.tell(sentence)
    if silent and not isinstance(reason, UserError):
        # What fails where another process has died says nothing to a reader.
        first = str(reason).partition("\n")[0]
        print(f"jaxpref: process {_names(silent)} {_AWAY} ({first})", file=sys.stderr)
    # What XLA raises begins with a word in capitals, whatever the type of the error is.
    if not told and not (silent and re.match(r"[A-Z_]+: ", str(reason))):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    failure.leave()
    # As Python ends, JAX would wait for the others to say good-bye.
    end_at_once(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _of_all(error: BaseException) -> bool:
    """Whether all processes end by this: they have agreed to, or the work is done."""
    if isinstance(error, SystemExit) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, KeyboardInterrupt):
        # What they agree on has a message that says after which step.
        return bool(str(error))
    return isinstance(error, SystemExit) and not error.code


def _print(line: str) -> None:
    """Writes on the terminal from any thread; `print` may be in the middle of another write."""
    os.write(2, f"{line}\n".encode())


def _names(processes: Collection[int]) -> str:
    return " and ".join(map(str, processes))
