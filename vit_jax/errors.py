"""Mistakes that the person at the keyboard can mend: one exception, one line each."""

import contextlib
import errno
from collections.abc import Iterator

from vit_jax.escape import printable

# The system can't write, and it is no mistake of the program's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_LONGEST = 10_000  # Characters of a message.


class UserError(ValueError):
    """Bad input. Its message is one line: what was found, what was expected, what to do.

    The command line prints it without a traceback and exits with status 2. Messages quote file
    names, keys and other people's errors, so line breaks and control characters are escaped here,
    and the middle of a message that is too long to read is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


class AbsentError(UserError):
    """A server says that it has no such file, or not for us."""


@contextlib.contextmanager
def full_disk_explained(place: str = "a file") -> Iterator[None]:
    """Makes a UserError of the system's error that there is no room to write in `place`."""
    try:
        yield
    except OSError as e:
        if e.errno not in NO_ROOM:
            raise
        read_only = e.errno == errno.EROFS
        what = "choose another place" if read_only else "make room, then run the same command again"
        raise UserError(
            f"{e.filename or place} can't be written ({e.strerror}): {what}; what was saved before "
            "is kept"
        ) from e


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def error_chain(error: BaseException | None) -> list[BaseException]:
    """An error and those it comes from, each once: errors of several threads can go in a circle."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
