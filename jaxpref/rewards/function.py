"""Rewards that are Python functions, called as TRL calls its reward functions."""

import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref import processes
from jaxpref.errors import UserError
from jaxpref.rewards.base import Reward, Sampled, checked, shown

# What a function is given by these names is not a column of the records.
_OWN = ("prompt", "completion", "prompts", "completions", "completion_ids", "finished")


def find(path: str, key: str = "reward.function") -> Callable[..., Any]:
    """The function that `module:function` names.

    Args:
      path: `module:function`.
      key: what the path was given as, for messages.

    Raises:
      UserError: there is no such module, or nothing in it of that name that can be called.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{key}={path}: cannot be imported ({error}). It should be module:function, "
            "with the module where Python finds it, such as the directory that the command runs in."
        ) from error
    if not callable(found):
        raise UserError(f"{key}={path}: is of type {type(found).__name__}, no function.")
    return found


def from_function(name: str, function: Callable[..., Any]) -> Reward:
    """A reward from a function of keyword arguments, which gives one number a response.

    It is called as `function(prompts=, completions=, completion_ids=, finished=, **columns)`, all
    lists with one entry a response:

    - `prompts`: texts, or lists of messages;
    - `completions`: texts; to a list of messages a list of one message of the assistant;
    - `completion_ids`: lists of token ids, with the one that ended the response;
    - `finished`: False where the response was cut by length;
    - `columns`: every further column of the prompts' records, None where a record has none.

    A reward function of TRL is such a function. One that does not read all of this takes
    `**columns`.

    Where several processes train, the first one alone calls it.

    Args:
      name: for messages.
      function: may raise, or give what is no reward: the error then says for which prompt.
    """

    def reward(sampled: Sampled) -> Float[np.ndarray, " responses"]:
        def given() -> list[float]:
            return checked(name, call(name, function, _arguments(sampled)), sampled).tolist()

        return np.asarray(processes.in_first(given), np.float32)

    return reward


def call(name: str, function: Callable[..., Any], arguments: Mapping[str, list]) -> Any:
    """What a function says that a user gave.

    Args:
      name: for messages.
      function: of keyword arguments.
      arguments: lists that are all equally long, `prompts` among them.

    Raises:
      UserError: the function raises; the message says for which prompt.
    """
    try:
        return function(**arguments)
    except Exception as error:  # Whatever a user's function raises.
        prompts = arguments["prompts"]
        raise UserError(
            f"{name} raised {type(error).__name__}: {error} (for {len(prompts)} responses; it does "
            f"so for one to the prompt {shown(prompts[_culprit(function, arguments)])})."
        ) from error


def columns_of(records: Sequence[Mapping[str, Any]], without: Collection[str]) -> dict[str, list]:
    """Every column of records, but for some, as a list; None where a record has none."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names if name not in without}


def _arguments(sampled: Sampled) -> dict[str, list]:
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(sampled.prompts, sampled.responses, strict=True)
    ]
    return {
        "prompts": [p if isinstance(p, str) else list(p) for p in sampled.prompts],
        "completions": completions,
        "completion_ids": [ids.tolist() for ids in sampled.response_ids],
        "finished": sampled.finished.tolist(),
        **columns_of(sampled.records, _OWN),
    }


def _culprit(function: Callable[..., Any], arguments: Mapping[str, list]) -> int:
    """The number of the first response for which the function raises alone, else 0."""
    for number in range(len(arguments["prompts"])):
        try:
            function(**{name: values[number : number + 1] for name, values in arguments.items()})
        except Exception:
            return number
    return 0
