"""Single pictures of a source: read, preprocessed, and left out if they can't be read."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Batch = dict[str, np.ndarray]
Skipped = list[tuple[int, str]]  # Index of an unreadable picture, and what is wrong with it.

_ZEROS = (0, 0, 0, 0)
_own = threading.local()


def generator() -> np.random.Generator:
    """This thread's, to be restarted for each picture: to make one takes long."""
    if not hasattr(_own, "generator"):
        _own.generator = np.random.Generator(np.random.Philox(0))
    return _own.generator


def restart(rng: np.random.Generator, seed: int, position: int) -> None:
    """Has it go on as a new one of `Philox(key=(seed, position))` would begin."""
    state: Any = {"counter": _ZEROS, "key": (seed, position)}
    rest: Any = {"buffer": _ZEROS, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    rng.bit_generator.state = {"bit_generator": "Philox", "state": state} | rest


class Reader:
    """Reads and preprocesses pictures and knows which ones can't be read.

    May be used by several threads, and be copied to other processes.

    Args:
      source: the pictures. preprocess: what is done to each.
      corrupt: "error" or "skip".
      seed: of what is drawn for the pictures of training, where an unreadable one is replaced by
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
        self._example = -1  # The picture whose size all have to have.

    def look(self, index: int) -> tuple[tuple[int, ...], np.dtype, Skipped]:
        """Shape and dtype of what the picture at `index` becomes, or the next one that can be read;
        the size that `fill` expects of all."""
        skipped: Skipped = []
        image, _, self._example = self._readable(index, generator(), 0, skipped)
        return image.shape, image.dtype, skipped

    def fill(self, batch: Batch, rows: Sequence[int], position: int) -> Skipped:
        """Reads some rows of a batch, of the pictures at the indices in batch["index"].

        Args:
          batch: "image" (n, h, w, c), "label" int32 (n,) or float32 (n, classes), "mask" bool (n,)
            and "index" int32 (n,), -1 for no picture. All of these rows is written.
          rows: those to read.
          position: of row 0 in the stream of examples; with the seed it decides what is drawn.

        Returns:
          what can't be read and was news.

        Raises UserError for a picture that can't be read or preprocessed, or is of another size.
        """
        images, labels, mask, indices = (batch[k] for k in ("image", "label", "mask", "index"))
        skipped: Skipped = []
        rng = generator()
        for row in rows:
            index, found = int(indices[row]), None
            if self._seed is not None:
                found = self._readable(index, rng, position + row, skipped)
            elif index >= 0:
                found = self._read(index, None, skipped)
            if found is None:
                images[row], labels[row], mask[row] = 0, 0, False
                continue
            image, labels[row], indices[row] = found
            if image.shape != images.shape[1:]:
                raise self._several_sizes(images.shape[1:], image.shape, found[2])
            images[row], mask[row] = image, True
        return skipped

    def _readable(
        self, index: int, rng: np.random.Generator, position: int, skipped: Skipped
    ) -> tuple[np.ndarray, Any, int]:
        """Image, label and index of the picture at `index` or the next one that can be read."""
        for offset in range(len(self.source)):
            # Drawn from or not: the next one is augmented as if it had been the first.
            restart(rng, self._seed or 0, position)
            found = self._read((index + offset) % len(self.source), rng, skipped)
            if found is not None:
                return found
        raise UserError(f"{self.source.name}: none of its {len(self.source)} pictures can be read")

    def _read(
        self, index: int, rng: np.random.Generator | None, skipped: Skipped
    ) -> tuple[np.ndarray, Any, int] | None:
        """Image, label and index of a picture; None if it is left out, for it can't be read."""
        if index in self._unreadable:
            return None
        try:
            part = functools.partial(self._preprocess.part, rng=rng)
            example = self.source.example(index, part)
        except UserError as error:
            if not self._skip:
                raise
            self._unreadable.add(index)
            skipped.append((index, str(error)))
            return None
        try:
            return self._preprocess(example["image"], rng, cut=True), example["label"], index
        except UserError as error:
            raise UserError(f"{self.source.describe(index)}: {error}") from None

    def _several_sizes(
        self, expected: tuple[int, ...], shape: tuple[int, ...], index: int
    ) -> UserError:
        return UserError(
            f"preprocessing {self._preprocess.spec!r} gives pictures of several sizes, "
            f"{expected} for {self.source.describe(self._example)} and {shape} for "
            f"{self.source.describe(index)}; expected one size: add resize(...) or a crop"
        )
