"""Ending a run cleanly when it is asked to."""

import signal
import threading
from types import FrameType


class StopRequest:
    """A context in which SIGTERM and Ctrl-C don't kill, but are noted in `signal_name`.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python allows no handlers,
    signals are left alone.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            # None is not Python's: that of jax.distributed, which only notes the signal.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
