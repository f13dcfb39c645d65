"""Where labelled pictures come from: data sets known by name, and folders of pictures.

A source knows its labels without decoding anything. To add one, write a function
`seed -> {split name: function that opens it}` and put it in `_DATASETS`.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from vit_jax.errors import UserError

TEST_FRACTION = 0.2  # of each class, where a folder brings no test pictures of its own
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Source:
    """Labelled pictures, read one by one; `source[i]` may be called by many threads at once.

    Attributes:
      name: what the user called the data set.
      labels: class names; a label is an index into them.
      channels: colour channels of every picture.
      keys: one a picture, naming it independently of where the data set lies.
      label_ids: int32 array (n,).
      read_key: key -> uint8 picture (h, w, channels); raises UserError if it can't be read.
      describe_key: key -> what a person calls the picture, e.g. its path.
    """

    name: str
    labels: tuple[str, ...]
    channels: int
    keys: Sequence[Any]
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
        keys = [self.keys[i] for i in indices]
        return replace(self, keys=keys, label_ids=self.label_ids[np.asarray(indices, np.int64)])


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
    if is_known(dataset):
        splits = _DATASETS[dataset](seed)
    elif os.path.exists(os.path.expanduser(dataset)):
        splits = _folder_splits(dataset, seed)
    else:
        close = difflib.get_close_matches(dataset, _DATASETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(map(repr, _DATASETS))
        raise UserError(
            f"unknown dataset {dataset!r}: there is no such folder, and the known names are "
            f"{known}; give one of them or the path of a folder of pictures{hint}"
        )
    return _open_split(dataset, split, splits)


def is_known(dataset: str) -> bool:
    """Whether a data set is known by this name, so that it isn't a folder."""
    return dataset in _DATASETS


def data_fingerprint(source: Source) -> str:
    """16 hex digits that change with the class names, the pictures' names, order or labels.

    Nothing is read, so a picture with another content under the same name goes unnoticed.
    """
    digest = hashlib.sha256()
    for text in (*source.labels, "", *map(str, source.keys)):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
    digest.update(source.label_ids.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


# Splits.

_PART = re.compile(
    r"\s*(\w+)\s*(?:\[\s*(?:(-?\d{1,18})(%?))?\s*:\s*(?:(-?\d{1,18})(%?))?\s*\])?\s*"
)


def _open_split(dataset: str, split: str, splits: Splits) -> Source:
    parts = [_PART.fullmatch(text) for text in split.split("+")]
    known, first = ", ".join(map(repr, splits)), next(iter(splits))
    for part in parts:
        if part and part[1] in ("train", "test") and part[1] not in splits:
            raise UserError(
                f"{dataset} has no {part[1]!r} pictures, only {known}: add the folder "
                f"{os.path.join(dataset, part[1])}, or choose splits of what is there, like "
                f"'{first}[:80%]' to train on and '{first}[80%:]' to test on"
            )
    if any(part is None or part[1] not in splits for part in parts):
        raise UserError(
            f"unknown split {split!r}: {dataset} has {known}; parts are written like "
            "'train[:98%]' or 'train[100:200]', sums like 'train[:10%]+train[90%:]'"
        )
    opened = {part[1]: splits[part[1]]() for part in parts if part}
    chosen = []
    for part in parts:
        assert part is not None
        whole = opened[part[1]]
        start, stop = (_boundary(part[i], part[i + 1], len(whole)) for i in (2, 4))
        indices = range(len(whole))[start:stop]
        # Of a folder with a picture or two a class there is nothing to hold out, nor to miss.
        if not indices and (len(parts) == 1 or len(whole)):
            raise UserError(
                f"split {part[0].strip()!r} is empty: {part[1]!r} has {len(whole)} pictures; "
                "choose a larger part, or add pictures"
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


# Folders of pictures.


def _folder_splits(dataset: str, seed: int) -> Splits:
    root = os.path.expanduser(dataset)
    folders, files = _list(root)
    # A folder called "train" is the training part if it holds folders; else it's a class of trains.
    parts = [name for name in ("train", "test", "validation", "val") if name in folders]
    parts = [name for name in parts if _list(os.path.join(root, name))[0]]
    if parts and ("train" in parts or set(parts) == set(folders)):
        labels = tuple(_list(os.path.join(root, parts[0]))[0])
        splits: Splits = {p: partial(_scan, dataset, root, p, labels) for p in parts}
        held_out = [name for name in parts if name != "train"]
        if held_out:
            splits.setdefault("test", splits[held_out[0]])
        return splits
    if not folders:
        raise UserError(
            f"{dataset}: no class folders (found {files} pictures and no folder), expected "
            f"{dataset}/<class>/*.jpg or {dataset}/train/<class>/*.jpg"
        )
    open_whole = partial(_scan, dataset, root, "", tuple(folders))
    return {
        "train": lambda: _stratified(open_whole(), seed, test=False),
        "test": lambda: _stratified(open_whole(), seed, test=True),
    }


def _scan(dataset: str, root: str, part: str, labels: tuple[str, ...]) -> Source:
    """Lists the pictures below root/part, class by class, without reading them."""
    where = os.path.join(dataset, part) if part else dataset
    folders = _list(os.path.join(root, part))[0]
    ids_of = {name: i for i, name in enumerate(labels)}
    for name in folders:
        if name not in ids_of:
            raise UserError(
                f"{where}: class {name!r} is not among the training classes; rename its folder or "
                "add training pictures"
            )
    if len(labels) == 1:
        raise UserError(
            f"{where}: only one class ({labels[0]!r}), expected two folders or more, one a class"
        )
    keys: list[str] = []
    ids: list[int] = []
    for name in folders:
        found = sorted(_pictures(root, f"{part}/{name}" if part else name))
        if not found:
            raise UserError(
                f"{os.path.join(where, name)}: no pictures in this class folder, expected files "
                f"ending in {', '.join(EXTENSIONS)}; add some or remove the folder"
            )
        keys += found
        ids += [ids_of[name]] * len(found)
    return Source(
        name=dataset,
        labels=labels,
        channels=3,
        keys=keys,
        label_ids=np.array(ids, np.int32),
        read_key=partial(_read_file, root),
        describe_key=partial(os.path.join, root),
    )


def _read_file(root: str, key: str) -> np.ndarray:
    from vit_jax.data import pictures  # loads OpenCV

    return pictures.read(os.path.join(root, key))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder}: can't be opened ({error.strerror}), expected a readable folder of pictures"
        ) from None


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _list(folder: str) -> tuple[list[str], int]:
    """The sorted names of the folders in a folder, and how many pictures lie beside them."""
    entries = _entries(folder)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    return folders, sum(_is_picture(entry.name) for entry in entries)


def _pictures(root: str, folder: str) -> list[str]:
    """Paths of the pictures below a class folder, relative to root, with "/" on every system."""
    found = []
    for entry in _entries(os.path.join(root, folder)):
        # Links to folders are followed to a class, not below it: they may lead in a circle.
        if entry.is_dir(follow_symlinks=False):
            found += _pictures(root, f"{folder}/{entry.name}")
        elif _is_picture(entry.name):
            found.append(f"{folder}/{entry.name}")
    return found


def _stratified(whole: Source, seed: int, *, test: bool) -> Source:
    """Holds a fifth of each class out, chosen by a hash of (seed, relative path).

    A hash, not a random generator, so that the split is the same under every version of NumPy.
    """
    ranks = [
        hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()
        for key in whole.keys
    ]
    held_out = np.zeros(len(whole), bool)
    for label in range(len(whole.labels)):
        members = np.flatnonzero(whole.label_ids == label)
        count = round(TEST_FRACTION * len(members))
        held_out[sorted(members, key=ranks.__getitem__)[:count]] = True
    return whole.take(np.flatnonzero(held_out == test))
