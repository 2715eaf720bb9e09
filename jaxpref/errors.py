"""Errors that a user can act on."""


class UserError(Exception):
    """Something the user gave cannot be used, or a run cannot go on.

    The message says what was expected, what came, where, and what to do. The commands
    print it without a traceback.
    """
