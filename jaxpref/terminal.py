"""What a run says in the terminal, or in a log file in its place."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

# How often a log file is told of what takes long before the first step.
_SECONDS_BETWEEN_LINES = 30

# A log file has no width to wrap at.
console = Console(highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Tells how far something is, to whoever waits for it: in a log file, now and then.

    Args:
      what: is being done.
      unit: of what is counted, in the plural.

    Yields:
      To be called with how many are done.
    """
    told = time.monotonic()
    with console.status(what) as status:

        def tell(done: int) -> None:
            nonlocal told
            text = f"{what}: {done:,} {unit}"
            status.update(text)
            if not console.is_terminal and time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                console.print(text)
                told = time.monotonic()

        yield tell


def listed(counts: Mapping[str, int]) -> str:
    """What was left out or cut, to follow on a sentence; empty if nothing was."""
    return "".join(f", {n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n)
