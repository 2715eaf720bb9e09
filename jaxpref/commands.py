"""What all commands share."""

import errno
import logging as python_logging
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NoReturn

from absl import flags, logging

from jaxpref.errors import INTERRUPTED, UserError

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Of a run: its checkpoints and measurements; the same workdir resumes."
)
OUTPUT = flags.DEFINE_string("output", None, "What to write: a new directory, or a file.")


MODEL = flags.DEFINE_string("model", None, "A run's workdir, or a directory or hub name.")
CHAT_TEMPLATE = flags.DEFINE_string(
    "chat_template", "", "See tokenizer.chat_template. Empty: the run's, or the tokenizer's own."
)


def format_flag(formats: Collection[str]) -> flags.FlagHolder:
    """The flag `--format` of commands that read a file of records."""
    files = [name for name in formats if name != "synthetic"]
    return flags.DEFINE_enum("format", "auto", files, "See data.format; auto goes by the columns.")


@contextmanager
def told() -> Iterator[None]:
    """What the user can mend ends the command with a sentence, and Ctrl-C without a trace."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if (message := no_room(error)) is None:
            raise
        fail(message)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


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
