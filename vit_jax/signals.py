"""SIGTERM and Ctrl-C, answered at once, also while Python waits for a library or imports one."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any, Self

EXIT_AGAIN = 75  # Exit status: the run was stopped and is saved, start the same command again.
EXIT_INTERRUPTED = 130
PATIENCE_S = 3.0  # In which a program clears up that is to end.
_SHOW_CURSOR = "\x1b[?25h"  # A progress bar may have hidden it.


def tell(text: str) -> None:
    """Prints a line to standard error, if there still is one."""
    with contextlib.suppress(OSError, ValueError):
        print(text + _SHOW_CURSOR * sys.stderr.isatty(), file=sys.stderr, flush=True)


class Answered(contextlib.AbstractContextManager):
    """A block in which a signal is answered by `now` at once, in another thread, and by `then` when
    the main thread comes to it: not before a library returns to Python.

    This one is for a whole program: Ctrl-C interrupts, and ends it if that takes too long. Blocks
    may stand in each other; the inner one answers. Outside the main thread, where Python allows no
    handlers, signals are left alone.
    """

    numbers: tuple[int, ...] = (signal.SIGINT,)
    _innermost: "Answered | None" = None

    def now(self, number: int) -> None:
        """Is called in another thread."""
        self._end_if_it_takes_long()

    def then(self, number: int, frame: FrameType | None) -> Any:
        """Is called in the main thread."""
        raise KeyboardInterrupt

    def _end_if_it_takes_long(self) -> None:
        if self._outer:
            self._outer._end_if_it_takes_long()
        elif not self._over.wait(PATIENCE_S):
            tell("vit-jax: interrupted")
            os._exit(EXIT_INTERRUPTED)

    def __enter__(self) -> Self:
        self._outer, self._over = Answered._innermost, threading.Event()
        self._close = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            Answered._innermost = self
            self._close.callback(setattr, Answered, "_innermost", self._outer)
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            threading.Thread(target=self._listen, args=(ours,), daemon=True).start()
            self._close.enter_context(theirs)  # Which ends the thread.
            before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            self._close.callback(signal.set_wakeup_fd, before)
            for number in self.numbers:
                handler = signal.signal(number, self.then)
                self._close.callback(signal.signal, number, handler or signal.SIG_DFL)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._close.close()

    def _listen(self, signals: socket.socket) -> None:
        with signals:
            while number := signals.recv(1):
                if number[0] in self.numbers:
                    with contextlib.suppress(Exception):  # The next signal is answered, too.
                        self.now(number[0])


class NothingToSave(Answered):
    """A block in which a program that trains is ended by SIGTERM and Ctrl-C at once, because there
    is nothing to save, but where a `StopSignal` stands in it."""

    numbers = (signal.SIGINT, signal.SIGTERM)

    def now(self, number: int) -> None:
        name = signal.Signals(number).name
        tell(f"vit-jax: stopped by {name}, nothing to save: start the same command again")
        os._exit(EXIT_AGAIN)

    def then(self, number: int, frame: FrameType | None) -> None:
        """The other thread is about to end it."""


class StopSignal(Answered):
    """A block in which SIGTERM and Ctrl-C are noted in `signal_name`, and a line says so at once.
    A second Ctrl-C interrupts; a command it ends.

    Args:
      alone: whether this is a run's only process. Of several, JAX notes SIGTERM, from `initialize`
        on, and tells the others: see `distributed.SharedStop`.

    Attributes:
      say: prints that line.
    """

    def __init__(self, alone: bool = True) -> None:
        self.signal_name: str | None = None
        self.say = tell
        self._alone, self._told = alone, ""
        self.numbers = (signal.SIGINT, *[signal.SIGTERM] * alone)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def now(self, number: int) -> None:
        again, self._told = self._told, signal.Signals(number).name
        if not again:
            self.say(
                f"{self._told}: stopping; what is under way is finished and saved first (a second "
                "Ctrl-C ends at once, without that)"
            )
        elif again == self._told == "SIGINT" and self._outer:
            self._end_if_it_takes_long()

    def then(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)  # For JAX.
