"""What the commands share."""

import errno
import logging as python_logging
import sys
from typing import NoReturn

from absl import flags, logging

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Of a run: its checkpoints and measurements; the same workdir resumes."
)
OUTPUT = flags.DEFINE_string("output", None, "What to write: a new directory, or a file.")


def fail(message: str) -> NoReturn:
    """Ends a command with a message and the exit status of wrong usage."""
    print(f"jaxpref: {message}", file=sys.stderr)
    sys.exit(2)


def quiet() -> None:
    """Leaves warnings and errors in the log, unless `--verbosity` asks for more."""
    if flags.FLAGS["verbosity"].present:
        return
    # Orbax tells every step of every save at the level of information.
    logging.set_verbosity(logging.WARNING)
    # What fails in its threads it raises too, and that is told in a sentence.
    python_logging.getLogger("absl").addFilter(
        lambda record: "orbax" not in record.pathname or record.exc_info is None
    )


def no_room(error: OSError) -> str | None:
    """The message for an error that comes of a full disk; None for any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}the disk is full ({error.strerror}). Make room, then give the same command."
