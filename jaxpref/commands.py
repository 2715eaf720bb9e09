"""What all commands share."""

import errno
import logging as python_logging
import os
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


def show(text: str) -> None:
    """Prints a long text, of which the reader of a pipe may not want to see the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would otherwise try to write the rest as it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet() -> None:
    """Leaves warnings and errors in the log, unless `--verbosity` asks for more."""
    if flags.FLAGS["verbosity"].present:
        return
    # Orbax tells every step of every save at the level of information.
    logging.set_verbosity(logging.WARNING)
    # Orbax also raises what fails in its threads, and a sentence tells of it then.
    python_logging.getLogger("absl").addFilter(
        lambda record: "orbax" not in record.pathname or record.exc_info is None
    )


def no_room(error: OSError) -> str | None:
    """The message for an error that comes of a full disk; None for any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}the disk is full ({error.strerror}). Make room, then give the same command."
