"""A process that fails tells all others why, and they say that they have heard of it."""

import json
import time
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

import jax

from jaxpref.processes import service

_FAILURE, _HEARD_BY, _LEAVING = "jaxpref/failure", "jaxpref/heard", "jaxpref/leaving"
# Milliseconds for which one that fails waits until another one has heard of it.
_HEARD = 10_000
# Seconds that the first process leaves to the others to end before it.
_GRACE = 1.0


class Failure(NamedTuple):
    """Why a process ends, and with it all others.

    Attributes:
      process: that ends first.
      reason: in a sentence.
      code: the exit status of the others.
    """

    process: int
    reason: str
    code: int


def tell(reason: str, missed: Collection[int] = (), code: int = 2) -> list[int]:
    """Tells all others why this process ends, and gives those that have not heard it.

    Args:
      reason: see `Failure`.
      missed: processes that are not waited for.
      code: see `Failure`.
    """
    me, silent = jax.process_index(), []
    try:
        told = json.dumps(Failure(me, reason, code)._asdict())
        service.client().key_value_set(_FAILURE, told)
    except jax.errors.JaxRuntimeError as error:
        # Another one has told of its own failure before; or the service is gone, and with it the
        # first process.
        return [] if "ALREADY_EXISTS" in str(error) else [0]
    for other in range(jax.process_count()):
        try:
            if other != me and other not in missed:
                service.client().blocking_key_value_get(f"{_HEARD_BY}/{other}", _HEARD)
        except jax.errors.JaxRuntimeError:
            silent.append(other)
    return silent


def ask() -> Failure:
    """What has been told; see `service.ask`."""
    return Failure(**json.loads(service.ask(_FAILURE)))


def hear() -> None:
    """Says that this process has heard of another one's failure."""
    service.client().key_value_set(f"{_HEARD_BY}/{jax.process_index()}", "")


def leave() -> None:
    """Says in a process that has failed that it ends now."""
    if jax.process_index() == 0:
        time.sleep(_GRACE)
        return
    # The first process may be gone.
    with suppress(jax.errors.JaxRuntimeError):
        service.client().key_value_set(_LEAVING, "", allow_overwrite=True)


def await_others(failed: int) -> None:
    """Waits in the first process until the others are about to end.

    It is the one that the others are joined through: JAX aborts them when it is gone.

    Args:
      failed: the process that has failed.
    """
    keys = [_LEAVING, *(f"{_HEARD_BY}/{i}" for i in range(1, jax.process_count()) if i != failed)]
    # One of them may be gone before it could say so.
    with suppress(jax.errors.JaxRuntimeError):
        for key in keys:
            service.client().blocking_key_value_get(key, _HEARD)
    time.sleep(_GRACE)
