"""Who fills batches: threads of this process, or processes of their own, and in what memory.

The processes are started as programs, so that nothing of this one has to be fit to be forked or
run again, and import OpenCV and NumPy only. Each is given its tasks, a few rows of a batch, by a
thread of this one, and writes the images into the rows themselves, in memory that all of them
share. It ends when its connection does, however the process that started it ended.
"""

import contextlib
import copy
import io
import logging
import math
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np

from vit_jax.data.source import Source
from vit_jax.errors import UserError

AUTOMATIC = -1
THREADS_INSTEAD = "--config.workers=0 reads it by threads"
_AGAIN = (
    "start the same command again to go on, perhaps with fewer --config.workers, or 0 for threads"
)
LEAST_FOR_PROCESSES = 4096  # Images of an evaluation: fewer are read while processes would start.
_CORES_FOR_THREADS = 2  # Of so few cores, threads leave none idle, and start at once.
_MOST_THREADS = 16  # More would only take turns for the interpreter's lock.
_MOST_COPIED = 2 << 30  # Bytes of images in memory that are copied unasked.
_QUOTA = "/sys/fs/cgroup/cpu.max"  # Of a container.

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Skipped = list[tuple[int, str]]  # Index of an unreadable image, and what is wrong with it.


Reader = Any  # A `batches.Reader`.


@dataclass(frozen=True)
class Readers:
    """Who reads: so many processes or, if that is 0, threads; and why, if it isn't the rule.

    Processes that nobody asked for (`automatic`) are replaced by threads if they can't start.
    """

    workers: int
    threads: int
    reason: str = ""
    automatic: bool = False

    def __str__(self) -> str:
        if self.workers:
            text = f"{self.workers} worker process{'' if self.workers == 1 else 'es'}"
        else:
            text = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        return text + (f" ({self.reason})" if self.reason else "")


def own_cores() -> int:
    """The cores that this process was given: a container or a job may have fewer than there are."""
    given = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if given else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open(_QUOTA) as file:
        quota, period = file.read().split()  # "max 100000" where there is no limit.
        cores = min(cores, max(round(int(quota) / int(period)), 1))
    return cores


def choose_readers(
    source: Source, workers: int = AUTOMATIC, threads: int = 0, cores: int | None = None
) -> Readers:
    """Who is to read a source: a process a core where there are more than two, else threads.

    Args:
      workers: their number; 0 for threads; -1 to choose.
      threads: their number; then they aren't replaced by processes unasked. 0 for one a core.
      cores: that there are, by default as many as this process was given.

    Raises UserError for wrong numbers, or processes that can't be had.
    """
    if workers < AUTOMATIC or threads < 0:
        raise UserError(
            f"workers is {workers} and threads is {threads}, expected -1 or more and 0 or more"
        )
    cores = cores or own_cores()
    number = threads or min(cores, _MOST_THREADS)
    if workers == 0 or (workers == AUTOMATIC and (threads or cores <= _CORES_FOR_THREADS)):
        return Readers(0, number)
    try:
        if os.name != "posix" or not sys.executable:
            raise UserError("reading by processes needs Linux or macOS, and Python as a program")
        small = replace(source, keys=source.keys[:1], label_ids=None, identity=str)
        data, buffers = _pickled(source.name, small)
    except UserError as error:
        if workers != AUTOMATIC:
            raise UserError(f"{error}; {THREADS_INSTEAD}") from None
        return Readers(0, number, str(error))
    if workers != AUTOMATIC:
        return Readers(workers, number)
    copied = len(data) + sum(buffer.raw().nbytes for buffer in buffers)
    if copied > _MOST_COPIED:
        told = f"{copied / 2**30:.1f} GB of images in memory aren't copied for processes unasked"
        return Readers(0, number, told)
    return Readers(cores, number, automatic=True)


# The memory of batches.

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]  # Shape and dtype of a batch's arrays.
_ALIGNED = 64  # Bytes: what lies so, JAX on a CPU can use in place.


def _bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _buffer_size(layout: Layout) -> int:
    """Bytes of a buffer, whole pages."""
    used = sum(-(-_bytes_of(*array) // _ALIGNED) * _ALIGNED for array in layout.values())
    return -(-used // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _arrays_in(memory: np.ndarray, layout: Layout) -> Batch:
    """The arrays in a buffer, uint8 (size,)."""
    batch, start = {}, 0
    for name, (shape, dtype) in layout.items():
        size = _bytes_of(shape, dtype)
        batch[name] = memory[start : start + size].view(dtype).reshape(shape)
        start += -(-size // _ALIGNED) * _ALIGNED
    return batch


class BatchBuffers:
    """As many buffers as are in use at a time, each used again when nothing refers to it any more.

    All that was made of a batch's arrays without a copy keeps them alive, and so the buffer: views,
    and the arrays of JAX on a CPU, which take aligned memory as it is. There is always another
    buffer, so that nobody waits for the garbage collector.

    Args:
      layout: what each holds.
      file: of `anonymous_file`, where other processes find the buffers one after the other; None
        for memory of this process.
    """

    def __init__(self, layout: Layout, file: int | None = None):
        self._layout = layout
        self._file = file
        self._maps: list[mmap.mmap] = []
        self._free: deque[int] = deque()

    def take(self) -> tuple[int, Batch]:
        """The number of a buffer that is free, and its arrays; what they hold is left over."""
        try:
            number = self._free.pop()
        except IndexError:
            number, size = len(self._maps), _buffer_size(self._layout)
            if self._file is None:
                self._maps.append(mmap.mmap(-1, size))
            else:
                os.ftruncate(self._file, (number + 1) * size)
                self._maps.append(mmap.mmap(self._file, size, offset=number * size))
        # Every view has this one as its base: NumPy passes over those between.
        memory = np.frombuffer(self._maps[number], np.uint8)
        weakref.finalize(memory, self._free.append, number).atexit = False
        return number, _arrays_in(memory, self._layout)


def anonymous_file() -> int:
    """A descriptor of memory without a name: nothing of it is left when all that have it are gone,
    however they end, and a container's small /dev/shm is no limit."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vit_jax.data", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# Those who fill it.


class Threads:
    """Threads of this process that fill batches."""

    def __init__(self, reader: Reader, count: int):
        self._reader = reader
        self._pool = futures.ThreadPoolExecutor(count, "vit_jax.data")
        self._tasks: dict[int, list[futures.Future[Skipped]]] = {}

    def fill(self, number: int, batch: Batch, rows: range, position: int) -> Skipped:
        """Fills rows of the batch in buffer `number`, see `batches.Reader.fill`."""
        del number
        return self._reader.fill(batch, rows, position)

    def submit(self, number: int, batch: Batch, parts: Sequence[range], position: int) -> None:
        """Has parts of a batch filled."""
        self._tasks[number] = [
            self._pool.submit(self.fill, number, batch, rows, position) for rows in parts
        ]

    def wait(self, number: int) -> Skipped:
        """Waits until all parts of a batch are filled; raises what filling them raised."""
        tasks = self._tasks.pop(number)
        futures.wait(tasks, return_when=futures.FIRST_EXCEPTION)  # Wakes up once.
        return [skipped for task in tasks for skipped in task.result()]

    def close(self) -> None:
        """Lets the threads end, after what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Processes(Threads):
    """Processes that fill batches in memory which they share with this one, a thread for each.

    Raises UserError if the reader can't be given to other processes, which shows when the first
    of them has started, and OSError if there can't be so many processes or files.
    """

    def __init__(self, reader: Reader, layout: Layout, memory: int, count: int):
        super().__init__(reader, count)
        self._processes: dict[Connection, subprocess.Popen] = {}
        self._started = False
        # Processes that have started and nothing to do; or why there is one less.
        self._idle: queue.SimpleQueue[Connection | UserError] = queue.SimpleQueue()
        # What is set for this process's sake, e.g. its sys.path, holds for them too.
        code = "import sys; sys.path[:] = {!r}; from vit_jax.data import workers; workers.main({})"
        # The accelerator is this process's. Of their own threads none does anything; memory that is
        # freed is wanted again at once.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "-1",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**28),
        }
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            job, start = _pack(reader, layout)
            with os.fdopen(job):
                for _ in range(count):
                    connection, theirs = Pipe()
                    files = (theirs.fileno(), memory, job)
                    arguments = ", ".join(map(str, (*files, start)))
                    program = code.format(list(map(str, sys.path)), arguments)
                    with theirs, _signals_blocked():
                        self._processes[connection] = subprocess.Popen(
                            [sys.executable, "-c", program],
                            stdin=subprocess.DEVNULL,
                            stdout=2,  # Ours may be for a result.
                            env=environment,
                            pass_fds=files,
                        )
            greetings = [self._pool.submit(self._greet, one) for one in self._processes]
            for one in futures.wait(greetings, return_when=futures.FIRST_COMPLETED).done:
                one.result()
            self._started = True
            on_error.pop_all()

    def _greet(self, connection: Connection) -> None:
        """Waits until a process has started and has its reader."""
        try:
            problem = connection.recv()
        except (EOFError, OSError):
            problem = _death(self._processes[connection].wait())
            if self._started:  # Others could, so it isn't the source's fault.
                self._idle.put(UserError(f"{problem}: {_AGAIN}"))
                return
        if problem:
            raise not_given(self._reader.source.name, problem)
        self._idle.put(connection)

    def fill(self, number: int, batch: Batch, rows: range, position: int) -> Skipped:
        """As `Threads.fill`; a UserError also if the process was killed."""
        connection = self._idle.get()
        if isinstance(connection, UserError):
            self._idle.put(connection)  # For the other threads.
            raise connection
        try:
            connection.send((number, rows.start, rows.stop, position))
            skipped, error, unexpected = connection.recv()
        except (EOFError, OSError):
            lost = UserError(f"{_death(self._processes[connection].wait())}: {_AGAIN}")
            self._idle.put(lost)
            raise lost from None
        self._idle.put(connection)
        if error is not None:
            raise UserError(error)
        if unexpected is not None:
            raise RuntimeError(f"in a process that reads images:\n{unexpected}")
        return skipped

    def close(self) -> None:
        """Ends the processes at once, for they have nothing to lose, and so the threads."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        with contextlib.suppress(RuntimeError):  # One of the threads itself collects garbage.
            self._pool.shutdown(cancel_futures=True)
        for connection in self._processes:
            connection.close()


def _death(status: int) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else ""
    hint = ", as the system does where memory runs out" if status == -signal.SIGKILL else ""
    return f"a process that reads images {how or f'ended with status {status}'}{hint}"


def not_given(name: str, reason: object) -> UserError:
    """That processes can't read the source of this name."""
    return UserError(f"{name} can't be given to other processes: {reason}")


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started in this block never sees Ctrl-C, SIGTERM or the like.

    A terminal or a cluster sends them to all processes of a run, but only the first knows what to
    save before it ends the others. Processes inherit what is blocked.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.Signals[name] for name in names})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_readers(
    reader: Reader, rows: int, layout: Layout, readers: Readers, running: contextlib.ExitStack
) -> tuple[BatchBuffers, Threads | Processes, int]:
    """The memory of batches, those who fill it, and how many they are.

    Raises UserError if processes were asked for that can't be had.
    """
    if readers.workers:
        try:
            memory = anonymous_file()
            running.callback(os.close, memory)
            processes = Processes(reader, layout, memory, min(readers.workers, rows))
            return BatchBuffers(layout, memory), processes, readers.workers
        except (UserError, OSError) as error:
            told = error if isinstance(error, UserError) else not_given(reader.source.name, error)
            if not readers.automatic:
                raise UserError(f"{told}; {THREADS_INSTEAD}") from None
            _log.warning("Read by threads: %s", told)
    return BatchBuffers(layout), Threads(reader, readers.threads), readers.threads


# From one process to others.


class _Texts(Sequence[str]):
    """Texts in two arrays, of which all processes have the same memory."""

    def __init__(self, texts: Sequence[str]):
        encoded = [str(text).encode("utf-8", "surrogateescape") for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):  # Which also ends an iteration.
            raise IndexError(f"{index} of {len(self)} texts")
        begin, end = self._ends[index : index + 2]
        return self._bytes[begin:end].tobytes().decode("utf-8", "surrogateescape")


def _pickled(name: str, value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """The pickle of a value, functions of any kind and all, and the memory of arrays in it.

    Raises UserError, naming the source, if it can't be pickled.
    """
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, np.memmap) and obj._mmap is not None:  # type: ignore[attr-defined]
                # Mapped again, not copied.
                return np.memmap, (obj.filename, obj.dtype, "r", _place(obj), obj.shape)
            return super().reducer_override(obj)

    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    try:
        Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    except Exception as error:  # Whatever the functions of a source refer to.
        raise not_given(name, _in_short(error)) from None
    return stream.getvalue(), buffers


def _in_short(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:100]


def _place(array: np.memmap) -> int:
    """Where in its file an array begins that may be a part of another."""
    if not array.flags.c_contiguous or not array.filename or array.mode == "c":
        raise ValueError("a part of a memory-mapped file that isn't contiguous, or not as on disk")
    memory = np.frombuffer(array._mmap, np.uint8)  # type: ignore[attr-defined]
    start = array.offset - array.offset % mmap.ALLOCATIONGRANULARITY
    return start + array.ctypes.data - memory.ctypes.data


def _pack(reader: Reader, layout: Layout) -> tuple[int, int]:
    """A file with a pickle and, once for all processes, the arrays in it; and where the pickle is.

    Raises UserError if it can't be pickled.
    """
    other, keys = copy.copy(reader), reader.source.keys
    if all(isinstance(key, str) for key in keys):
        keys = _Texts(keys)
    other.source = replace(reader.source, keys=keys, identity=str)
    data, buffers = _pickled(other.source.name, (other, layout))
    spans = []
    job = anonymous_file()
    with open(job, "wb", closefd=False) as file:
        for buffer in buffers:
            file.seek(-(-file.tell() // _ALIGNED) * _ALIGNED)
            spans.append((file.tell(), buffer.raw().nbytes))
            file.write(buffer.raw())
        start = file.tell()
        file.write(pickle.dumps((data, spans)))
    return job, start


def main(answer: int, memory: int, job: int, start: int) -> None:
    """What a process does: tasks, until there are no more."""
    connection = Connection(answer)
    with contextlib.suppress(EOFError, OSError):  # The process that wants the answers is gone.
        try:
            content = memoryview(mmap.mmap(job, 0, access=mmap.ACCESS_READ))
            data, spans = pickle.loads(content[start:])
            reader, layout = pickle.loads(data, buffers=[content[a : a + n] for a, n in spans])
        except Exception as problem:
            connection.send(_in_short(problem))
            return
        connection.send("")
        size, batches = _buffer_size(layout), {}
        while True:
            number, first, stop, position = connection.recv()
            if number not in batches:
                shared = mmap.mmap(memory, size, offset=number * size)
                batches[number] = _arrays_in(np.frombuffer(shared, np.uint8), layout)
            skipped, error, unexpected = [], None, None
            try:
                skipped = reader.fill(batches[number], range(first, stop), position)
            except UserError as problem:
                error = str(problem)
            except Exception:
                unexpected = traceback.format_exc()
            connection.send((skipped, error, unexpected))
