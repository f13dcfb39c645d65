"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(ValueError):
    """Bad input. Its message is one line: what was found, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2.
    """
