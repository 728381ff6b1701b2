"""Errors that the user can act on, and how they are shown. Imports nothing, so that a signal may come at any moment."""


class InputError(ValueError):
    """A file or option that cannot be used as it is; the message names it and says what is wrong."""


class DataWarning(UserWarning):
    """Something in a data set that was left out or looks wrong; the message names it."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        signum: of the signal.
        message: what was reached, and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def printable(text: str) -> str:
    """Text for a terminal, which a file's name must not control: what is no sign of its own is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
