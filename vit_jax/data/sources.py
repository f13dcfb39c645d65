"""Where labelled pictures come from: data sets known by name, and folders of pictures.

A source knows its labels without decoding anything. To add one, write a function
`seed -> {split name: function that opens it}` and put it in `_DATASETS`.
"""

import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from vit_jax.errors import UserError


@dataclass(frozen=True)
class Source:
    """Labelled pictures, read one by one; `source[i]` may be called by many threads at once.

    Attributes:
      name: what the user called the data set.
      labels: class names; a label is an index into them.
      channels: colour channels of every picture.
      keys: one a picture, naming it independently of where the data set lies; an array where
        there may be millions.
      label_ids: int32 array (n,).
      read_key: key -> uint8 picture (h, w, channels); raises UserError if it can't be read.
      describe_key: key -> what a person calls the picture, e.g. its path.
    """

    name: str
    labels: tuple[str, ...]
    channels: int
    keys: Sequence[Any] | np.ndarray
    label_ids: np.ndarray
    read_key: Callable[[Any], np.ndarray]
    describe_key: Callable[[Any], str]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (h, w, channels), "label": int}; UserError if it can't be read."""
        return {"image": self.read_key(self.keys[index]), "label": int(self.label_ids[index])}

    def describe(self, index: int) -> str:
        """Names picture `index` for a person: a path, or "digits[12]"."""
        return self.describe_key(self.keys[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """The pictures at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        if isinstance(self.keys, np.ndarray):
            keys: Sequence[Any] | np.ndarray = self.keys[chosen]
        else:
            keys = [self.keys[i] for i in indices]
        return replace(self, keys=keys, label_ids=self.label_ids[chosen])


Splits = dict[str, Callable[[], Source]]


def open_source(dataset: str, split: str, *, seed: int = 0) -> Source:
    """Opens a part of a data set.

    Args:
      dataset: a known name ("digits") or a folder, DIR/{train,test}/<class>/* or DIR/<class>/*.
        `test` may also be called `validation` or `val`. Of a folder without such parts, a fifth
        of each class becomes the test split.
      split: "train", "test", "train[:98%]", "train[100:200]", "train+test", ... Percentages are
        rounded to the nearest picture, so "train[:98%]" and "train[98%:]" share none and miss none.
      seed: chooses that fifth; of no effect elsewhere.

    Raises:
      UserError: unknown data set or split, or a folder that isn't laid out as above.
    """
    return _open_split(split, _splits(dataset, seed))


def split_names(dataset: str, *, seed: int = 0) -> list[str]:
    """The names of the parts a data set comes in, aliases left out; raises as `open_source`."""
    names: dict[int, str] = {}
    for name, opens in _splits(dataset, seed).items():
        names.setdefault(id(opens), name)
    return list(names.values())


def _splits(dataset: str, seed: int) -> Splits:
    if dataset in _DATASETS:
        return _DATASETS[dataset](seed)
    if os.path.exists(os.path.expanduser(dataset)):
        from vit_jax.data.folders import folder_splits

        return folder_splits(dataset, seed)
    close = difflib.get_close_matches(dataset, _DATASETS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = ", ".join(map(repr, _DATASETS))
    raise UserError(
        f"unknown dataset {dataset!r}: there is no such folder, and the known names are "
        f"{known}; give one of them or the path of a folder of pictures{hint}"
    )


def data_fingerprint(source: Source) -> str:
    """16 hex digits that change with the class names, the pictures' names, order or labels.

    Nothing is read, so a picture with another content under the same name goes unnoticed.
    """
    digest = hashlib.sha256()
    for text in itertools.chain(source.labels, [""], map(str, source.keys)):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
    digest.update(source.label_ids.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


# Splits.

_PART = re.compile(
    r"\s*(\w+)\s*(?:\[\s*(?:(-?\d{1,18})(%?))?\s*:\s*(?:(-?\d{1,18})(%?))?\s*\])?\s*"
)


def _open_split(split: str, splits: Splits) -> Source:
    parts = [_PART.fullmatch(text) for text in split.split("+")]
    if any(part is None or part[1] not in splits for part in parts):
        known = ", ".join(map(repr, splits))
        raise UserError(
            f"unknown split {split!r}: this data set has {known}; parts are written like "
            "'train[:98%]' or 'train[100:200]', sums like 'train[:10%]+train[90%:]'"
        )
    opened = {part[1]: splits[part[1]]() for part in parts if part}
    chosen = []
    for part in parts:
        assert part is not None
        whole = opened[part[1]]
        start, stop = (_boundary(part[i], part[i + 1], len(whole)) for i in (2, 4))
        indices = range(len(whole))[start:stop]
        if not indices:
            raise UserError(
                f"split {part[0].strip()!r} is empty: {part[1]!r} has {len(whole)} pictures; "
                "choose a larger part"
            )
        chosen.append(whole.take(indices) if len(indices) < len(whole) else whole)
    if len(chosen) == 1:
        return chosen[0]
    keys = [key for source in chosen for key in source.keys]
    label_ids = np.concatenate([source.label_ids for source in chosen])
    return replace(chosen[0], keys=keys, label_ids=label_ids)


def _boundary(number: str | None, percent: str | None, length: int) -> int | None:
    if number is None:
        return None
    return round(int(number) * length / 100) if percent else int(number)


# The digits that come with the package; see digits.md.


def _digits(seed: int) -> Splits:
    del seed  # their split is fixed
    path = resources.files("vit_jax.data") / "digits.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels, test = arrays["images"], arrays["labels"], arrays["test"]
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
    pixels.setflags(write=False)
    whole = Source(
        name="digits",
        labels=tuple("0123456789"),
        channels=1,
        keys=range(len(pixels)),
        label_ids=labels.astype(np.int32),
        read_key=pixels.__getitem__,
        describe_key="digits[{}]".format,
    )
    return {
        "train": lambda: whole.take(np.flatnonzero(~test)),
        "test": lambda: whole.take(np.flatnonzero(test)),
    }


_DATASETS: dict[str, Callable[[int], Splits]] = {"digits": _digits}
