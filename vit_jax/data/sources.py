"""Where labelled images come from: names, folders, tables, prepared data sets, arrays.

To add a kind of source, write a function that gives `{split name: function that opens it}`, and
call it in `open_splits`.
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
    """Labelled images, read one by one; `source[i]` may be called by many threads at once.

    Attributes:
      name: what the user called the data set.
      labels: class names; a label is an index into them.
      channels: colour channels of every image.
      keys: one an image, naming it independently of where the data set lies; an array where
        there may be millions.
      label_ids: int32 array (n,); where an image may have several labels (n, k), filled up with
        -1. None where labels are stored with the images and only reading them tells.
      read_key: key -> uint8 image (h, w, channels), or the content of an image file; where
        `label_ids` is None, a pair of that and the label or labels. Raises UserError if it can't
        be read.
      describe_key: key -> what a person calls the image, e.g. its path.
      multi_label: whether an image may have several labels, or none.
      identity: tells these images from others with the same keys and labels.
    """

    name: str
    labels: tuple[str, ...]
    channels: int
    keys: Sequence[Any] | np.ndarray
    label_ids: np.ndarray | None
    read_key: Callable[[Any], Any]
    describe_key: Callable[[Any], str]
    multi_label: bool = False
    identity: Callable[[], str] = str

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 (h, w, channels), "label": int}; UserError if it can't be read.

        With `multi_label` the label is float32 (classes,), 1 for each class of the image.
        """
        return self.example(index)

    def example(self, index: int, part: Callable | None = None) -> dict[str, Any]:
        """The same, with just a part of the image; see `images.decode`."""
        stored, label = self.stored(index)
        return {"image": self.decode(stored, index, part), "label": self.label(label)}

    def stored(self, index: int) -> tuple[bytes | np.ndarray, Any]:
        """The image as it is kept, the content of a file or pixels, and its label or labels."""
        if self.label_ids is None:
            return self.read_key(self.keys[index])
        return self.read_key(self.keys[index]), self.label_ids[index]

    def decode(
        self, stored: bytes | np.ndarray, index: int, part: Callable | None = None
    ) -> np.ndarray:
        """Pixels of what `stored` gave, uint8 (h, w, channels), or of a part of them."""
        return self.opened(stored, index, part)()

    def opened(
        self, stored: bytes | np.ndarray, index: int, part: Callable | None = None
    ) -> Callable[[], np.ndarray]:
        """What is left to do of `decode`; see `images.opened`."""
        if isinstance(stored, bytes):
            from vit_jax.data import images  # loads OpenCV

            name = self.describe(index)
            return images.opened(stored, channels=self.channels, name=name, part=part)
        if part:
            top, left, height, width = part(stored.shape[:2])
            stored = stored[top : top + height, left : left + width]
        return lambda: stored

    def label(self, stored: Any) -> Any:
        """The label of a batch for the one or several that `stored` gave."""
        return self._multi_hot(stored) if self.multi_label else int(stored)

    def describe(self, index: int) -> str:
        """Names image `index` for a person: a path, or "digits[12]"."""
        return self.describe_key(self.keys[index])

    def take(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """The images at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        keys: Any = self.keys
        if isinstance(keys, range | np.ndarray):  # a number takes a quarter of Python's room so
            keys = np.asarray(keys)[chosen]
        else:
            keys = [keys[i] for i in indices]
        ids = None if self.label_ids is None else self.label_ids[chosen]
        return replace(self, keys=keys, label_ids=ids)

    def _multi_hot(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        hot = np.zeros(len(self.labels), np.float32)
        hot[[i for i in ids if i >= 0]] = 1
        return hot


Splits = dict[str, Callable[[], Source]]


def open_source(
    dataset: str, split: str, *, seed: int = 0, data_dir: str = "", manual_dir: str = ""
) -> Source:
    """Opens a part of a data set.

    Args:
      dataset: see `open_splits`.
      split: "train", "test", "train[:98%]", "train[100:200]", "even_splits(train, 4)[0]",
        "train+test", ... Percentages are rounded to the nearest image, so "train[:98%]" and
        "train[98%:]" share none and miss none.
      seed, data_dir, manual_dir: see `open_splits`.

    Raises:
      UserError: unknown data set or split, or one that isn't as `open_splits` says.
    """
    return _open_split(dataset, split, open_splits(dataset, seed, data_dir, manual_dir))


def open_splits(dataset: str, seed: int = 0, data_dir: str = "", manual_dir: str = "") -> Splits:
    """The parts of a data set by name, each to be opened by a call.

    "test" is also there where only "validation" or "val" is.

    Args:
      dataset: "digits"; a folder DIR/{train,test}/<class>/* or DIR/<class>/*; a table FILE.csv or
        FILE.jsonl, or a folder with train.csv and test.csv; a TFDS name such as "cifar10" or
        "name/config:version", or the folder of a prepared TFDS data set; FILE.npz; a folder that
        Hugging Face's `save_to_disk` wrote.
      seed: chooses the fifth that becomes the test split of what has no splits of its own.
      data_dir: where TFDS keeps its data sets, by default ~/tensorflow_datasets.
      manual_dir: where TFDS finds what had to be downloaded by hand.
    """
    path = os.path.expanduser(dataset)
    if is_known(dataset):
        splits = _DATASETS[dataset](seed)
    elif path.lower().endswith((".csv", ".jsonl", ".npz")) and os.path.isfile(path):
        if path.lower().endswith(".npz"):
            from vit_jax.data.arrays import array_splits

            splits = array_splits(dataset, seed)
        else:
            from vit_jax.data.tables import table_splits

            splits = table_splits(dataset, seed)
    elif os.path.isdir(path):
        splits = _folder(dataset, path, seed)
    elif os.path.exists(path):
        raise UserError(
            f"{dataset}: can't be opened, expected a folder, .csv, .jsonl or .npz; give one of them"
        )
    elif re.fullmatch(r"[a-zA-Z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", dataset):
        from vit_jax.data.tfds import named_splits

        splits = named_splits(dataset, data_dir, manual_dir)
    else:
        raise unknown_dataset(dataset, ())
    held_out = [name for name in ("validation", "val") if name in splits]
    if held_out:
        splits.setdefault("test", splits[held_out[0]])
    return splits


def is_known(dataset: str) -> bool:
    """Whether a data set is known by this name, so that it isn't a folder."""
    return dataset in _DATASETS


def _folder(dataset: str, path: str, seed: int) -> Splits:
    """What lies in a folder: its files tell."""
    try:
        names = set(os.listdir(path))
    except OSError as error:
        raise UserError(f"{dataset}: can't be opened ({error.strerror})") from None
    if names & {"dataset_dict.json", "state.json"}:
        from vit_jax.data.huggingface import saved_splits

        return saved_splits(dataset, seed)
    if any(re.fullmatch(r"dataset_info\.json|\d+\.\d+\.\d+", name) for name in names):
        from vit_jax.data.tfds import prepared_splits

        return prepared_splits(dataset)
    if names & {"train.csv", "train.jsonl", "test.csv", "test.jsonl"}:
        from vit_jax.data.tables import table_splits

        return table_splits(dataset, seed)
    from vit_jax.data.folders import folder_splits

    return folder_splits(dataset, seed)


def unknown_dataset(dataset: str, names: Sequence[str]) -> UserError:
    """The error for a data set that is neither there nor among the `names` of TFDS."""
    close = difflib.get_close_matches(dataset, [*_DATASETS, *names], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UserError(
        f"unknown dataset {dataset!r}: there is no such folder or file, and neither 'digits' nor "
        f"TFDS has that name; give the path of a folder of images, a .csv, .jsonl or .npz{hint}"
    )


def data_fingerprint(source: Source) -> str:
    """16 hex digits that change with the class names, the images' names, order or labels.

    Nothing is read, so an image with another content under the same name goes unnoticed.
    """
    digest = hashlib.sha256()
    for text in itertools.chain(source.labels, [""], map(str, source.keys)):
        digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
    if source.label_ids is not None:
        digest.update(source.label_ids.astype("<i4").tobytes())
    digest.update(source.identity().encode())
    return digest.hexdigest()[:16]


# Splits.

_SLICE = r"(\w+)\s*(?:\[\s*(?:(-?\d{1,18})(%?))?\s*:\s*(?:(-?\d{1,18})(%?))?\s*\])?"
_PART = re.compile(rf"\s*{_SLICE}\s*")
_EVEN = re.compile(rf"\s*even_splits\(\s*({_SLICE})\s*,\s*(\d{{1,9}})\s*\)\s*\[(\d{{1,9}})\]\s*")


def _open_split(dataset: str, split: str, splits: Splits) -> Source:
    opened: dict[str, Source] = {}
    parts = split.split("+")
    chosen = [_open_part(dataset, part, split, splits, opened) for part in parts]
    if len(chosen) == 1:
        return chosen[0]
    keys = [key for source in chosen for key in source.keys]
    if chosen[0].label_ids is None:
        return replace(chosen[0], keys=keys)
    return replace(
        chosen[0], keys=keys, label_ids=np.concatenate([source.label_ids for source in chosen])
    )


def _open_part(
    dataset: str, text: str, split: str, splits: Splits, opened: dict[str, Source]
) -> Source:
    even = _EVEN.fullmatch(text)
    part = _PART.fullmatch(even[1] if even else text)
    count, place = (int(even[7]), int(even[8])) if even else (1, 0)
    known, first = ", ".join(map(repr, splits)), next(iter(splits))
    if part and part[1] in ("train", "test") and part[1] not in splits:
        is_folder = os.path.isdir(os.path.expanduser(dataset))
        missing = f"the folder {os.path.join(dataset, part[1])}" if is_folder else "them"
        raise UserError(
            f"{dataset} has no {part[1]!r} images, only {known}: add {missing}, or choose splits "
            f"of what is there, like '{first}[:80%]' to train on and '{first}[80%:]' to test on"
        )
    if part is None or part[1] not in splits or place >= count:
        raise UserError(
            f"unknown split {split!r}: {dataset} has {known}; parts are written like "
            "'train[:98%]', 'train[100:200]' or 'even_splits(train, 4)[0]', sums like "
            "'train[:10%]+train[90%:]'"
        )
    if part[1] not in opened:
        opened[part[1]] = splits[part[1]]()
    whole = opened[part[1]]
    start, stop = (_boundary(part[i], part[i + 1], len(whole)) for i in (2, 4))
    indices = range(len(whole))[start:stop]
    # As TFDS cuts them: of what can't be shared out evenly, the first parts get one more each.
    share, more = divmod(len(indices), count)
    begin = place * share + min(place, more)
    indices = indices[begin : begin + share + (place < more)]
    # Of a folder with an image or two a class there is nothing to hold out, nor to miss.
    if not indices and ("+" not in split or len(whole)):
        raise UserError(
            f"split {text.strip()!r} is empty: {part[1]!r} has {len(whole)} images; "
            "choose a larger part, or add images"
        )
    return whole.take(indices) if len(indices) < len(whole) else whole


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
