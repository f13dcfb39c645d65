"""Several processes that train together: how they find each other, agree, and stop as one."""

import contextlib
import functools
import json
import os
import platform
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.sharding import batch_sharding, make_global_batch, replicated
from vit_jax.training import clusters
from vit_jax.training.signals import StopRequest

PATIENCE = 300.0  # Seconds until a process that has not come is missed.
LIFE = 600  # Seconds of silence after which JAX aborts all; before that the `Watch` ends them.


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a run, before JAX looks at any device.

    Args:
      coordinator: "host:port" of process 0, on which it listens; None to find the others as Slurm
        and TPU slices tell, if there are any.
      processes: their number. process: the number of this one, from 0.

    Raises UserError if the options make no sense, or not all come within PATIENCE seconds.
    """
    if [coordinator, processes, process] == [None] * 3:
        place = clusters.find()
        if place is None:
            return
        coordinator, processes, process = place
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "--coordinator, --num-processes and --process-id belong together: give all three"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}, expected HOST:PORT of process 0")
    if not 0 <= process < processes:
        raise UserError(
            f"--process-id is {process} of --num-processes {processes}, expected 0 to "
            f"{processes - 1}"
        )
    if processes > 1:
        # JAX ends the process without a word on who is missing.
        meet = _receive if process == 0 else _report
        meet((host, int(port)), processes, process)
        # Gloo prints on standard output, which is for the result: that goes to standard error.
        sys.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        jax.distributed.initialize(
            *(coordinator, processes, process),
            heartbeat_timeout_seconds=LIFE,
            shutdown_timeout_seconds=30,
        )


def _receive(address: tuple[str, int], processes: int, process: int) -> None:
    """Process 0: waits until all others have reported, then answers "" or what is wrong."""
    deadline = time.monotonic() + PATIENCE
    problem = ""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", address[1])))
        except OSError as e:
            raise UserError(
                f"process 0 can't listen on port {address[1]} ({e.strerror}): choose another port "
                "in --coordinator"
            ) from e
        come: dict[int, socket.socket] = {}
        while len(come) < processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                number, count = map(int, connection.makefile().readline().split())
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # It connected and said nothing.
                missing = [str(i) for i in range(1, processes) if i not in come]
                problem = (
                    f"of {processes} processes {', '.join(missing)} did not come within "
                    f"{PATIENCE:.0f} s: look why on their hosts, then start all again"
                )
            except (OSError, ValueError):
                continue  # Not one of ours.
            else:
                if count != processes or number in come:
                    problem = (
                        f"process {number} of {count} came to process 0 of {processes}"
                        f"{' twice' if number in come else ''}: give every process the same "
                        "--num-processes and its own --process-id"
                    )
                come[-1 if problem else number] = connection
        for connection in come.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem}\n".encode())
    if problem:
        raise UserError(problem)


def _report(address: tuple[str, int], processes: int, process: int) -> None:
    """The other processes: report to process 0, which may start later, and hear its answer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(f"{process} {processes}\n".encode())
                connection.settimeout(max(deadline - time.monotonic() + 5, 5))
                answer = connection.makefile().readline()
        except OSError:
            answer = ""
        if answer == "\n":
            return
        if answer:
            raise UserError(answer.strip())
        if time.monotonic() > deadline:
            raise UserError(
                f"process 0 did not answer at {address[0]}:{address[1]} within {PATIENCE:.0f} s: "
                "look whether it runs there and the port is open, then start all again"
            )
        time.sleep(0.2)


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def allgather(value: Any) -> list[Any]:
    """What each process has, in their order; JSON values. All have to call it together."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = process_allgather(np.array([text.size], np.int32)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def broadcast_from_main(value: Any) -> Any:
    """What the main process has, in all of them. All have to call it together."""
    return allgather(value)[0]


def share_of_cores() -> int:
    """The cores for this process alone, if those of a machine are shared out among the processes
    that were given them. All have to call it together."""
    given = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    everyone = allgather([platform.node(), given])
    users = Counter(core for host, cores in everyone if host == platform.node() for core in cores)
    share = sum(1 / users[core] for core in given) / len(given)
    return max(int(data.own_cores() * share + 1e-6), 1)


@contextlib.contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """A block without communication that all processes get through, or none: a UserError of one is
    raised by all."""
    error = None
    try:
        yield
    except UserError as e:
        error = e
    problems = allgather(None if error is None else str(error))
    if error is not None:
        raise error
    for i, problem in enumerate(problems):
        if problem is not None:
            raise UserError(f"process {i}: {problem}")


def assert_equal_across_processes(values: Mapping[str, Any]) -> None:
    """Raises UserError, in all processes, naming what differs between two of them and where."""
    everyone = allgather([platform.node(), {k: repr(v) for k, v in values.items()}])
    host, first = everyone[0]
    for i, (other_host, other) in enumerate(everyone):
        for key in first | other:
            if first.get(key) != other.get(key):
                raise UserError(
                    f"process {i} on {other_host} has {key} {other.get(key)}, process 0 on {host} "
                    f"has {first.get(key)}: start all processes with the same command, code and "
                    "data, and a workdir that all of them share"
                )


class SharedStop:
    """A `StopRequest` of any process, noticed by all of them at the same call."""

    def __init__(self, own: StopRequest, mesh: Mesh):
        self._own = own
        self._alone = jax.process_count() == 1
        place, count = batch_sharding(mesh), jax.local_device_count()
        self._on_devices = functools.cache(
            lambda n: make_global_batch(np.full(count, n, np.int32), place)
        )
        self._highest = jax.jit(lambda x: x.max(), out_shardings=replicated(mesh))
        self._waiting: list[jax.Array] = []
        self.signal_name: str | None = None

    def check(self, *, wait: bool = False) -> bool:
        """Whether to stop. All processes have to call it alike.

        With several processes it says what was the case two calls ago, so that the device is not
        waited for; with `wait` what is the case now.
        """
        if self._alone:
            self.signal_name = self._own.signal_name
        if self._alone or self.signal_name is not None:
            return self.signal_name is not None
        name = self._own.signal_name
        number = 0 if name is None else int(signal.Signals[name])
        self._waiting.append(self._highest(self._on_devices(number)))
        while len(self._waiting) > (0 if wait else 2):
            if number := int(jax.device_get(self._waiting.pop(0))):
                self.signal_name = signal.Signals(number).name
        return self.signal_name is not None
