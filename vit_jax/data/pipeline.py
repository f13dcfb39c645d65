"""Batches: what training step t sees is a pure function of (seed, t).

Grain gives the order, the random numbers and the reading threads. Nothing here remembers a
position: to resume at step t, start at step t.
"""

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
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
    examples = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(reader.read_or_next)
    )
    rows_of_host = _ShardRows(examples, batch_size, first, rows)[start_step * rows :]
    keys = ("image", "label")
    if workers:
        batches = _by_workers(rows_of_host, rows, reader, workers, prefetch)
        return _closing(batches, keys, shared=True)
    return _batches(rows_of_host, rows, reader, threads, prefetch, keys)


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
    total = -(-len(source) // batch_size) * batch_size
    examples = grain.MapDataset.range(total).map(reader.read_or_blank)
    rows_of_host = _ShardRows(examples, batch_size, first, rows)
    keys = ("image", "label", "mask", "index")
    return _batches(rows_of_host, rows, reader, threads, prefetch, keys)


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


class _ShardRows(grain.MapDataset):
    """The examples of one host, a contiguous part of each global batch.

    Contiguous, so that a row's place in the global batch is the same for any number of hosts.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, first: int, rows: int):
        super().__init__(parent)
        self._examples = parent
        self._batch_size, self._first, self._rows = batch_size, first, rows

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * self._rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        return self._examples[step * self._batch_size + self._first + row]


class _WholeBatches(grain.MapDataset):
    """The batches of one host, for workers that make every n-th of them."""

    def __init__(self, rows: grain.MapDataset, size: int, reader: _Reader):
        super().__init__(rows)
        self._batch_rows, self._size, self._reader = rows, size, reader

    def __len__(self) -> int:
        return len(self._batch_rows) // self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        start = index * self._size
        return self._reader.stack([self._batch_rows[start + i] for i in range(self._size)])


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
    rows: grain.MapDataset,
    size: int,
    reader: _Reader,
    threads: int | None,
    prefetch: int,
    keys: tuple[str, ...],
) -> Iterator[Batch]:
    if threads is None:
        # A container or a job may have been given fewer CPUs than the machine has.
        given = hasattr(os, "sched_getaffinity")
        threads = min(len(os.sched_getaffinity(0)) if given else os.cpu_count() or 1, 16)
    if threads < 1 or prefetch < 1:
        raise UserError(
            f"threads is {threads} and prefetch is {prefetch}, expected 1 or more of each"
        )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch * size)
    stacked = rows.to_iter_dataset(options).batch(size, batch_fn=reader.stack)
    # One more thread keeps a finished batch at hand: stacking a large one takes a while.
    ready = grain.experimental.ThreadPrefetchIterDataset(stacked, prefetch_buffer_size=1)
    return _closing(iter(ready), keys)


def _by_workers(
    rows: grain.MapDataset, size: int, reader: _Reader, workers: int, prefetch: int
) -> Any:
    if not flags.FLAGS.is_parsed():  # Grain asks absl, which knows our options not.
        flags.FLAGS.mark_as_parsed()
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = _WholeBatches(rows, size, reader).to_iter_dataset(one_by_one)
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
    return iter(batches.mp_prefetch(options))


def _closing(batches: Any, keys: tuple[str, ...], *, shared: bool = False) -> Iterator[Batch]:
    """Passes batches on, and stops their threads when the consumer is gone."""
    running = [batches]
    del batches  # `stop` must drop the last reference

    def stop() -> None:
        while running:
            running.pop().close()

    def stream() -> Iterator[Batch]:
        try:
            while running and (batch := next(running[0], None)) is not None:
                # Copied where workers share memory, which goes back to them so.
                yield {key: np.array(batch[key]) if shared else batch[key] for key in keys}
        finally:
            stop()

    result = stream()
    # Also when the interpreter exits, before the modules that closing needs are torn down.
    weakref.finalize(result, stop)
    return result
