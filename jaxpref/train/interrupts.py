"""Stopping after a step rather than in the middle of it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextmanager
def interrupts() -> Iterator[Callable[[int], bool]]:
    """Asks, after each step, whether to stop: a first SIGINT or SIGTERM says so.

    A second signal acts as usual. Where several processes train together one of them may get the
    signal alone, but all have to stop after the same step: JAX's own handler of SIGTERM tells the
    others, and they agree.
    """
    seen: list[int] = []
    before: dict[int, Any] = {}
    together = jax.process_count() > 1

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        # This is not print, since the handler may run in the middle of another write.
        os.write(2, b"\ninterrupted: saving after this step (once more to stop at once)\n")
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
        yield multihost_utils.reached_preemption_sync_point if together else lambda _: bool(seen)
    finally:
        restore()
