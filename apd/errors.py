"""Errors that the user can act on."""


class InputError(ValueError):
    """A file or option that cannot be used as it is; the message names it and says what is wrong."""


class DataWarning(UserWarning):
    """Something in a data set that was left out or looks wrong; the message names it."""
