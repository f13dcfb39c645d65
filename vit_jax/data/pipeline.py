"""Batches: what training step t sees is a pure function of (seed, t).

Grain gives the order, an index shuffle, and the reading threads. Nothing here remembers a
position: to resume at step t, start at step t.
"""

import functools
import itertools
import logging
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Batch = dict[str, np.ndarray]
_Row = tuple[np.ndarray | None, Any, int]  # image or None, label or None, index in the source

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
    reader = _Reader(source, preprocess, corrupt)
    first, rows = _rows_of_shard(batch_size, shard)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}, expected 0 to {2**32 - 1}; choose another")
    if start_step < 0:
        raise UserError(f"start_step is {start_step}, expected 0 or more")
    read = functools.partial(_training_row, reader, len(source), seed)
    chunks = _Chunks(read, batch_size, first, rows, start_step)
    return _batches(chunks, reader, ("image", "label"), prefetch, threads, workers)


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
    reader = _Reader(source, preprocess, corrupt)
    first, rows = _rows_of_shard(batch_size, shard)
    if preprocess.random:
        raise UserError(
            f"preprocessing {preprocess.spec!r} is random, expected one that always gives the same "
            "result; remove the random operations from the evaluation's"
        )
    steps = -(-len(source) // batch_size)
    chunks = _Chunks(reader.read_or_blank, batch_size, first, rows, 0, steps)
    return _batches(chunks, reader, ("image", "label", "mask", "index"), prefetch, threads)


def _training_row(reader: "_Reader", count: int, seed: int, position: int) -> "_Row":
    """The example at a position of the endless stream of shuffled epochs."""
    epoch, place = divmod(position, count)
    index = grain.experimental.index_shuffle(
        place, max_index=count - 1, seed=_epoch_seed(seed, epoch), rounds=4
    )
    return reader.read_or_next(index, np.random.Generator(np.random.Philox(key=[seed, position])))


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class _Reader:
    """Reads and preprocesses single pictures and knows which ones can't be read."""

    def __init__(self, source: Source, preprocess: Preprocess, corrupt: str):
        if corrupt not in ("error", "skip"):
            raise UserError(f"corrupt is {corrupt!r}, expected 'error' or 'skip'")
        self._source = source
        self._preprocess = preprocess
        self._skip = corrupt == "skip"
        self._unreadable: dict[int, object] = {}

    def read_or_next(self, index: int, rng: np.random.Generator) -> _Row:
        """The picture at `index` or, if it can't be read, the next one that can."""
        for offset in range(len(self._source)):
            row = self._read((index + offset) % len(self._source), rng)
            if row[0] is not None:
                return row
        raise UserError(
            f"{self._source.name}: none of its {len(self._source)} pictures can be read"
        )

    def read_or_blank(self, index: int) -> _Row:
        """The picture at `index`, without an image if it can't be read or there is none."""
        return self._read(index, None) if index < len(self._source) else (None, None, -1)

    def blank(self) -> np.ndarray:
        """A black picture of the size that all have."""
        image, _, _ = self.read_or_next(0, np.random.default_rng(0))
        assert image is not None  # read_or_next raises instead
        return np.zeros_like(image)

    def _read(self, index: int, rng: np.random.Generator | None) -> _Row:
        if index in self._unreadable:
            return None, None, index
        try:
            example = self._source[index]
        except UserError as error:
            if not self._skip:
                raise
            mark = object()  # Of several threads, one sees its own and warns.
            if self._unreadable.setdefault(index, mark) is mark:
                _log.warning("Skipping %s", error)
            return None, None, index
        try:
            return self._preprocess(example["image"], rng), example["label"], index
        except UserError as error:
            raise UserError(f"{self._source.describe(index)}: {error}") from None

    def stack(self, values: Sequence[_Row]) -> Batch:
        """Makes a batch, with zeros for missing images."""
        found = [image for image, _, _ in values if image is not None]
        if len(found) < len(values):
            blank = np.zeros_like(found[0]) if found else self.blank()
        filled = [blank if image is None else image for image, _, _ in values]
        shapes = {image.shape: index for image, (_, _, index) in zip(filled, values, strict=True)}
        if len(shapes) > 1:
            (one, i), (other, j) = list(shapes.items())[:2]
            raise UserError(
                f"preprocessing {self._preprocess.spec!r} gives pictures of several sizes, {one} "
                f"for {self._source.describe(i)} and {other} for {self._source.describe(j)}; "
                "expected one size: add resize(...) or a crop"
            )
        return {
            "image": np.stack(filled),
            "label": self._labels([label for _, label, _ in values]),
            "mask": np.array([image is not None for image, _, _ in values]),
            "index": np.array([index for _, _, index in values], np.int32),
        }

    def _labels(self, labels: Sequence[Any]) -> np.ndarray:
        if not self._source.multi_label:
            return np.array([0 if label is None else label for label in labels], np.int32)
        none = np.zeros(len(self._source.labels), np.float32)
        return np.stack([none if label is None else label for label in labels])


@dataclass(frozen=True)
class _Chunks:
    """One host's part of each batch, some rows at a time, so that they share what Grain costs.

    The part is contiguous: a row's place in the global batch is the same for any number of hosts.

    Attributes:
      read: the example at a position of the stream that all hosts share.
      batch_size: rows of a whole batch; first, rows: where this host's part begins, and its length.
      start_step, steps: the batches that there are.
    """

    read: Callable[[int], _Row]
    batch_size: int
    first: int
    rows: int
    start_step: int
    steps: int = 2**40  # No end.
    together: int = 16

    @property
    def per_batch(self) -> int:
        """How many chunks make a batch."""
        return -(-self.rows // self.together)

    def __len__(self) -> int:
        return self.steps * self.per_batch

    def __getitem__(self, element: int) -> list[_Row]:
        step, chunk = divmod(element, self.per_batch)
        begin = (self.start_step + step) * self.batch_size + self.first
        low, high = (c * self.rows // self.per_batch for c in (chunk, chunk + 1))
        return [self.read(begin + i) for i in range(low, high)]


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


def _batches(
    chunks: _Chunks,
    reader: _Reader,
    keys: tuple[str, ...],
    prefetch: int,
    threads: int | None,
    workers: int = 0,
) -> Iterator[Batch]:
    if threads is None:
        # A container or a job may have been given fewer CPUs than the machine has.
        given = hasattr(os, "sched_getaffinity")
        threads = min(len(os.sched_getaffinity(0)) if given else os.cpu_count() or 1, 16)
    if threads < 1 or prefetch < 1:
        raise UserError(
            f"threads is {threads} and prefetch is {prefetch}, expected 1 or more of each"
        )
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks absl, which doesn't know our options.
            flags.FLAGS.mark_as_parsed()
        whole = replace(chunks, together=chunks.rows)  # Each worker makes every n-th batch.
        stacked = (
            grain.MapDataset.source(whole)
            .map(reader.stack)
            .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
        return _closing(iter(stacked.mp_prefetch(options)), keys, shared=True)
    read_ahead = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=prefetch * chunks.per_batch
    )
    some = grain.MapDataset.source(chunks).to_iter_dataset(read_ahead)
    stacked = some.batch(chunks.per_batch, batch_fn=lambda c: reader.stack([*itertools.chain(*c)]))
    # One more thread keeps a finished batch at hand: stacking a large one takes a while.
    ready = grain.experimental.ThreadPrefetchIterDataset(stacked, prefetch_buffer_size=1)
    return _closing(iter(ready), keys)


def _next_of_workers(batches: Any) -> Any:
    """The next batch; processes that are started for it never see Ctrl-C.

    A terminal sends it to all, but only the run knows what to save first. Threads and processes
    inherit what is blocked.
    """
    resource_tracker.ensure_running()  # Starting it later would unblock.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return next(batches, None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _closing(batches: Any, keys: tuple[str, ...], *, shared: bool = False) -> Iterator[Batch]:
    """Passes batches on, and stops their threads when the consumer is gone."""
    following = _next_of_workers if shared else lambda batches: next(batches, None)
    running = [batches]
    del batches  # `stop` must drop the last reference

    def stop() -> None:
        while running:
            running.pop().close()

    def stream() -> Iterator[Batch]:
        try:
            while running and (batch := following(running[0])) is not None:
                # Copied where workers share memory, which goes back to them so.
                yield {key: np.array(batch[key]) if shared else batch[key] for key in keys}
        finally:
            stop()

    result = stream()
    # Also when the interpreter exits, before the modules that closing needs are torn down.
    weakref.finalize(result, stop)
    return result
