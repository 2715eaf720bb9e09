"""Signs of life: each process says how far it has come, and sees which others say nothing more."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxpref.processes import service

_PULSE = "jaxpref/pulse"
# Seconds between two signs of life that a process gives of its own; without one after which it is
# missed where nothing goes on; and after which it is dead, whatever goes on.
EVERY, _MISSED, _DEAD = 5.0, 10.0, 35.0


class Progress:
    """How far this process has come; written by its main thread, read by the one that watches.

    Attributes:
      at: when it has last come further.
      count: how often it has.
      limit: seconds after which it hangs; 0: never.
    """

    def __init__(self) -> None:
        self.at, self.count, self.limit = time.monotonic(), 0, 0.0

    @property
    def seconds(self) -> float:
        """Since it has come further."""
        return time.monotonic() - self.at

    @property
    def hangs(self) -> bool:
        """Whether it should have come further by now."""
        return 0 < self.limit < self.seconds


progress = Progress()


def beat(limit: float | None = None) -> None:
    """Says that this process has come further: a step has ended, or a batch, or sampling.

    Args:
      limit: see `watched`; from now on; None: as before.
    """
    progress.at = time.monotonic()
    progress.count += 1
    if limit is not None:
        progress.limit = limit


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
        progress.limit = 0.0


def give_pulse(*, done: bool = False) -> None:
    """Gives a sign of life, or says good-bye."""
    pulse = {"time": time.time(), "count": progress.count, "done": done}
    service.client().key_value_set(
        f"{_PULSE}/{jax.process_index()}", json.dumps(pulse), allow_overwrite=True
    )


class Pulses:
    """The last sign of life of each process, and when it was first seen, by this one's clock."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, float]] = {}

    def look(self) -> None:
        """Sees which signs are new."""
        for key, pulse in service.client().key_value_dir_get(_PULSE):
            process = int(key.rpartition("/")[2])
            if self._seen.get(process, ("",))[0] != pulse:
                self._seen[process] = (pulse, time.monotonic())

    def dead(self) -> list[int]:
        """The processes that have died."""
        return self._silent(_DEAD)

    def missed(self) -> list[int]:
        """Those that do not answer, where nothing goes on."""
        return self._silent(_MISSED)

    def _silent(self, seconds: float) -> list[int]:
        """Those that have given no sign of life for so long, and have not said good-bye."""
        return sorted(
            process
            for process, (pulse, at) in self._seen.items()
            if time.monotonic() - at > seconds and not json.loads(pulse)["done"]
        )

    def behind(self) -> list[int]:
        """Those that have come less far than the others; empty where all are at the same place."""
        counts = {process: json.loads(pulse)["count"] for process, (pulse, _) in self._seen.items()}
        behind = sorted(i for i, count in counts.items() if count == min(counts.values()))
        return behind if len(behind) < len(counts) else []
