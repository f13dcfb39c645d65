"""Batches: what training step t sees is a pure function of (seed, t).

Nothing here remembers a position: to resume at step t, start at step t.
"""

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import headers, images
from vit_jax.data.ops import BadValues
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.source import Source
from vit_jax.data.workers import (
    AUTOMATIC,
    LEAST_FOR_PROCESSES,
    Batch,
    Layout,
    Readers,
    Skipped,
    choose_readers,
    start_readers,
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
      corrupt: "error" stops at an unreadable image, or one of NaN; "skip" logs it once and takes
        the next readable one of the source in its place.

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
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}, expected 0 to {2**32 - 1}; choose another")
    if start_step < 0:
        raise UserError(f"start_step is {start_step}, expected 0 or more")
    return _stream(
        Reader(source, preprocess, corrupt, seed),
        functools.partial(_shuffled, count=len(source), seed=seed),
        itertools.count(start_step),
        ("image", "label"),
        batch_size=batch_size,
        shard=shard,
        threads=threads,
        workers=workers,
        prefetch=prefetch,
    )


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
    warns: bool = True,
) -> Iterator[Batch]:
    """Yields every image once, in order; the last batch is padded.

    Args: as `train_batches`. With several hosts all of them get the same number of batches. With
      `corrupt="skip"` an unreadable image is logged and its mask is False. `workers` -1 means
      threads for fewer than 4,096 images: they would be read before processes have started.
      Without `warns` unreadable images are not logged.

    Yields:
      {"image": float32 (rows, h, w, c), "label": int32 (rows,), "mask": bool (rows,), "index":
      int32 (rows,)}, "label" as `train_batches`. Where mask is False image and label are 0 and must
      not be counted; index is the image's place in the source, -1 for padding.

    Raises:
      UserError: as `train_batches`, or a preprocessing that is random.
    """
    if preprocess.random:
        raise UserError(
            f"preprocessing {preprocess.spec!r} is random, expected one that always gives the same "
            "result; remove the random operations from the evaluation's"
        )
    if workers == AUTOMATIC and len(source) < LEAST_FOR_PROCESSES * shard[1]:
        workers = 0
    return _stream(
        Reader(source, preprocess, corrupt, None),
        functools.partial(_in_order, count=len(source)),
        range(-(-len(source) // max(batch_size, 1))),
        ("image", "label", "mask", "index"),
        batch_size=batch_size,
        shard=shard,
        threads=threads,
        workers=workers,
        prefetch=prefetch,
        warns=warns,
    )


# The order.


def _in_order(positions: range, count: int) -> np.ndarray:
    """The images at some positions, -1 behind the last, int64."""
    indices = np.arange(positions.start, positions.stop)
    return np.where(indices < count, indices, -1)


def _shuffled(positions: range, count: int, seed: int) -> np.ndarray:
    """The images at some positions of the endless stream of shuffled epochs, int64."""
    epochs, places = np.divmod(np.arange(positions.start, positions.stop), count)
    return np.concatenate(
        [
            _places_in_epoch(places[epochs == epoch], count, seed, epoch)
            for epoch in range(epochs[0], epochs[-1] + 1)
        ]
    )


def _places_in_epoch(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    if count < 2**16:
        return _order(count, seed, epoch)[places]
    # A permutation of many images without a table of it; of few it is slow, for it permutes
    # 2**16 numbers at least and passes over what is too large.
    from grain.experimental import index_shuffle  # Takes a second.

    key = _epoch_seed(seed, epoch)
    shuffle = functools.partial(index_shuffle, max_index=count - 1, seed=key, rounds=4)
    return np.array([shuffle(place) for place in places.tolist()])


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


# The stream.


def _stream(
    reader: "Reader",
    choose: Callable[[range], np.ndarray],
    steps: Iterable[int],
    keys: tuple[str, ...],
    *,
    batch_size: int,
    shard: tuple[int, int],
    threads: int | None,
    workers: int | Readers,
    prefetch: int,
    warns: bool = True,
) -> Iterator[Batch]:
    """The batches of some steps, this host's contiguous rows of them.

    Has `prefetch` batches filled while one is used, all readers at the same one, in order.

    Args:
      choose: positions in the stream of examples that all hosts share -> the images there.
      keys: what of a batch is wanted.
    """
    host, hosts = shard
    if batch_size < 1 or batch_size % hosts:
        raise UserError(
            f"batch size is {batch_size}, expected a multiple of {hosts}, the number of hosts, "
            "greater than 0"
        )
    if prefetch < 1 or threads == 0:
        raise UserError(
            f"threads is {threads} and prefetch is {prefetch}, expected 1 or more of each"
        )
    if not isinstance(workers, Readers):
        workers = choose_readers(reader.source, workers, threads or 0)
    rows, readers, running = range(batch_size // hosts), workers, contextlib.ExitStack()
    warned: set[int] = set()

    def positions(step: int) -> range:
        begin = step * batch_size + host * len(rows)
        return range(begin, begin + len(rows))

    def warn(skipped: Skipped) -> None:
        for index, message in skipped:
            if warns and index not in warned:
                warned.add(index)
                _log.warning("Skipping %s", message)

    def filled() -> Iterator[Batch]:
        with running:
            left = iter(steps)
            first = next(left, 0)  # Of no images reading the first tells.
            layout, skipped = reader.layout(len(rows), int(choose(positions(first))[0]))
            warn(skipped)
            buffers, filling, count = start_readers(reader, len(rows), layout, readers, running)
            running.callback(filling.close)
            some = min(-(-len(rows) // count), _ROWS_AT_ONCE)
            parts = [rows[i : i + some] for i in rows[::some]]
            ahead: deque[tuple[int, Batch]] = deque()
            left = itertools.chain([first], left)

            def next_batch() -> Batch:
                number, batch = ahead.popleft()
                warn(filling.wait(number))
                return {key: batch[key] for key in keys}

            while True:
                for step in itertools.islice(left, prefetch + 1 - len(ahead)):
                    number, batch = buffers.take()
                    batch["index"][:] = choose(positions(step))
                    filling.submit(number, batch, parts, positions(step).start)
                    ahead.append((number, batch))
                    del batch
                if not ahead:
                    return
                yield next_batch()  # Not kept here: its buffer is free when the consumer lets go.

    stream = filled()
    # Also when the interpreter exits, before the modules that closing needs are torn down.
    weakref.finalize(stream, running.close)
    return stream


# Reading.

_ZEROS = (0, 0, 0, 0)
_own = threading.local()


def _generators() -> list[np.random.Generator]:
    """This thread's, to be restarted for each image: to make one takes long.

    As many as images that are opened before the first is decoded, which leaves nothing of
    Python in the processor's cache: alternating takes longer. More would take more memory.
    """
    if not hasattr(_own, "generators"):
        _own.generators = [np.random.Generator(np.random.Philox(0)) for _ in range(4)]
    return _own.generators


def _restart(rng: np.random.Generator, seed: int, position: int) -> None:
    """Has it go on as a new one of `Philox(key=(seed, position))` would begin."""
    state: Any = {"counter": _ZEROS, "key": (seed, position)}
    rest: Any = {"buffer": _ZEROS, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    rng.bit_generator.state = {"bit_generator": "Philox", "state": state} | rest


class _Opened(NamedTuple):
    """An example that was read but not decoded; `box` is what was drawn of its crop already."""

    place: int
    name: str
    stored: bytes | np.ndarray
    label: Any
    header: headers.Header | None
    box: images.Box | None


Example = tuple[np.ndarray, Any, int]  # Image, label, index in the source.


class Reader:
    """Reads and preprocesses images and knows which ones can't be read.

    May be used by several threads, and be copied to other processes.

    Args:
      source: the images. preprocess: what is done to each.
      corrupt: "error" or "skip".
      seed: of what is drawn for the images of training, where an unreadable one is replaced by
        the next that can be read; None in an evaluation, where its row stays blank.
    """

    def __init__(self, source: Source, preprocess: Preprocess, corrupt: str, seed: int | None):
        if corrupt not in ("error", "skip"):
            raise UserError(f"corrupt is {corrupt!r}, expected 'error' or 'skip'")
        self.source = source
        self._preprocess = preprocess
        self._skip = corrupt == "skip"
        self._seed = seed
        self._unreadable: set[int] = set()
        self._example = -1  # The image whose size all have to have.

    def layout(self, rows: int, index: int) -> tuple[Layout, Skipped]:
        """What a batch of so many rows holds, for which the image at `index` is read, or the next
        one that can be; `fill` expects all to be of its size."""
        skipped: Skipped = []
        image, _, self._example = self._readable(max(index, 0), _generators()[0], 0, skipped)
        label = self.source.label([] if self.source.multi_label else 0)
        return {
            "image": ((rows, *image.shape), image.dtype),
            "label": ((rows, *np.shape(label)), np.dtype("f4" if np.shape(label) else "i4")),
            "mask": ((rows,), np.dtype(bool)),
            "index": ((rows,), np.dtype("i4")),
        }, skipped

    def fill(self, batch: Batch, rows: Sequence[int], position: int) -> Skipped:
        """Reads some rows of a batch, of the images at the indices in batch["index"].

        Args:
          batch: "image" (n, h, w, c), "label" int32 (n,) or float32 (n, classes), "mask" bool (n,)
            and "index" int32 (n,), -1 for no image. All of these rows is written.
          rows: those to read.
          position: of row 0 in the stream of examples; with the seed it decides what is drawn.

        Returns:
          what can't be read and was news.

        Raises UserError for an image that can't be read or preprocessed, or is of another size.
        """
        pixels, labels, mask, indices = (batch[k] for k in ("image", "label", "mask", "index"))
        skipped: Skipped = []
        rngs = _generators()
        for first in range(0, len(rows), len(rngs)):
            group = [
                (row, rng, self._open(int(indices[row]), rng, position + row, skipped))
                for row, rng in zip(rows[first : first + len(rngs)], rngs, strict=False)
            ]
            for row, rng, opened in group:
                found = opened and self._finish(opened, rng, skipped)
                if not found and self._seed is not None:
                    found = self._readable(int(indices[row]), rng, position + row, skipped)
                if not found:
                    pixels[row], labels[row], mask[row] = 0, 0, False
                    continue
                image, labels[row], indices[row] = found
                if image.shape != pixels.shape[1:]:
                    raise UserError(
                        f"preprocessing {self._preprocess.spec!r} gives images of several sizes, "
                        f"{pixels.shape[1:]} for {self.source.describe(self._example)} and "
                        f"{image.shape} for {self.source.describe(found[2])}; expected one size: "
                        "add resize(...) or a crop"
                    )
                pixels[row], mask[row] = image, True
        return skipped

    def _readable(
        self, index: int, rng: np.random.Generator, position: int, skipped: Skipped
    ) -> Example:
        """The image at `index` or the next one that can be read, augmented as if it had been the
        first."""
        count = len(self.source)
        for place in itertools.chain(range(index, count), range(index)):
            opened = self._open(place, rng, position, skipped)
            if opened and (found := self._finish(opened, rng, skipped)):
                return found
        reason = f", as {skipped[0][1]}" if skipped else ""
        raise UserError(f"{self.source.name}: none of its {count} images can be read{reason}")

    def _open(
        self, index: int, rng: np.random.Generator, position: int, skipped: Skipped
    ) -> _Opened | None:
        """Reads an example and draws its crop, if its header is enough for that; None if it is
        left out."""
        if index in self._unreadable or index < 0:
            return None
        _restart(rng, self._seed or 0, position)
        name, header, box = self.source.describe(index), None, None
        try:
            stored, label = self.source.stored(index)
            if isinstance(stored, bytes):
                header = headers.read_header(stored, name)
                if header.plain:
                    box = self._preprocess.crop_box(header.size, rng)
            return _Opened(index, name, stored, self.source.label(label), header, box)
        except UserError as error:
            self._leave_out(index, error, skipped)
            return None

    def _finish(
        self, opened: _Opened, rng: np.random.Generator, skipped: Skipped
    ) -> Example | None:
        """The decoded and preprocessed image; None if it is left out."""
        index, name, pixels, label, header, box = opened
        if isinstance(pixels, bytes):
            channels = self.source.channels
            try:
                pixels = images.decode(pixels, channels=channels, name=name, box=box, header=header)
            except UserError as error:
                self._leave_out(index, error, skipped)
                return None
        try:
            return self._preprocess(pixels, rng, cropped=box is not None), label, index
        except UserError as error:
            named = UserError(f"{name}: {error}")
            if not isinstance(error, BadValues):  # So it is with the other images.
                raise named from None
            self._leave_out(index, named, skipped)
            return None

    def _leave_out(self, index: int, error: UserError, skipped: Skipped) -> None:
        if not self._skip:
            raise error from None
        self._unreadable.add(index)
        skipped.append((index, str(error)))
