"""Several processes that train together, on JAX's own distributed runtime.

JAX finds the processes, watches them by heartbeats, and aborts all when one is lost. Here is what a
run adds: its options, one line for each thing that goes wrong, and a stop at the same step.
"""

import contextlib
import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax import data
from vit_jax.errors import UserError, error_chain, first_line
from vit_jax.signals import EXIT_AGAIN, EXIT_INTERRUPTED, StopSignal
from vit_jax.training.last_words import HOSTS

INITIALIZATION_S = 300  # Until a process that has not come is given up.
SHUTDOWN_S = 30  # That a process waits at its end for the others.
GRACE_S = 10  # In which a process ends that fails while the others may go on.


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_s: float = 60.0,
) -> None:
    """Joins the processes of a run, before JAX looks at any device; a single one stays alone.

    Args:
      coordinator: "host:port" of process 0, on which it listens. With None for all three, JAX finds
        the others of a TPU slice, of Slurm's or Open MPI's tasks (`jax.distributed.initialize`).
      num_processes, process_id: their number, and the number of this one, from 0.
      heartbeat_timeout_s: silence after which JAX gives a process up, and aborts all others.

    Raises UserError if the options make no sense. If not all come within INITIALIZATION_S, JAX
    aborts this process.
    """
    if (coordinator, num_processes, process_id) == (None, None, None):
        # JAX would give the only task of Slurm or Open MPI one of its GPUs.
        if "1" in map(os.environ.get, ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
            return
    elif coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "--coordinator, --num-processes and --process-id belong together: give all three"
        )
    else:
        _check(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        _explain_aborts(process_id, num_processes)
    with warnings.catch_warnings():
        # On Kubernetes JAX asks for a package, also of those who give the options.
        warnings.simplefilter("ignore")
        try:
            jax.distributed.initialize(
                *(coordinator, num_processes, process_id),
                initialization_timeout=INITIALIZATION_S,
                heartbeat_timeout_seconds=max(math.ceil(heartbeat_timeout_s), 1),
                shutdown_timeout_seconds=SHUTDOWN_S,
            )
        except Exception as e:
            # There is no cluster, or a notebook's TPU without a metadata server to ask for it, or
            # this Python has computed before, alone; or a pod of Kubernetes is none of a job's, of
            # which JAX makes errors of many kinds.
            none = isinstance(e, OSError) or re.search("should be defined|before any JAX", str(e))
            pod = "KUBERNETES_SERVICE_HOST" in os.environ
            if coordinator is None and (none or (pod and "JOB_COMPLETION_INDEX" not in os.environ)):
                return
            raise UserError(
                f"JAX can't find the other processes ({first_line(e)}): give --coordinator, "
                "--num-processes and --process-id; if there are none, --num-processes=1 "
                "--process-id=0 --coordinator=localhost:1"
            ) from e
    if num_processes not in (None, jax.process_count()):
        raise UserError(
            f"process {process_id} of {num_processes} came to {jax.process_count()} processes: "
            "give every process the same --num-processes and its own --process-id"
        )
    if jax.process_count() > 1:
        if coordinator is None:
            _explain_aborts(jax.process_index(), jax.process_count())
        os.write(2, f"{HOSTS}{json.dumps(allgather(platform.node()))}\n".encode())


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}, expected HOST:PORT of process 0")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id is {process_id} of --num-processes {num_processes}, expected 0 to "
            f"{num_processes - 1}"
        )
    if process_id == 0 and num_processes > 1:
        try:  # JAX would end by a segmentation fault.
            socket.create_server(("", int(port))).close()
        except OSError as e:
            raise UserError(
                f"process 0 can't listen on port {port} ({e.strerror}): choose another port in "
                "--coordinator"
            ) from e


def _explain_aborts(process_id: int, num_processes: int) -> None:
    """Has JAX's C++ code tell in one line why it aborts this process; see `last_words`.

    Python keeps its standard output, which is for the result (Gloo prints there), and error.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        encoding = getattr(sys, name).encoding
        stream = os.fdopen(os.dup(number), "w", 1, encoding, errors="backslashreplace")
        setattr(sys, name, stream)
    program = Path(__file__).with_name("last_words.py")
    numbers = (process_id, num_processes, INITIALIZATION_S)
    child = subprocess.Popen(
        [sys.executable, "-I", str(program), *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=2,
        start_new_session=True,  # Ctrl-C and a launcher's kill are not for it: it ends by itself.
    )
    assert child.stdin is not None
    for number in (1, 2):
        os.dup2(child.stdin.fileno(), number)
    child.stdin.close()


@contextlib.contextmanager
def exit_with_others(heartbeat_timeout_s: float) -> Iterator[None]:
    """A block that the processes of a run leave together, or else end one by one.

    An error is told, and becomes the SystemExit with its status (2 for a UserError). If this
    process has not ended GRACE_S later, because what is closed on the way, or JAX at the end, waits
    for others that go on, it ends nevertheless; JAX then aborts the others. If the error is the
    loss of another process, JAX is waited for, which knows which one. A single process sees nothing
    of all this.
    """
    try:
        yield
    except BaseException as error:
        alone = not jax.distributed.is_initialized() or jax.process_count() == 1
        if alone or isinstance(error, SystemExit):
            raise
        status, text = 1, "".join(traceback.format_exception(error)).strip()
        if lost := _lost_connection(error):
            wait = max(math.ceil(heartbeat_timeout_s), 1) + GRACE_S
            print(
                f"vit-jax: the connection to another process is lost ({lost}): waiting up to "
                f"{wait} s for JAX to say which",
                file=sys.stderr,
            )
            time.sleep(wait)
            status, text = EXIT_AGAIN, "vit-jax: JAX does not say: start the same command again"
        elif isinstance(error, UserError):
            status, text = 2, f"vit-jax: {error}"
        elif isinstance(error, KeyboardInterrupt):
            status, text = EXIT_INTERRUPTED, "vit-jax: interrupted"
        print(text, file=sys.stderr, flush=True)
        end = threading.Timer(GRACE_S, os._exit, [status])
        end.daemon = True
        end.start()
        raise SystemExit(status) from None


def _lost_connection(error: BaseException) -> str:
    """The first line about a communication that failed, of an error or those it comes from."""
    for cause in error_chain(error):
        if re.search(r"gloo|nccl|coordination service", str(cause), re.IGNORECASE):
            return first_line(cause)
    return ""


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def allgather(value: Any) -> list[Any]:
    """What each process has, in their order; JSON values. All have to call it together."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32)).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def broadcast_from_main(value: Any) -> Any:
    """The main process's value, a JSON value, in all. All have to call it together."""
    return allgather(value if is_main_process() else None)[0]


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
    """A block without communication that all processes get through, or none: an error of one is
    raised by all, by the others as a UserError."""
    error = None
    try:
        yield
    except Exception as e:  # Whatever it is, the others must not wait for ever.
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
    """A `StopSignal` of any process, noticed by all of them at the same call of `check`."""

    def __init__(self, own: StopSignal):
        self._own, self._calls = own, 0
        self.signal_name: str | None = None

    def check(self) -> bool:
        """Whether to stop. All processes have to call it alike: JAX counts the calls, and chooses
        the next one that none of them has made."""
        if self.signal_name is None:
            if jax.process_count() == 1:
                self.signal_name = self._own.signal_name
            elif multihost_utils.reached_preemption_sync_point(self._calls):
                names = allgather(self._own.signal_name)
                self.signal_name = next(filter(None, names), "SIGTERM")
            self._calls += 1
        return self.signal_name is not None
