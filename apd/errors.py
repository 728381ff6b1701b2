"""Errors that the user can act on."""


class InputError(ValueError):
    """A file or option that cannot be used as it is; the message names it and says what is wrong."""
