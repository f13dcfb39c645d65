"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(ValueError):
    """Bad input. Its message is one line: what was found, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2. Messages quote file
    names, keys and other people's errors, so line breaks and control characters are escaped here.
    """

    def __init__(self, message: str) -> None:
        escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(escaped))
