"""Stopping at a good place rather than in the middle of something."""

import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

# Seconds between two questions whether one of several processes has had a signal, and the key under
# which JAX's handler of SIGTERM tells all processes of it.
_ASKING, _NOTICE = 1.0, "RECEIVED_PREEMPTION_NOTICE"


class StoppedError(Exception):
    """What was going on has been stopped in the middle, and nothing of it is kept."""


@contextmanager
def interrupts(
    saying: str,
    *,
    together: bool = False,
    leave: Callable[[], NoReturn] | None = None,
) -> "Iterator[Interrupts]":
    """Asks now and then whether to stop: a first SIGINT or SIGTERM says so.

    A second signal acts as usual. Where several processes train together one of them may get the
    signal alone, but all have to stop at the same place: JAX's own handler of SIGTERM tells the
    others, and they agree. So all of them have to ask equally often.

    In a child that is forked signals act as they did before; SIGTERM as before JAX had it, too.

    Args:
      saying: what is still done after the first signal, for whoever sent it.
      together: whether several processes work on the same steps.
      leave: ends the process, or all processes, from any thread. So does a signal as long as there
        is nothing to save, which is until `Interrupts.save_from_now_on`; what is raised would have
        to wait until XLA has compiled, for minutes. None: a signal waits.

    Yields:
      Says whether to stop; once it has, it says so again.
    """
    asked = Interrupts(saying, together, leave)
    _active.append(asked)
    try:
        yield asked
    finally:
        unsaved = asked.close()
        _active.remove(asked)
    # The thread that leaves may not have had its turn between the signal and the end.
    if leave is not None and unsaved:
        leave()


class Interrupts:
    """See `interrupts`."""

    def __init__(self, saying: str, together: bool, leave: Callable[[], NoReturn] | None):
        """Takes over the signals, if this is the main thread."""
        self._saying, self._together = saying, together
        self._agreed, self._seen = False, False
        self._before: dict[int, Any] = {}
        self._first: _First | None = None
        try:
            for number in (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        except ValueError:
            # Handlers belong to the main thread; a caller in another one has its own.
            return
        if leave is not None:
            self._first = _First(together, leave)

    def __call__(self) -> bool:
        """Whether to stop."""
        if not self._together:
            return self._seen
        number = next(_asked)
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(number)
        return self._agreed

    def save_from_now_on(self) -> None:
        """Something has been done, so that a signal does not stop at once any more."""
        if self._first is not None:
            self._first.end()
            self._first = None

    def close(self) -> bool:
        """Gives the signals back; whether one came while there was nothing to save."""
        unsaved = self._first is not None
        self.save_from_now_on()
        self._restore()
        return unsaved and self._seen

    def close_in_child(self) -> None:
        """Gives the signals back in a process that was just forked, which has no other thread."""
        if self._first is not None:
            self._first.close_in_child()
            self._first = None
        self._restore()
        # What the child does with its signals from here on stays.
        self._before = {}
        if self._together:
            # JAX's handler tells a thread that a child does not have. Python does not know of it,
            # and still has the one before.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = True
        self._restore()
        # As long as there is nothing to save, what is done next is known to the one that leaves. It
        # may not hear of the signal, where something else has asked for the numbers of signals.
        saying = f": {self._saying}" if self._first is None else ""
        # This is not print, since the handler may run in the middle of another write.
        os.write(2, f"\ninterrupted{saying} (once more to stop at once)\n".encode())
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)


class _First(threading.Thread):
    """Leaves on a signal, as long as there is nothing to save.

    The main thread may be in the middle of what XLA does, which neither sees a signal nor can be
    left by raising something. A signal's number comes through a socket at once, whatever the main
    thread does. Of several processes the first one decides: it alone then comes no further, so
    that no other one saves.
    """

    def __init__(self, together: bool, leave: Callable[[], NoReturn]):
        super().__init__(daemon=True, name="signals before the first step")
        self._together, self._leave = together, leave
        self._deciding, self._over = threading.Lock(), False
        self._signals, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._before = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self.start()

    def end(self) -> None:
        """Ends the thread; does not come back if the thread has begun to leave."""
        with self._deciding:
            if self._over:
                return
            self._over = True
        signal.set_wakeup_fd(self._before)
        # To close it would tell the thread nothing as long as a child has it open, too.
        self._sender.shutdown(socket.SHUT_RDWR)
        # A thread that lives while Python ends may abort JAX.
        self.join()
        self._close()

    def close_in_child(self) -> None:
        """Leaves the socket to the parent, which would take the child's signals for its own."""
        signal.set_wakeup_fd(self._before)
        self._close()

    def _close(self) -> None:
        self._sender.close()
        self._signals.close()

    def run(self) -> None:
        """Waits for a signal."""
        try:
            if self._together:
                self._await_notice()
            else:
                self._await_signal(None)
        except EOFError:
            return
        with self._deciding:
            if not self._over:
                self._leave()

    def _await_notice(self) -> None:
        """Waits for a signal to any of the processes."""
        while True:
            if self._await_signal(_ASKING) == signal.SIGINT:
                # JAX's handler knows SIGTERM alone.
                os.kill(os.getpid(), signal.SIGTERM)
            if jax.process_index() == 0 and _noticed():
                return

    def _await_signal(self, seconds: float | None) -> int:
        """The number of the next signal; 0 if none comes for so long.

        Raises:
          EOFError: the thread is to end.
        """
        self._signals.settimeout(seconds)
        try:
            while number := self._signals.recv(1):
                if number[0] in (signal.SIGINT, signal.SIGTERM):
                    return number[0]
        except TimeoutError:
            return 0
        raise EOFError


def _noticed() -> bool:
    # It takes long to load, for commands that train nothing.
    import orbax.checkpoint as ocp

    try:
        ocp.multihost.get_jax_distributed_client().key_value_try_get(_NOTICE)
    except jax.errors.JaxRuntimeError:
        # As long as there is none it is not found.
        return False
    return True


# JAX lets processes stop at the question after the last one that any of them has asked, which may
# be the next run's first one. So its numbers go on from there.
_asked = itertools.count()

_active: list[Interrupts] = []
_forking = threading.local()


def _before_fork() -> None:
    # A child may be terminated as soon as there is one, which then has to wait for `_in_child`.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM] if _active else [])


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    for asked in reversed(_active):
        asked.close_in_child()
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
