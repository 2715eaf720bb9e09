"""The best response to each prompt so far, kept in a file so that a resumed run has it."""

import json
from contextlib import closing
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxpref import workdir
from jaxpref.workdir import AnyPath


class Kept(NamedTuple):
    """A response with its reward, and the step in which it was sampled."""

    step: int
    reward: float
    response: Int[np.ndarray, " tokens"]


class Pool:
    """The best responses, in memory and in a file with one line a response.

    A step's lines are written before its update. A run that is resumed after step s reads those of
    the steps up to s alone: what a later one had added is sampled again.
    """

    def __init__(self, path: AnyPath):
        """Reads what an earlier run has kept."""
        self._path = path
        self._best: dict[int, Kept] = {}
        self._lines: list[str] = []
        self._read = False

    def best(self, index: int, step: int) -> Kept | None:
        """The best response to a prompt from the steps before this one; None without any."""
        if not self._read:
            self._resume(step)
        return self._best.get(index)

    def add(self, step: int, index: int, response: Int[np.ndarray, " _"], reward: float) -> None:
        """Keeps a response that is the best so far."""
        kept = Kept(step, reward, np.asarray(response, np.int32))
        before = self._best.get(index)
        if before is not None and before.reward >= reward:
            return
        self._best[index] = kept
        line = {"step": step, "prompt": index, "reward": reward, "response": kept.response.tolist()}
        self._lines.append(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Writes what was added."""
        if self._lines and not jax.process_index():
            lines = "".join(self._lines).encode()
            with closing(workdir.append(self._path)) as file:
                while lines:
                    lines = lines[file.write(lines) or 0 :]
                file.flush()
        self._lines = []

    def _resume(self, step: int) -> None:
        """Drops what was added in this step or later, by a run that has died since."""
        self._read = True
        content = workdir.read(self._path)
        if content is None:
            return
        whole = []
        for text in content.decode().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                # A line that was cut is of the step that was under way.
                continue
            if line["step"] < step:
                whole.append(text + "\n")
                response = np.asarray(line["response"], np.int32)
                self._best[line["prompt"]] = Kept(line["step"], line["reward"], response)
        if not jax.process_index():
            workdir.write(self._path, "".join(whole))
