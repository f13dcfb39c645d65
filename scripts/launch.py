"""Starts a training run as several processes of this machine, and looks after them.

    python scripts/launch.py -n 8 --restarts 3 -- vit-jax train --config=CONFIG --workdir=DIR

Each process gets its number, the meeting place and its part of CUDA_VISIBLE_DEVICES; where that is
not set, the GPU of its number. Standard output is theirs; what they say on standard error gets the
process's number in front. SIGTERM, Ctrl-C and a hang-up go to all. If one fails, the others have 20
seconds to end. The exit status is that of the first that failed, else 75 if the run was stopped
and saved, else 0. With --restarts all are started again after a 75 that was not asked for here, and
after a death by a signal; not after a mistake.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

INTERRUPTED = 75  # Saved: to be started again.
PATIENCE = 20.0  # Seconds for the others to end, and to say why, after one has failed.


class Group:
    """The processes of a run."""

    def __init__(self, command: list[str], count: int):
        self.command, self.count = command, count
        self.stopping = False
        self._pending: int | None = None  # A signal that came while processes were being started.
        self._processes: list[subprocess.Popen] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: self.send(number))

    def send(self, number: int) -> None:
        """Passes a signal on to all."""
        self.stopping = True
        if not self._processes:
            self._pending = number
        for process in self._processes:
            process.send_signal(number)

    def run(self) -> int:
        """Starts all and waits until the last has ended; the exit status of the whole."""
        address = f"127.0.0.1:{free_port()}"
        processes = [self._start(i, address) for i in range(self.count)]
        readers = [threading.Thread(target=repeat, args=x) for x in enumerate(processes)]
        for reader in readers:
            reader.start()
        self._processes = processes
        if self._pending is not None:
            self.send(self._pending)
        status = self._wait()
        for reader in readers:
            reader.join()
        self._processes = []
        return status

    def _start(self, i: int, address: str) -> subprocess.Popen:
        options = (f"--coordinator={address}", f"--num-processes={self.count}", f"--process-id={i}")
        # A group of its own: Ctrl-C would reach it twice, from the terminal and from here.
        return subprocess.Popen(
            [*self.command, *options],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": devices(i, self.count)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )

    def _wait(self) -> int:
        status, deadline = 0, None
        running = dict(enumerate(self._processes))
        while running:
            for i, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[i]
                code = 128 - code if code < 0 else code
                if code in (0, INTERRUPTED):
                    status = status or code
                elif deadline is None:
                    status, deadline = code, time.monotonic() + PATIENCE
                    say(f"process {i} ended with status {code}")
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if running:
            say(f"ending process {', '.join(map(str, running))} {PATIENCE:.0f} s later")
        for process in self._processes:  # Also of those that have ended: their own helpers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return status


def devices(i: int, count: int) -> str:
    """The GPUs of process i of `count`, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(i)
    names = visible.split(",")
    share = len(names) // count
    return ",".join(names[i * share : (i + 1) * share])


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def repeat(i: int, process: subprocess.Popen) -> None:
    """Repeats what a process says; if nobody listens any more, it can't go on saying it."""
    with contextlib.suppress(BrokenPipeError), process.stderr as lines:
        for line in lines:
            sys.stderr.write(f"[{i}] {line}")


def say(text: str) -> None:
    """Adds a line of the launcher's own."""
    with contextlib.suppress(BrokenPipeError):
        print(f"launch: {text}", file=sys.stderr)


def main() -> int:
    """Starts the processes, again where that helps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many")
    parser.add_argument("--restarts", type=int, default=0, help="how often at most (default 0)")
    parser.add_argument("command", nargs="+", help="after --, e.g. vit-jax train ...")
    args = parser.parse_args()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if args.processes < 1 or (visible and len(visible.split(",")) % args.processes):
        parser.error(
            f"-n is {args.processes}, with CUDA_VISIBLE_DEVICES {visible!r}: as many GPUs for each"
        )
    group = Group(args.command, args.processes)
    for restart in range(args.restarts + 1):
        status = group.run()
        # 130 and 141: somebody pressed Ctrl-C twice, or does not read on.
        again = status == INTERRUPTED or (status > 128 and status not in (130, 141))
        if not again or group.stopping or restart == args.restarts:
            break
        say(f"status {status}: starting again ({restart + 1} of {args.restarts})")
    return status


if __name__ == "__main__":
    sys.exit(main())
