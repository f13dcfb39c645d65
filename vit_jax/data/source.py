"""Labelled images, read one by one, whatever they are kept in."""

import hashlib
import itertools
import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.escape import printable

TEST_FRACTION = 0.2  # of each class, where a data set brings no test images of its own
HELD_OUT = "no test split of its own: a fifth of the images is held out for testing"
# Of more classes an image than this, numbers up to the largest are no classes but something else.
MOST_CLASSES_PER_IMAGE = 100
# What folders, tables and their rows call a split, as "Training", "valid" or "test_set".
_SPLIT = re.compile(
    r"(?:(train(?:ing)?)|(test(?:ing)?)|(val)|(valid(?:ation)?|dev(?:elopment)?|eval(?:uation)?"
    r"|hold[-_ ]?out))(?:[-_ ]?(?:set|data|images))?"
)


@dataclass(frozen=True)
class Source:
    """Labelled images, read one by one; `source[i]` may be called by many threads at once.

    Attributes:
      name: what the user called the data set.
      labels: class names, made printable; a label is an index into them.
      channels: channels of every image.
      keys: one an image, naming it independently of where the data set lies; an array where
        there may be millions.
      label_ids: int32 array (n,); where an image may have several labels (n, k), filled up with
        -1. None where labels are stored with the images and only reading them tells.
      read_key: key -> image (h, w, channels), or the content of an image file; where
        `label_ids` is None, a pair of that and the label or labels. Raises UserError if it can't
        be read.
      describe_key: key -> what a person calls the image, e.g. its path.
      multi_label: whether an image may have several labels, or none.
      identity: tells these images from others with the same keys and labels.
      notes: what was done to find these images that a person should know, a text each.
      doubts: the same, of what training may suffer from.

    Raises UserError for a class named twice, or fewer than two (one, with several labels an image).
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
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))
        for field in ("labels", "notes", "doubts"):
            object.__setattr__(self, field, tuple(map(printable, getattr(self, field))))
        labels = self.labels
        if len(labels) < (1 if self.multi_label else 2):
            only = f"only one class ({labels[0]!r})" if labels else "no class"
            raise UserError(f"{self.name}: {only}, expected two or more; add images of others")
        if len(set(labels)) < len(labels):
            label, count = Counter(labels).most_common(1)[0]
            raise UserError(
                f"{self.name}: {count} classes are named {label!r}, expected a name for each; "
                "rename or merge them"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": (h, w, channels), "label": int}; UserError if it can't be read.

        With `multi_label` the label is float32 (classes,), 1 for each class of the image.
        """
        stored, label = self.stored(index)
        return {"image": self.decode(stored, index), "label": self.label(label)}

    def stored(self, index: int) -> tuple[bytes | np.ndarray, Any]:
        """The image as it is kept, the content of a file or pixels, and its label or labels."""
        if self.label_ids is None:
            return self.read_key(self.keys[index])
        return self.read_key(self.keys[index]), self.label_ids[index]

    def decode(
        self, stored: bytes | np.ndarray, index: int, remarks: list[str] | None = None
    ) -> np.ndarray:
        """The pixels of what `stored` gave, (h, w, channels); see `images.decode`."""
        if not isinstance(stored, bytes):
            return stored
        from vit_jax.data import images  # Loads OpenCV.

        name = self.describe(index)
        return images.decode(stored, channels=self.channels, name=name, remarks=remarks)

    def label(self, stored: Any) -> Any:
        """The label of a batch for the one or several that `stored` gave."""
        if not self.multi_label:
            return int(stored)
        hot = np.zeros(len(self.labels), np.float32)
        hot[[i for i in stored if i >= 0]] = 1
        return hot

    def describe(self, index: int) -> str:
        """Names image `index` for a person: a path made printable, or "digits[12]"."""
        return printable(self.describe_key(self.keys[index]))

    def take(self, indices: Sequence[int] | np.ndarray) -> "Source":
        """The images at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        keys: Any = self.keys
        if isinstance(keys, range | np.ndarray):  # An array takes a quarter of a list's memory.
            keys = np.asarray(keys)[chosen]
        else:
            keys = [keys[i] for i in indices]
        ids = None if self.label_ids is None else self.label_ids[chosen]
        return replace(self, keys=keys, label_ids=ids)


Splits = dict[str, Callable[[], Source]]  # What opens each split, by its name.


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


def held_out_splits(
    open_whole: Callable[[], Source], seed: int, groups: Sequence[str] | None = None
) -> Splits:
    """Holds a fifth of each class out for testing, chosen by a hash of (seed, key).

    A hash, not a random generator, so that the split is the same under every version of NumPy.

    Args:
      groups: a name for each image; those with the same one stay together, so that it is about a
        fifth. By default each image is a group of its own, named by its key.
    """

    def part(test: bool) -> Source:
        whole = open_whole()
        ranks = [
            hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
            for name in (whole.keys if groups is None else groups)
        ]
        # With several labels an image there are no classes to share out.
        label_ids = np.zeros(len(whole), int) if whole.multi_label else whole.label_ids
        assert label_ids is not None
        held_out = np.zeros(len(whole), bool)
        if groups is None:
            for label in range(1 if whole.multi_label else len(whole.labels)):
                members = np.flatnonzero(label_ids == label)
                count = round(TEST_FRACTION * len(members))
                held_out[sorted(members, key=ranks.__getitem__)[:count]] = True
        else:
            wanted = np.round(TEST_FRACTION * np.bincount(label_ids)).astype(int)
            together = defaultdict(list)
            for i, rank in enumerate(ranks):
                together[rank].append(i)
            for _, same in sorted(together.items()):
                counts = np.bincount(label_ids[same], minlength=len(wanted))
                # Taken if that leaves less missing, or too much, than there is missing now.
                if 2 * np.minimum(counts, wanted).sum() >= len(same):
                    held_out[same] = True
                    wanted = np.maximum(wanted - counts, 0)
        return replace(whole.take(np.flatnonzero(held_out == test)), notes=(*whole.notes, HELD_OUT))

    return {"train": lambda: part(test=False), "test": lambda: part(test=True)}


def split_name(text: str) -> str:
    """The split that a folder, a table or a row means by its name, in any case of letters: train,
    test, validation or val; "" if none."""
    if match := _SPLIT.fullmatch(text.strip().casefold()):
        return ("train", "test", "val", "validation")[(match.lastindex or 1) - 1]
    return ""


def similar_labels(labels: Sequence[str]) -> list[str]:
    """A text for each set of classes whose names may well mean the same one."""
    alike = defaultdict(list)
    for label in labels:
        plain = unicodedata.normalize("NFC", label.removesuffix(".0")).casefold()
        alike[re.sub(r"[\s_]+", " ", plain).strip()].append(repr(label))
    found = [
        f"classes {' and '.join(names)} are nearly named alike: merge them if they are one"
        for names in alike.values()
        if len(names) > 1
    ]
    return found[:5] + [f"and {len(found) - 5:,} more such classes"] * (len(found) > 5)


def remarks(*sources: Source) -> list[str]:
    """What to say of how the images of some splits were found, and what is odd about them; the
    first split is the one to train on."""
    said = [text for source in sources for text in (*source.notes, *source.doubts)]
    train = sources[0]
    said += similar_labels(train.labels)
    if train.label_ids is not None:
        counts = np.bincount(train.label_ids[train.label_ids >= 0], minlength=len(train.labels))
        if empty := [train.labels[i] for i in np.flatnonzero(counts == 0)]:
            said.append(f"without an image to train on: {some_of(empty)}")
    return list(dict.fromkeys(said))


def some_of(names: Sequence[str], limit: int = 5) -> str:
    """A few of some names, quoted, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def numbered_classes(name: str, count: int, images: int) -> tuple[str, ...]:
    """The names "0", "1", ... of so many classes. Raises UserError for absurdly many."""
    if count > MOST_CLASSES_PER_IMAGE * images:
        raise UserError(
            f"{name}: labels count to {count - 1:,} for {images:,} images, expected 0 to the "
            "number of classes - 1; number the classes anew, or give the names of all"
        )
    return tuple(map(str, range(count)))


class Numbering:
    """Numbers the examples of all splits of a data set, so that splits can be added up."""

    def __init__(self, name: str, lengths: Mapping[str, int]):
        self.name, self.splits = name, list(lengths)
        self._starts: list[int] = np.cumsum([0, *lengths.values()]).tolist()

    def keys(self, split: str) -> range:
        """The numbers of a split's examples."""
        place = self.splits.index(split)
        return range(self._starts[place], self._starts[place + 1])

    def find(self, key: int) -> tuple[str, int]:
        """The split of an example, and its place in there."""
        place = bisect_right(self._starts, key) - 1
        return self.splits[place], int(key) - self._starts[place]

    def describe(self, key: int) -> str:
        """As "cifar10 test[12]"."""
        split, place = self.find(key)
        return f"{self.name} {split}".rstrip() + f"[{place}]"
