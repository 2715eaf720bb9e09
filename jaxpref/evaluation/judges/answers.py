"""A judge's answers on disk: each as soon as it is given, so that none is asked for twice."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from jaxpref.errors import UserError


def key_of(**question: Any) -> str:
    """A digest of all that an answer depends on."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Answers:
    """The answers in a file of JSON lines, by the key of their question.

    It is a context in which the file is locked: two commands would ask for the same answers.
    """

    def __init__(self, path: Path):
        """Finds what is there.

        Args:
          path: of the file; it is made with the first answer.
        """
        self.path = path
        self._answers: dict[str, Mapping[str, Any]] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Answers":
        """Locks and reads the file.

        Raises:
          UserError: another command has it, or it is no file of answers.
        """
        self._file = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(
                f"{self.path}: another command is asking for these answers. Wait for it, end it, "
                "or give another output."
            ) from error
        except OSError:
            # This file system has no locks.
            pass
        self._file.seek(0)
        lines = self._file.read()
        # A command that was killed, or had a full disk, may have left half a line.
        whole = lines.rfind(b"\n") + 1
        self._file.truncate(whole)
        for number, line in enumerate(lines[:whole].splitlines(), start=1):
            try:
                answer = json.loads(line)
                self._answers[answer["key"]] = answer
            except (ValueError, LookupError, TypeError) as error:
                self._file.close()
                raise UserError(
                    f"{self.path}:{number}: is not an answer of a judge ({error}). Remove this "
                    "line, or give another output."
                ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, key: str) -> Mapping[str, Any] | None:
        """The answer to a question; None if it has not been asked."""
        return self._answers.get(key)

    def keep(self, key: str, answer: Mapping[str, Any]) -> None:
        """Writes an answer, which is whole on disk before this returns.

        Raises:
          OSError: it cannot be written; those before it stay as they are.
        """
        assert self._file is not None
        line = json.dumps({"key": key, **answer}).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            # A disk that is nearly full takes a part of a line, and refuses the rest.
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError as error:
            self._file.truncate(end)
            error.filename = str(self.path)
            raise
        self._answers[key] = {"key": key, **answer}
