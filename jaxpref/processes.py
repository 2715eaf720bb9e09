"""Several processes of one run: how they join, agree, and end together.

What they tell each other here are texts, by the service through which JAX joins processes. So a
process can be told of an error while it waits for another one on its devices.
"""

import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxpref import workdir
from jaxpref.errors import INTERRUPTED, UserError
from jaxpref.terminal import console

_T = TypeVar("_T")

# Seconds without a sign of life after which JAX aborts the others. `_DEAD` comes first, which ends
# them with a sentence; this one needs no Python to run.
_HEARTBEAT = 60
# Milliseconds: how long one question to the service takes, and how long one that fails waits until
# all others have heard of it.
_ASKED, _HEARD = 1_000, 10_000
_FAILURE, _HEARD_BY, _PULSE = "jaxpref/failure", "jaxpref/heard", "jaxpref/pulse"
_LEAVING = "jaxpref/leaving"
_AWAY = (
    "of this run does not answer, so this one ends, too. The same command goes on from the last "
    "checkpoint."
)
_UNSAVED = (
    "interrupted: there is nothing to save, since no step was done that is not saved. The same "
    "command goes on from there."
)
# Seconds that the first process leaves to the others to end before it.
_GRACE = 1.0
# Seconds that a process which ends at once has for what it leaves behind.
_TIDYING = 5.0
# How many of the values that processes compare the service keeps: none is that far behind another.
_KEPT = 1_000
# Seconds between two signs of life that a process gives of its own; without one after which it is
# missed where nothing goes on; and after which it is dead, whatever goes on.
_PULSE_EVERY, _MISSED, _DEAD = 5.0, 10.0, 35.0


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes of a run, whose devices together are then `jax.devices()`.

    It has to come before anything that asks JAX for a device. Without arguments the cluster says
    who the others are (Cloud TPU, Slurm, Open MPI, Kubernetes); elsewhere there are none.

    Args:
      coordinator: HOST:PORT of process 0, which waits there for the others.
      processes: how many there are; 1 for this one alone, whatever the cluster says.
      process: which of them this one is, from 0.

    Raises:
      UserError: they cannot be joined.
    """
    if processes == 1:
        return
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=_HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        if coordinator is None and "coordinator_address" in str(error):
            # No cluster is known here.
            return
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the other processes of this run cannot be joined ({reason}). Give each of them the "
            "same --coordinator=HOST:PORT and --num_processes, and its own --process_id; or "
            "--num_processes=1 for a process by itself."
        ) from error


def in_first(action: Callable[[], Any]) -> Any:
    """Acts in the first process alone; what it gives, or its error, goes to all.

    Args:
      action: gives what JSON can hold.

    Raises:
      UserError: what the action raises, in every process.
    """
    if jax.process_count() == 1:
        return action()
    key = _key("first")
    if jax.process_index() == 0:
        try:
            with _alone():
                answer = action()
        except UserError as error:
            _set(key, json.dumps({"error": str(error)}))
            raise
        _set(key, json.dumps({"answer": answer}))
        return answer
    told = json.loads(_get(key))
    if "error" in told:
        raise UserError(told["error"])
    return told["answer"]


def after_first(action: Callable[[], _T]) -> _T:
    """Acts in the first process, and when it is done in each of the others.

    Raises:
      UserError: what the action raises; in every process, if the first one raises it.
    """
    done: list[_T] = []
    in_first(lambda: done.append(action()))
    return done[0] if done else action()


def agree(settings: Mapping[str, Any]) -> None:
    """Refuses to go on where a process has other settings than the first one.

    Args:
      settings: flat, of what JSON can hold.

    Raises:
      UserError: in the process that differs, saying in what.
    """
    first = in_first(lambda: dict(settings))
    if different := [
        f"{key}: {settings.get(key)!r} here, {first.get(key)!r} there"
        for key in {**first, **settings}
        if settings.get(key) != first.get(key)
    ]:
        raise UserError(
            f"process {jax.process_index()} of this run does not have what process 0 has:\n  "
            + "\n  ".join(different)
            + "\nGive all processes the same recipe, settings and data."
        )


def check_same(what: str, value: str) -> None:
    """Refuses to go on where a process has another value than the first one.

    The first process does not wait for the others.

    Args:
      what: it is, in words.
      value: this process's; all of them ask in the same order.

    Raises:
      UserError: in the process whose value is another one.
    """
    if jax.process_count() == 1:
        return
    key = _key("same")
    if jax.process_index() == 0:
        _set(key, value)
    elif _get(key) != value:
        raise UserError(
            f"{what} of process {jax.process_index()} is not that of process 0, though they began "
            "with the same data and settings. Nothing was computed with it. See that no file that "
            "they read is being written, and that what you compute for them is the same everywhere."
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
        _end(error)
    finally:
        watch.ending.set()
        # A thread that comes back from asking while Python ends may abort it.
        watch.join()
        # The first process may be gone.
        with suppress(jax.errors.JaxRuntimeError):
            _give_pulse(done=True)


class _Progress:
    """How far this process has come; written by its main thread, read by the one that watches."""

    def __init__(self) -> None:
        self.at, self.count, self.limit = time.monotonic(), 0, 0.0

    @property
    def seconds(self) -> float:
        """Since it has come further."""
        return time.monotonic() - self.at


_progress = _Progress()


def beat(limit: float | None = None) -> None:
    """Says that this process has come further: a step has ended, or a batch, or sampling.

    Args:
      limit: see `watched`; from now on; None: as before.
    """
    _progress.at = time.monotonic()
    _progress.count += 1
    if limit is not None:
        _progress.limit = limit


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Ends all processes if this one does not come further for a while, see `beat`.

    A process may hang and still answer, so that nobody misses it, and all others wait for it.

    Args:
      seconds: without a `beat` until then; 0: for ever.
    """
    beat(seconds)
    try:
        yield
    finally:
        _progress.limit = 0.0


def _end(error: BaseException) -> NoReturn:
    """Tells all others of this process's error, and ends."""
    told = isinstance(error, SystemExit)
    reason = error.__context__ if told else error
    sentence = (
        str(reason) if isinstance(reason, UserError) else f"{type(reason).__name__}: {reason}"
    )
    silent = _tell(sentence)
    if silent and not isinstance(reason, UserError):
        # What fails where another process has died says nothing to a reader.
        first = str(reason).partition("\n")[0]
        print(f"jaxpref: process {_names(silent)} {_AWAY} ({first})", file=sys.stderr)
    # What XLA raises begins with a word in capitals, whatever the type of the error is.
    if not told and not (silent and re.match(r"[A-Z_]+: ", str(reason))):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    _leave()
    # As Python ends, JAX would wait for the others to say good-bye.
    _exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


class _Watch(threading.Thread):
    """Waits for the failure of another process, and ends this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ending = threading.Event()
        # The last sign of life of each process, and when it came, by this one's clock.
        self._pulses: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        """Asks until this process ends, and says now and then that it is there."""
        looked = 0.0
        while not self.ending.is_set():
            try:
                if time.monotonic() - looked > _PULSE_EVERY:
                    looked = time.monotonic()
                    _give_pulse()
                    self._look()
                    if jax.process_index() == 0 and (dead := self._silent(_DEAD)):
                        _end_without(dead)
                told = json.loads(_client().blocking_key_value_get(_FAILURE, _ASKED))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    if 0 < _progress.limit < _progress.seconds and not self.ending.is_set():
                        self._end_hanging()
                    continue
                if "UNAVAILABLE" in str(error) and not self.ending.is_set():
                    # The service itself is gone, and with it the first process. JAX aborts this one
                    # for that at the same time, which says neither who is missing nor what to do.
                    os.write(2, f"jaxpref: process 0 {_AWAY}\n".encode())
                    _exit(1)
                self.ending.wait(1.0)
                continue
            if self.ending.is_set() or told["process"] == jax.process_index():
                _hear()
                return
            reason = told["reason"]
            if told["code"] != INTERRUPTED:
                reason = f"jaxpref: process {told['process']} of this run cannot go on: {reason}"
            # Not print: another write may be under way.
            os.write(2, f"{reason}\n".encode())
            _hear()
            if jax.process_index() == 0:
                _leave_last(told["process"])
            _exit(told["code"])

    def _look(self) -> None:
        for key, pulse in _client().key_value_dir_get(_PULSE):
            process = int(key.rpartition("/")[2])
            if self._pulses.get(process, ("",))[0] != pulse:
                self._pulses[process] = (pulse, time.monotonic())

    def _silent(self, seconds: float) -> list[int]:
        """The processes that have given no sign of life for so long, and have not said good-bye."""
        return sorted(
            process
            for process, (pulse, at) in self._pulses.items()
            if time.monotonic() - at > seconds and not json.loads(pulse)["done"]
        )

    def _end_hanging(self) -> NoReturn:
        """Ends all processes, saying which one the others wait for."""
        self._look()
        missed = self._silent(_MISSED)
        counts = {
            process: json.loads(pulse)["count"] for process, (pulse, _) in self._pulses.items()
        }
        behind = sorted(i for i, count in counts.items() if count == min(counts.values()))
        if missed:
            why = f"process {_names(missed)} does not answer"
        elif len(behind) < len(counts):
            why = f"process {_names(behind)} is behind the others"
        else:
            why = "all processes wait"
        reason = (
            f"nothing has ended for {_progress.seconds:.0f} s (train.hang_seconds is "
            f"{_progress.limit:g}): {why}. The same command goes on from the last checkpoint."
        )
        _end_for(reason, missed)


def leave_unsaved() -> NoReturn:
    """Ends all processes as interrupted, from any thread, whatever their main ones wait for."""
    # Not print: another write may be under way.
    os.write(2, f"\n{_UNSAVED}\n".encode())
    if jax.process_count() > 1:
        _tell(_UNSAVED, code=INTERRUPTED)
        _leave()
    _exit(INTERRUPTED)


def _end_children() -> None:
    # Those that tokenise would wait for more to do.
    for child in multiprocessing.active_children():
        # The main thread may close it in the meantime.
        with suppress(ValueError):
            child.terminate()


_last_acts: list[Callable[[], object]] = []


@contextmanager
def at_any_end(action: Callable[[], object]) -> Iterator[None]:
    """Acts when this is over, and also if this process ends at once, from another thread then."""
    _last_acts.append(action)
    try:
        yield
    finally:
        _last_acts.remove(action)
        action()


def _exit(code: int) -> NoReturn:
    """Ends this process at once, whatever its threads wait for."""
    workdir.remove_temporary_folders()
    # A bucket may be out of reach.
    tidying = threading.Thread(target=_act_at_last, daemon=True)
    tidying.start()
    tidying.join(_TIDYING)
    os._exit(code)


def _act_at_last() -> None:
    # What a bucket is asked for may take all the time that there is, so it comes last.
    first: list[Callable[[], object]] = [_end_children, console.show_cursor]
    for action in [*first, *reversed(_last_acts)]:
        # The main thread may be about to do the same, and a bucket fails in ways of its own; the
        # others are to act all the same.
        with suppress(Exception):
            action()


def _hear() -> None:
    """Says that this process has heard of another one's failure."""
    _client().key_value_set(f"{_HEARD_BY}/{jax.process_index()}", "")


def _leave_last(failed: int) -> None:
    """Waits in the first process until the others are about to end.

    It is the one that the others are joined through: JAX aborts them when it is gone.
    """
    keys = [_LEAVING, *(f"{_HEARD_BY}/{i}" for i in range(1, jax.process_count()) if i != failed)]
    # One of them may be gone before it could say so.
    with suppress(jax.errors.JaxRuntimeError):
        for key in keys:
            _client().blocking_key_value_get(key, _HEARD)
    time.sleep(_GRACE)


def _leave() -> None:
    """Says in a process that has failed that it ends now."""
    if jax.process_index() == 0:
        time.sleep(_GRACE)
        return
    # The first process may be gone.
    with suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_LEAVING, "", allow_overwrite=True)


def _give_pulse(*, done: bool = False) -> None:
    pulse = {"time": time.time(), "count": _progress.count, "done": done}
    _client().key_value_set(
        f"{_PULSE}/{jax.process_index()}", json.dumps(pulse), allow_overwrite=True
    )


def _names(processes: Collection[int]) -> str:
    return " and ".join(map(str, processes))


def _end_without(dead: Collection[int]) -> NoReturn:
    """Ends all processes, since some are dead."""
    _end_for(f"process {_names(dead)} {_AWAY}", dead)


def _end_for(reason: str, missed: Collection[int]) -> NoReturn:
    """Ends all processes from the thread that watches, whatever the main one waits for."""
    # Not print: another write may be under way.
    os.write(2, f"jaxpref: {reason}\n".encode())
    _tell(reason, missed)
    _leave()
    _exit(1)


def _tell(reason: str, missed: Collection[int] = (), code: int = 2) -> list[int]:
    """Tells all others why this process ends, and gives those that have not heard it.

    Args:
      reason: in a sentence.
      missed: processes that are not waited for.
      code: the exit status of the others.
    """
    me, silent = jax.process_index(), []
    try:
        failure = {"process": me, "reason": reason, "code": code}
        _client().key_value_set(_FAILURE, json.dumps(failure))
    except jax.errors.JaxRuntimeError as error:
        # Another one has told of its own failure before; or the service is gone, and with it the
        # first process.
        return [] if "ALREADY_EXISTS" in str(error) else [0]
    for other in range(jax.process_count()):
        try:
            if other != me and other not in missed:
                _client().blocking_key_value_get(f"{_HEARD_BY}/{other}", _HEARD)
        except jax.errors.JaxRuntimeError:
            silent.append(other)
    return silent


def _of_all(error: BaseException) -> bool:
    """Whether all processes end by this: they have agreed to, or the work is done."""
    if isinstance(error, SystemExit) and error.__context__ is not None:
        error = error.__context__
    if isinstance(error, KeyboardInterrupt):
        # What they agree on has a message that says after which step.
        return bool(str(error))
    return isinstance(error, SystemExit) and not error.code


_asked: dict[str, int] = {}
_acting: list[bool] = []


@contextmanager
def _alone() -> Iterator[None]:
    """What is done here the first process does by itself."""
    _acting.append(True)
    try:
        yield
    finally:
        _acting.pop()


def _key(what: str) -> str:
    """A new key, the same in all processes, which ask in the same order."""
    if _acting:
        raise UserError(
            "a function that the first process calls by itself, such as a reward, has asked for "
            "what all processes of the run have to do together. Let it compute by itself; a reward "
            "model is given as reward.path."
        )
    _asked[what] = _asked.get(what, 0) + 1
    return f"jaxpref/{what}/{_asked[what]}"


def _set(key: str, value: str) -> None:
    """Tells the others, and forgets what they have been told long ago."""
    _client().key_value_set(key, value)
    what, _, number = key.rpartition("/")
    if int(number) > _KEPT:
        _client().key_value_delete(f"{what}/{int(number) - _KEPT}")


def _get(key: str) -> str:
    """What another process says, however long that takes."""
    while True:
        try:
            return _client().blocking_key_value_get(key, _ASKED)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _client() -> Any:
    return ocp.multihost.get_jax_distributed_client()
