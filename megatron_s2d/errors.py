"""The one exception type that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback (``--debug`` shows one) and exits with a non-zero code.
    """
