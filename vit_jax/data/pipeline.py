"""Batches: what training step t sees is a pure function of (seed, t).

Nothing here remembers a position: to resume at step t, start at step t.
"""

import contextlib
import functools
import itertools
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vit_jax.data.buffers import Buffers, Layout, anonymous_file
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reading import Batch, Reader, Skipped
from vit_jax.data.sources import Source
from vit_jax.data.workers import (
    AUTOMATIC,
    LEAST_FOR_PROCESSES,
    THREADS_INSTEAD,
    Processes,
    Readers,
    Threads,
    choose_readers,
    not_given,
)
from vit_jax.errors import UserError

_ROWS_AT_ONCE = 16  # Of a task: few enough that all readers end a batch at about the same time.

_log = logging.getLogger(__name__)


def train_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    workers: int | Readers = 0,
    prefetch: int = 2,
    corrupt: str = "error",
) -> Iterator[Batch]:
    """Yields batches without end, the first being that of step `start_step`.

    Every epoch has an order of its own and holds each image once; epochs follow each other
    without a gap, within a batch if need be. The image at row i of step t and its augmentation
    depend on (seed, t, i) and the source alone: not on `start_step`, `shard`, `threads`,
    `workers` or `prefetch`. Starting late costs nothing.

    Args:
      source: the images.
      preprocess: applied to each; its results must have one size.
      batch_size: rows of a batch, over all hosts; may exceed the number of images.
      seed: 0 to 2**32 - 1.
      start_step: counted from 0.
      shard: (host, number of hosts); host h gets the h-th contiguous part of each batch.
      threads: that read and preprocess; by default one a core, 16 at most.
      workers: processes that do it in place of threads; 0 for threads, -1 to choose, see
        `choose_readers`, whose result may stand here, too (then `threads` says nothing).
      prefetch: batches read ahead, each by all threads or processes; memory grows with it.
      corrupt: "error" stops at an unreadable image; "skip" logs it once and takes the next
        readable one of the source in its place.

    Yields:
      {"image": (rows, h, w, c) of the preprocessing's type, "label": int32 (rows,)}, rows =
      batch_size / hosts. Where an image may have several labels, "label" is float32 (rows,
      classes) of 0 and 1. The arrays are yours for as long as you refer to them, to a view of
      them, or to a JAX array that shares their memory; then the memory is filled anew.

    Raises:
      UserError: wrong arguments, an unreadable image (see `corrupt`), images of several sizes,
        or a worker process that was killed. Close the iterator (`contextlib.closing`) to stop
        threads and processes at once.
    """
    reader = Reader(source, preprocess, corrupt, seed)
    first, rows = _rows_of_shard(batch_size, shard)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}, expected 0 to {2**32 - 1}; choose another")
    if start_step < 0:
        raise UserError(f"start_step is {start_step}, expected 0 or more")
    choose = functools.partial(_shuffled, count=len(source), seed=seed)
    batches = _Batches(reader, choose, ("image", "label"), batch_size, first, rows, start_step)
    return _stream(batches, prefetch, threads, workers)


def eval_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    workers: int | Readers = 0,
    prefetch: int = 2,
    corrupt: str = "error",
) -> Iterator[Batch]:
    """Yields every image once, in order; the last batch is padded.

    Args: as `train_batches`. With several hosts all of them get the same number of batches. With
      `corrupt="skip"` an unreadable image is logged and its mask is False. `workers` -1 means
      threads for fewer than 4,096 images: they would be read before processes have started.

    Yields:
      {"image": float32 (rows, h, w, c), "label": int32 (rows,), "mask": bool (rows,), "index":
      int32 (rows,)}, "label" as `train_batches`. Where mask is False image and label are 0 and must
      not be counted; index is the image's place in the source, -1 for padding.

    Raises:
      UserError: as `train_batches`, or a preprocessing that is random.
    """
    reader = Reader(source, preprocess, corrupt, None)
    first, rows = _rows_of_shard(batch_size, shard)
    if preprocess.random:
        raise UserError(
            f"preprocessing {preprocess.spec!r} is random, expected one that always gives the same "
            "result; remove the random operations from the evaluation's"
        )
    steps = -(-len(source) // batch_size)
    if workers == AUTOMATIC and len(source) < LEAST_FOR_PROCESSES * shard[1]:
        workers = 0
    keys = ("image", "label", "mask", "index")
    choose = functools.partial(_in_order, count=len(source))
    batches = _Batches(reader, choose, keys, batch_size, first, rows, 0, steps)
    return _stream(batches, prefetch, threads, workers)


def _in_order(positions: range, count: int) -> np.ndarray:
    """The images at some positions, -1 behind the last, int64."""
    indices = np.arange(positions.start, positions.stop)
    return np.where(indices < count, indices, -1)


def _shuffled(positions: range, count: int, seed: int) -> np.ndarray:
    """The images at some positions of the endless stream of shuffled epochs, int64."""
    epochs, places = np.divmod(np.arange(positions.start, positions.stop), count)
    return np.concatenate(
        [
            _order(count, seed, epoch)[places[epochs == epoch]]
            if count < 2**16
            else _places_of_many(places[epochs == epoch], count, _epoch_seed(seed, epoch))
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
    )


def _places_of_many(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A permutation of many images without a table of it; of few it is slow, for it permutes
    2**16 numbers at least and passes over what is too large."""
    from grain.experimental import index_shuffle  # Takes a second.

    last = count - 1
    return np.array(
        [index_shuffle(place, max_index=last, seed=seed, rounds=4) for place in places.tolist()]
    )


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


@dataclass(frozen=True)
class _Batches:
    """One host's part of each batch.

    The part is contiguous: a row's place in the global batch is the same for any number of hosts.

    Attributes:
      choose: positions of the stream that all hosts share -> the images there, int (n,).
      keys: what of a batch is wanted.
      batch_size: rows of a whole batch; first, rows: where this host's part begins, and its length.
      start_step, steps: the batches that there are.
    """

    reader: Reader
    choose: Callable[[range], np.ndarray]
    keys: tuple[str, ...]
    batch_size: int
    first: int
    rows: int
    start_step: int
    steps: int = 2**40  # No end.

    def positions(self, step: int) -> range:
        begin = (self.start_step + step) * self.batch_size + self.first
        return range(begin, begin + self.rows)

    def layout(self) -> tuple[Layout, Skipped]:
        """What a batch holds, for which one image is read."""
        source = self.reader.source
        index = max(int(self.choose(self.positions(0))[0]), 0)
        shape, dtype, skipped = self.reader.look(index)
        label = ((len(source.labels),), np.float32) if source.multi_label else ((), np.int32)
        of_one = {
            "image": (shape, dtype),
            "label": label,
            "mask": ((), np.bool_),
            "index": ((), np.int32),
        }
        arrays = {k: ((self.rows, *shape), np.dtype(t)) for k, (shape, t) in of_one.items()}
        return Layout(arrays), skipped


def _rows_of_shard(batch_size: int, shard: tuple[int, int]) -> tuple[int, int]:
    """The first row and the number of rows of a host's part of a batch."""
    host, hosts = shard
    if batch_size < 1 or batch_size % hosts:
        raise UserError(
            f"batch size is {batch_size}, expected a multiple of {hosts}, the number of hosts, "
            "greater than 0"
        )
    rows = batch_size // hosts
    return host * rows, rows


def _stream(
    batches: _Batches, prefetch: int, threads: int | None, workers: int | Readers
) -> Iterator[Batch]:
    if prefetch < 1 or threads == 0:
        raise UserError(
            f"threads is {threads} and prefetch is {prefetch}, expected 1 or more of each"
        )
    readers = workers
    if not isinstance(readers, Readers):
        readers = choose_readers(batches.reader.source, readers, threads or 0)
    running = contextlib.ExitStack()
    stream = _filled(batches, prefetch, readers, running)
    # Also when the interpreter exits, before the modules that closing needs are torn down.
    weakref.finalize(stream, running.close)
    return stream


def _filled(
    batches: _Batches, prefetch: int, readers: Readers, running: contextlib.ExitStack
) -> Iterator[Batch]:
    """Has `prefetch` batches filled while one is used, all readers at the same one, in order."""
    warned: set[int] = set()

    def warn(skipped: Skipped) -> None:
        for index, message in skipped:
            if index not in warned:
                warned.add(index)
                _log.warning("Skipping %s", message)

    with running:
        layout, skipped = batches.layout()
        warn(skipped)
        buffers, filling, count = _start(batches, layout, readers, running)
        running.callback(filling.close)
        rows = range(batches.rows)
        some = min(-(-len(rows) // count), _ROWS_AT_ONCE)
        parts = [rows[i : i + some] for i in rows[::some]]
        ahead: deque[tuple[int, Batch]] = deque()
        steps = iter(range(batches.steps))

        def next_batch() -> Batch:
            number, batch = ahead.popleft()
            warn(filling.wait(number))
            return {key: batch[key] for key in batches.keys}

        while True:
            for step in itertools.islice(steps, prefetch + 1 - len(ahead)):
                number, batch = buffers.take()
                positions = batches.positions(step)
                batch["index"][:] = batches.choose(positions)
                filling.submit(number, batch, parts, positions.start)
                ahead.append((number, batch))
                del batch
            if not ahead:
                return
            yield next_batch()  # Not kept here: its buffer is free when the consumer lets it go.


def _start(
    batches: _Batches, layout: Layout, readers: Readers, running: contextlib.ExitStack
) -> tuple[Buffers, Threads | Processes, int]:
    """The memory of batches, those who fill it, and how many they are.

    Raises UserError if processes were asked for that can't be had.
    """
    if readers.workers:
        count, source = min(readers.workers, batches.rows), batches.reader.source.name
        try:
            memory = anonymous_file()
            running.callback(os.close, memory)
            processes = Processes(batches.reader, layout, memory, count)
            return Buffers(layout, memory), processes, readers.workers
        except (UserError, OSError) as error:
            told = error if isinstance(error, UserError) else not_given(source, error)
            if not readers.automatic:
                raise UserError(f"{told}; {THREADS_INSTEAD}") from None
            _log.warning("Read by threads: %s", told)
    return Buffers(layout), Threads(batches.reader, readers.threads), readers.threads
