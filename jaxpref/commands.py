"""What the commands share."""

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
    # Orbax tells every step of every save at the level of information.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
