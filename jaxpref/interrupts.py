"""Stopping at a good place rather than in the middle of something."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jax.experimental import multihost_utils


class StoppedError(Exception):
    """What was going on has been stopped in the middle, and nothing of it is kept."""


@contextmanager
def interrupts(saying: str, *, together: bool = False) -> Iterator[Callable[[], bool]]:
    """Asks now and then whether to stop: a first SIGINT or SIGTERM says so.

    A second signal acts as usual. Where several processes train together one of them may get the
    signal alone, but all have to stop at the same place: JAX's own handler of SIGTERM tells the
    others, and they agree. So all of them have to ask equally often.

    Args:
      saying: what is still done after the first signal, for whoever sent it.
      together: whether several processes work on the same steps.

    Yields:
      Says whether to stop; once it has, it says so again.
    """
    asked = itertools.count()
    agreed: list[int] = []

    def agree() -> bool:
        number = next(asked)
        if not agreed and multihost_utils.reached_preemption_sync_point(number):
            agreed.append(number)
        return bool(agreed)

    seen: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        # This is not print, since the handler may run in the middle of another write.
        os.write(2, f"\ninterrupted: {saying} (once more to stop at once)\n".encode())
        restore()
        if together:
            os.kill(os.getpid(), signal.SIGTERM)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        for number in (signal.SIGINT,) if together else (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:
        # Handlers belong to the main thread; a caller in another one has its own.
        before.clear()
    try:
        yield agree if together else lambda: bool(seen)
    finally:
        restore()
