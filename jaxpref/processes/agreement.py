"""Processes agree: the first one says what all others go by."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from jaxpref.errors import UserError
from jaxpref.processes import service

_T = TypeVar("_T")

# How many of the values that processes compare the service keeps: none is that far behind another.
_KEPT = 1_000


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
    service.client().key_value_set(key, value)
    what, _, number = key.rpartition("/")
    if int(number) > _KEPT:
        service.client().key_value_delete(f"{what}/{int(number) - _KEPT}")


def _get(key: str) -> str:
    """What another process says, however long that takes."""
    while True:
        try:
            return service.ask(key)
        except jax.errors.JaxRuntimeError as error:
            if not service.is_late(error):
                raise
