"""How a process ends at once, and what it still does then."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from jaxpref import workdir
from jaxpref.terminal import console

# Seconds that a process which ends at once has for what it leaves behind.
_TIDYING = 5.0

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


def end_at_once(code: int) -> NoReturn:
    """Ends this process, whatever its threads wait for."""
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


def _end_children() -> None:
    # Those that tokenise would wait for more to do.
    for child in multiprocessing.active_children():
        # The main thread may close it in the meantime.
        with suppress(ValueError):
            child.terminate()
