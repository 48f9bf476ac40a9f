"""The exception for mistakes that the user can correct."""


class UserError(Exception):
    """A mistake that the user can correct; the message is one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback (``--debug`` prints one) and exits with code 1.
    """
