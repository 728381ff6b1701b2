"""Errors that the user can act on."""


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
