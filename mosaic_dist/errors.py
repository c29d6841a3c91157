"""The one exception that users are meant to see."""


class UserError(ValueError):
    """A mistake of the user or of the input: shown as one message, without a traceback.

    The message names the value, the limit it broke, and the way to mend it.
    """

    exit_code = 2
    """Of the process that ends with it."""
