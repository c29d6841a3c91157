"""The one exception that users are meant to see."""

from mosaic_dist.credentials import mask_urls


class UserError(ValueError):
    """A mistake of the user or of the input: shown as one message, without a traceback.

    The message names the value, the limit it broke, and the way to mend it. Credentials in URLs are masked.
    """

    exit_code = 2
    """Of the process that ends with it."""

    def __init__(self, message: str):
        super().__init__(mask_urls(message))
