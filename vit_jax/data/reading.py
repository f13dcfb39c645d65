"""Single images of a source: read, preprocessed, and left out if they can't be read."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Batch = dict[str, np.ndarray]
Skipped = list[tuple[int, str]]  # Index of an unreadable image, and what is wrong with it.
Opened = tuple[Callable[[], np.ndarray], Any]  # What decodes an image, and its label.
Example = tuple[np.ndarray, Any, int]  # Image, label, index in the source.

_ZEROS = (0, 0, 0, 0)
_own = threading.local()


def generators() -> list[np.random.Generator]:
    """This thread's, to be restarted for each image: to make one takes long.

    As many as images that are opened before the first is decoded, which leaves nothing of
    Python in the processor's cache: alternating takes longer. More would take more memory.
    """
    if not hasattr(_own, "generators"):
        _own.generators = [np.random.Generator(np.random.Philox(0)) for _ in range(4)]
    return _own.generators


def restart(rng: np.random.Generator, seed: int, position: int) -> None:
    """Has it go on as a new one of `Philox(key=(seed, position))` would begin."""
    state: Any = {"counter": _ZEROS, "key": (seed, position)}
    rest: Any = {"buffer": _ZEROS, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    rng.bit_generator.state = {"bit_generator": "Philox", "state": state} | rest


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

    def look(self, index: int) -> tuple[tuple[int, ...], np.dtype, Skipped]:
        """Shape and dtype of what the image at `index` becomes, or the next one that can be read;
        the size that `fill` expects of all."""
        skipped: Skipped = []
        image, _, self._example = self._readable(index, generators()[0], 0, skipped)
        return image.shape, image.dtype, skipped

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
        images, labels, mask, indices = (batch[k] for k in ("image", "label", "mask", "index"))
        skipped: Skipped = []
        training, rngs = self._seed is not None, generators()
        for first in range(0, len(rows), len(rngs)):
            group = []
            for row, rng in zip(rows[first : first + len(rngs)], rngs, strict=False):
                index = int(indices[row])
                if training:
                    restart(rng, self._seed or 0, position + row)
                opened = self._open(index, rng if training else None, skipped)
                group.append((row, index, rng, opened))
            for row, index, rng, opened in group:
                found = opened and self._finish(index, rng if training else None, opened, skipped)
                if not found and training:
                    found = self._readable(index, rng, position + row, skipped)
                if not found:
                    images[row], labels[row], mask[row] = 0, 0, False
                    continue
                image, labels[row], indices[row] = found
                if image.shape != images.shape[1:]:
                    raise self._several_sizes(images.shape[1:], image.shape, found[2])
                images[row], mask[row] = image, True
        return skipped

    def _readable(
        self, index: int, rng: np.random.Generator, position: int, skipped: Skipped
    ) -> Example:
        """The image at `index` or the next one that can be read."""
        for offset in range(len(self.source)):
            # Drawn from or not: the next one is augmented as if it had been the first.
            restart(rng, self._seed or 0, position)
            place = (index + offset) % len(self.source)
            opened = self._open(place, rng, skipped)
            found = opened and self._finish(place, rng, opened, skipped)
            if found:
                return found
        raise UserError(f"{self.source.name}: none of its {len(self.source)} images can be read")

    def _open(self, index: int, rng: np.random.Generator | None, skipped: Skipped) -> Opened | None:
        """What is left to do for the pixels of an image, and its label; None if it is left out."""
        if index in self._unreadable or index < 0:
            return None
        try:
            stored, label = self.source.stored(index)
            part = functools.partial(self._preprocess.part, rng=rng)
            return self.source.opened(stored, index, part), self.source.label(label)
        except UserError as error:
            self._leave_out(index, error, skipped)
            return None

    def _finish(
        self, index: int, rng: np.random.Generator | None, opened: Opened, skipped: Skipped
    ) -> Example | None:
        """The preprocessed image; None if it is left out."""
        try:
            pixels = opened[0]()
        except UserError as error:
            self._leave_out(index, error, skipped)
            return None
        try:
            return self._preprocess(pixels, rng, cut=True), opened[1], index
        except UserError as error:
            raise UserError(f"{self.source.describe(index)}: {error}") from None

    def _leave_out(self, index: int, error: UserError, skipped: Skipped) -> None:
        if not self._skip:
            raise error
        self._unreadable.add(index)
        skipped.append((index, str(error)))

    def _several_sizes(
        self, expected: tuple[int, ...], shape: tuple[int, ...], index: int
    ) -> UserError:
        return UserError(
            f"preprocessing {self._preprocess.spec!r} gives images of several sizes, "
            f"{expected} for {self.source.describe(self._example)} and {shape} for "
            f"{self.source.describe(index)}; expected one size: add resize(...) or a crop"
        )
