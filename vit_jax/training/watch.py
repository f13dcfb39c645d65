"""Several processes that look after each other: when one fails, the others end and say which."""

import contextlib
import ctypes
import json
import os
import platform
import secrets
import select
import signal
import socket
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

import jax

from vit_jax.errors import UserError
from vit_jax.training.processes import allgather

BEAT = 1.0  # Seconds between two signs of life.
COMING = 20.0  # Seconds to connect.
VERDICT = 2.0  # Seconds in which another's end is noticed, whose consequence an error may be.
UNWINDING = 10.0  # Seconds in which a process that fails may close its files.
AGAIN = 75  # Exit status: start the same command again.
_GO_ON = "start the same command again to go on from the last checkpoint"


class Watch:
    """A context in which several processes of a run end together; with one process it does nothing.

    Each process keeps a connection to process 0 and gives a sign of life every second. One that
    is killed is noticed at once, as the system closes its connection; one that is stopped, or
    whose machine is gone, after `patience` seconds. All others then say so in one line and end
    with status 75. The main thread can't: it waits for the lost one within JAX. An error that
    leaves the context in one process alone ends all of them in the same way, with its message and
    status 2, or 1 with a traceback if it is no UserError; so the context is left without an error
    or not at all.

    All processes have to enter it together, after `connect`.

    Args:
      patience: seconds, counted only while this process itself runs.
    """

    def __init__(self, patience: float):
        self._patience = patience
        self._me = jax.process_index()
        self._peers: dict[int, socket.socket] = {}
        self._unread: dict[int, bytes] = {}
        self._own: tuple[int, str] | None = None  # Status and message of this process's own end.
        self._left = False
        self._said = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watch":
        if jax.process_count() == 1:
            return self
        self._names = [
            f"process {i} on {host}" for i, host in enumerate(allgather(platform.node()))
        ]
        all_there = self._receive() if self._me == 0 else self._report()
        if not all(allgather(all_there)):
            _say("the processes can't watch each other: not all can connect to process 0")
            return self
        # JAX aborts the others within milliseconds when process 0 has gone. This holds it up (the
        # handler is called with the signal's number: six seconds) until the watch has said why.
        libc = ctypes.CDLL(None)
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is not None:
            self.fail(kind, error, trace)
            self._own = self._own or (0, "")
            self._left = True
            self._thread.join()

    def fail(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Notes an error that is on its way out, past whatever is closed before the context ends;
        for `contextlib.ExitStack.push`."""
        if error is None or self._own is not None:
            return
        if isinstance(error, UserError):
            self._own = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            self._own = 130, "interrupted"
        else:
            self._own = 1, "".join(traceback.format_exception(error)).strip()

    def _receive(self) -> bool:
        """Process 0: takes the others' connections. Whether all have come."""
        with socket.create_server(("", 0)) as server:
            token = secrets.token_hex(8)
            allgather([server.getsockname()[1], token])
            deadline = time.monotonic() + COMING
            while len(self._peers) < jax.process_count() - 1 and time.monotonic() < deadline:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                with contextlib.suppress(OSError, ValueError):  # Late, or not one of ours.
                    peer = server.accept()[0]
                    peer.settimeout(5)
                    word, number = peer.makefile().readline().split()
                    if word == token:
                        self._peers[int(number)] = peer
        return len(self._peers) == jax.process_count() - 1

    def _report(self) -> bool:
        """The other processes: connect to process 0. Whether it can be done."""
        from jax._src.distributed import global_state  # Nothing public tells where process 0 is.

        port, token = allgather(None)[0]
        host = str(global_state.coordinator_address).rpartition(":")[0].strip("[]")
        try:
            self._peers[0] = socket.create_connection((host, port), timeout=COMING)
            self._peers[0].sendall(f"{token} {self._me}\n".encode())
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        """The thread: until all have ended well, or one has not."""
        silent = dict.fromkeys(self._peers, 0.0)
        failing, before = 0.0, time.monotonic()
        while self._peers:
            if self._own == (0, ""):
                self._tell(self._own)
                return
            for peer in select.select([*self._peers.values()], [], [], BEAT / 4)[0]:
                (i,) = (i for i, p in self._peers.items() if p is peer)
                silent[i] = 0.0
                if (end := self._read(i)) is not None:
                    status, message = end
                    if status:
                        self._end(status, message)
                    del self._peers[i]
            # A process that was stopped itself must not take that for the others' silence.
            now = time.monotonic()
            passed, before = min(now - before, BEAT), now
            for i in self._peers:
                silent[i] += passed
                if silent[i] > self._patience:
                    reason = f"has given no sign of life for {self._patience:g} s"
                    self._end(AGAIN, f"{self._names[i]} {reason}: {_GO_ON}")
            failing += passed if self._own else 0.0
            if self._own and failing > (VERDICT if self._left else UNWINDING):
                self._end(*self._own, own=True)
            if now > self._said + BEAT:
                self._tell(None)

    def _read(self, i: int) -> tuple[int, str] | None:
        """How a peer has ended, if it has."""
        try:
            data = self._peers[i].recv(2**16)
        except OSError:
            data = b""
        if not data:
            return AGAIN, f"{self._names[i]} has gone without a word: {_GO_ON}"
        *lines, self._unread[i] = (self._unread.get(i, b"") + data).split(b"\n")
        ends = [tuple(end) for end in map(json.loads, lines) if end is not None]
        return ends[0] if ends else None

    def _tell(self, end: tuple[int, str] | None) -> None:
        """Sends a sign of life, None, or how this process ends."""
        self._said = time.monotonic()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # It has gone: reading tells.
                peer.sendall(json.dumps(end).encode() + b"\n")

    def _end(self, status: int, message: str, own: bool = False) -> NoReturn:
        """Ends this process, and the others with it."""
        short = f"{self._names[self._me]}: {message.splitlines()[-1]}" if own else message
        self._tell((status, short))
        if self._me == 0:  # The last to go, for JAX's sake.
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    peer.settimeout(5)
                    while peer.recv(2**16):
                        pass
        if self._own and self._own[0] == status:  # All make the same mistake.
            message = self._own[1]
        _say(message)
        os._exit(status)


def _say(message: str) -> None:
    """Prints past whatever the main thread may be printing."""
    restored = "\n\x1b[?25h" if sys.stderr.isatty() else ""  # The cursor.
    os.write(2, f"{restored}vit-jax: {message}\n".encode())
