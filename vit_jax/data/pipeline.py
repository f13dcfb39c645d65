"""Batches: what training step t sees is a pure function of (seed, t).

Nothing here remembers a position: to resume at step t, start at step t.
"""

import functools
import itertools
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vit_jax.data.preprocess import Preprocess
from vit_jax.data.reading import Form, Reader, Row, generator
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    corrupt: str = "error",
) -> Iterator[Batch]:
    """Yields batches without end, the first being that of step `start_step`.

    Every epoch has an order of its own and holds each picture once; epochs follow each other
    without a gap, within a batch if need be. The picture at row i of step t and its augmentation
    depend on (seed, t, i) and the source alone: not on `start_step`, `shard`, `threads`,
    `workers` or `prefetch`. Starting late costs nothing.

    Args:
      source: the pictures.
      preprocess: applied to each; its results must have one size.
      batch_size: rows of a batch, over all hosts; may exceed the number of pictures.
      seed: 0 to 2**32 - 1.
      start_step: counted from 0.
      shard: (host, number of hosts); host h gets the h-th contiguous part of each batch.
      threads: that read and preprocess; by default one a CPU, 16 at most.
      workers: processes that make a whole batch each, in place of threads; 0 for threads, which
        start at once and are as fast where OpenCV does the work.
      prefetch: batches read ahead, by each worker if there are some; memory grows with it.
      corrupt: "error" stops at an unreadable picture; "skip" logs it once and takes the next
        readable one of the source in its place.

    Yields:
      {"image": (rows, h, w, c) of the preprocessing's type, "label": int32 (rows,)}, rows =
      batch_size / hosts. Where a picture may have several labels, "label" is float32 (rows,
      classes) of 0 and 1.

    Raises:
      UserError: wrong arguments, an unreadable picture (see `corrupt`), or pictures of several
        sizes. Close the iterator (`contextlib.closing`) to stop its threads at once.
    """
    reader = Reader(source, preprocess, corrupt)
    first, rows = _rows_of_shard(batch_size, shard)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}, expected 0 to {2**32 - 1}; choose another")
    if start_step < 0:
        raise UserError(f"start_step is {start_step}, expected 0 or more")
    read = functools.partial(_training_rows, reader, len(source), seed)
    batches = _Batches(reader, read, ("image", "label"), batch_size, first, rows, start_step)
    return _stream(batches, prefetch, threads, workers)


def eval_batches(
    source: Source,
    preprocess: Preprocess,
    *,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    threads: int | None = None,
    prefetch: int = 2,
    corrupt: str = "error",
) -> Iterator[Batch]:
    """Yields every picture once, in order; the last batch is padded.

    Args: as `train_batches`. With several hosts all of them get the same number of batches. With
      `corrupt="skip"` an unreadable picture is logged and its mask is False.

    Yields:
      {"image": float32 (rows, h, w, c), "label": int32 (rows,), "mask": bool (rows,), "index":
      int32 (rows,)}, "label" as `train_batches`. Where mask is False image and label are 0 and must
      not be counted; index is the picture's place in the source, -1 for padding.

    Raises:
      UserError: as `train_batches`, or a preprocessing that is random.
    """
    reader = Reader(source, preprocess, corrupt)
    first, rows = _rows_of_shard(batch_size, shard)
    if preprocess.random:
        raise UserError(
            f"preprocessing {preprocess.spec!r} is random, expected one that always gives the same "
            "result; remove the random operations from the evaluation's"
        )
    steps = -(-len(source) // batch_size)
    keys = ("image", "label", "mask", "index")
    read = functools.partial(map, reader.read_or_blank)
    batches = _Batches(reader, read, keys, batch_size, first, rows, 0, steps)
    return _stream(batches, prefetch, threads)


def _training_rows(reader: Reader, count: int, seed: int, positions: range) -> Iterator[Row]:
    """The examples at some positions of the endless stream of shuffled epochs."""
    # What is chosen for all of them first: between pictures this takes three times as long, for
    # decoding leaves nothing of it in the processor's cache.
    chosen = []
    for position in positions:
        epoch, place = divmod(position, count)
        chosen.append((_shuffled(place, count, seed, epoch), generator([seed, position])))
    for index, rng in chosen:
        yield reader.read_or_next(index, rng)


def _shuffled(place: int, count: int, seed: int, epoch: int) -> int:
    """The picture at a place of an epoch: a permutation, of many pictures without a table of it."""
    if count < 2**16:
        return int(_order(count, seed, epoch)[place])
    from grain.experimental import index_shuffle  # Takes a second.

    # It permutes 2**16 numbers at least and passes over what is too large: slow for few pictures.
    return index_shuffle(place, max_index=count - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class _Filling:
    """A batch to which threads add pictures, each to rows of its own.

    Attributes:
      form: shape and dtype of its pictures and the index of the first, when that is known.
    """

    def __init__(self, reader: Reader, rows: int, form: Form | None = None):
        self.form = form
        self._reader = reader
        self._lock = threading.Lock()
        self._images = np.empty((rows, *form[0]), form[1]) if form else None
        self._labels: list[Any] = [None] * rows
        self._mask = np.zeros(rows, bool)
        self._index = np.full(rows, -1, np.int32)

    def put(self, row: int, image: np.ndarray | None, label: Any, index: int) -> None:
        self._labels[row], self._index[row] = label, index
        if image is None:
            return
        form, images = self._memory(image, index)
        self._reader.check_size(form, image.shape, index)
        images[row], self._mask[row] = image, True

    def _memory(self, image: np.ndarray, index: int) -> tuple[Form, np.ndarray]:
        """The memory of all rows, of the form of their first picture."""
        with self._lock:
            if self.form is None or self._images is None:
                self.form = image.shape, image.dtype, index
                self._images = np.empty((len(self._mask), *image.shape), image.dtype)
            return self.form, self._images

    def batch(self) -> Batch:
        """With zeros for missing images."""
        images = self._images
        if images is None:
            _, images = self._memory(self._reader.blank(), 0)
        images[~self._mask] = 0
        labels = self._reader.labels(self._labels)
        return {"image": images, "label": labels, "mask": self._mask, "index": self._index}


@dataclass(frozen=True)
class _Batches:
    """One host's part of each batch.

    The part is contiguous: a row's place in the global batch is the same for any number of hosts.

    Attributes:
      read: the examples at positions of the stream that all hosts share.
      keys: what of a batch is wanted.
      batch_size: rows of a whole batch; first, rows: where this host's part begins, and its length.
      start_step, steps: the batches that there are.
    """

    reader: Reader
    read: Callable[[range], Iterator[Row]]
    keys: tuple[str, ...]
    batch_size: int
    first: int
    rows: int
    start_step: int
    steps: int = 2**40  # No end.

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        filling = _Filling(self.reader, self.rows)
        self.fill(filling, step, range(self.rows))
        return self.finish(filling)

    def fill(self, filling: _Filling, step: int, rows: range) -> None:
        begin = (self.start_step + step) * self.batch_size + self.first
        positions = range(begin + rows.start, begin + rows.stop)
        for row, example in zip(rows, self.read(positions), strict=True):
            filling.put(row, *example)

    def finish(self, filling: _Filling) -> Batch:
        batch = filling.batch()
        return {key: batch[key] for key in self.keys}


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
    batches: _Batches, prefetch: int, threads: int | None, workers: int = 0
) -> Iterator[Batch]:
    if threads is None:
        # A container or a job may have been given fewer CPUs than the machine has.
        given = hasattr(os, "sched_getaffinity")
        threads = min(len(os.sched_getaffinity(0)) if given else os.cpu_count() or 1, 16)
    if threads < 1 or prefetch < 1:
        raise UserError(
            f"threads is {threads} and prefetch is {prefetch}, expected 1 or more of each"
        )
    if not workers:
        return _by_threads(batches, prefetch, threads)
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain asks absl, which doesn't know our options.
        flags.FLAGS.mark_as_parsed()
    here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
    made = grain.MapDataset.source(batches).to_iter_dataset(here).mp_prefetch(options)
    return _by_workers(iter(made))  # Each worker makes every n-th batch.


def _by_threads(batches: _Batches, prefetch: int, threads: int) -> Iterator[Batch]:
    """Fills `prefetch` batches while one is used, a few rows at a time, in order."""
    rows = range(batches.rows)
    some = min(-(-len(rows) // threads), 8)
    parts = [rows[i : i + some] for i in rows[::some]]
    pool = ThreadPoolExecutor(threads, "vit_jax.data")
    ahead: deque[tuple[_Filling, list[Future]]] = deque()
    form, steps = None, iter(range(len(batches)))
    try:
        while True:
            for step in itertools.islice(steps, prefetch + 1 - len(ahead)):
                # One thread takes all memory: it costs the system more if several do.
                filling = _Filling(batches.reader, len(rows), form)
                tasks = [pool.submit(batches.fill, filling, step, part) for part in parts]
                ahead.append((filling, tasks))
            if not ahead:
                return
            filling, tasks = ahead.popleft()
            for task in tasks:
                task.result()
            yield batches.finish(filling)
            form = filling.form
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _next_of_workers(batches: Any) -> Any:
    """The next batch; processes that are started for it never see Ctrl-C.

    A terminal sends it to all, but only the run knows what to save first. Threads and processes
    inherit what is blocked.
    """
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # Starting it later would unblock.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return next(batches, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _by_workers(batches: Any) -> Iterator[Batch]:
    """Passes batches on, and stops the processes when the consumer is gone."""
    running = [batches]
    del batches  # `stop` must drop the last reference

    def stop() -> None:
        while running:
            running.pop().close()

    def stream() -> Iterator[Batch]:
        try:
            while running and (batch := _next_of_workers(running[0])) is not None:
                # Copied: the memory goes back to them.
                yield {key: np.array(value) for key, value in batch.items()}
        finally:
            stop()

    result = stream()
    # Also when the interpreter exits, before the modules that closing needs are torn down.
    weakref.finalize(result, stop)
    return result
