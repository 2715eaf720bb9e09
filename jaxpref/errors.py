"""How a command ends: errors that a user can act on, and Ctrl-C."""

# The exit status of a command that was interrupted.
INTERRUPTED = 130


class UserError(Exception):
    """Something the user gave cannot be used, or a run cannot go on.

    The message says what was expected, what came, where, and what to do. The commands
    print it without a traceback.
    """
