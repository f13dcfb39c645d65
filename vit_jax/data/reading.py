"""Single pictures of a source: read, preprocessed, and left out if they can't be read."""

import functools
import logging
from typing import Any

import numpy as np

from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Row = tuple[np.ndarray | None, Any, int]  # image or None, label or None, index in the source
Form = tuple[tuple[int, ...], np.dtype, int]  # shape and dtype of images, index of one of them

_log = logging.getLogger(__name__)


def generator(key: Any) -> np.random.Generator:
    """What is drawn for a picture, as often as it is asked for."""
    return np.random.Generator(np.random.Philox(key=key))


class Reader:
    """Reads and preprocesses single pictures and knows which ones can't be read."""

    def __init__(self, source: Source, preprocess: Preprocess, corrupt: str):
        if corrupt not in ("error", "skip"):
            raise UserError(f"corrupt is {corrupt!r}, expected 'error' or 'skip'")
        self._source = source
        self._preprocess = preprocess
        self._skip = corrupt == "skip"
        self._unreadable: dict[int, object] = {}

    def read_or_next(self, index: int, rng: np.random.Generator) -> Row:
        """The picture at `index` or, if it can't be read, the next one that can."""
        for offset in range(len(self._source)):
            row = self._read((index + offset) % len(self._source), rng)
            if row[0] is not None:
                return row
            # Drawn from or not: the next one is augmented as if it had been the first.
            rng = generator(rng.bit_generator.state["state"]["key"])
        raise UserError(
            f"{self._source.name}: none of its {len(self._source)} pictures can be read"
        )

    def read_or_blank(self, index: int) -> Row:
        """The picture at `index`, without an image if it can't be read or there is none."""
        return self._read(index, None) if index < len(self._source) else (None, None, -1)

    def blank(self) -> np.ndarray:
        """A black picture of the size that all have."""
        image, _, _ = self.read_or_next(0, generator(0))
        assert image is not None  # read_or_next raises instead
        return np.zeros_like(image)

    def _read(self, index: int, rng: np.random.Generator | None) -> Row:
        if index in self._unreadable:
            return None, None, index
        try:
            part = functools.partial(self._preprocess.part, rng=rng)
            example = self._source.example(index, part)
        except UserError as error:
            if not self._skip:
                raise
            mark = object()  # Of several threads, one sees its own and warns.
            if self._unreadable.setdefault(index, mark) is mark:
                _log.warning("Skipping %s", error)
            return None, None, index
        try:
            image = self._preprocess(example["image"], rng, cut=True)
            return image, example["label"], index
        except UserError as error:
            raise UserError(f"{self._source.describe(index)}: {error}") from None

    def check_size(self, form: Form, shape: tuple[int, ...], index: int) -> None:
        """Raises UserError if another picture has another shape."""
        if shape != form[0]:
            raise UserError(
                f"preprocessing {self._preprocess.spec!r} gives pictures of several sizes, "
                f"{form[0]} for {self._source.describe(form[2])} and {shape} for "
                f"{self._source.describe(index)}; expected one size: add resize(...) or a crop"
            )

    def labels(self, labels: list[Any]) -> np.ndarray:
        if not self._source.multi_label:
            return np.array([0 if label is None else label for label in labels], np.int32)
        none = np.zeros(len(self._source.labels), np.float32)
        return np.stack([none if label is None else label for label in labels])
