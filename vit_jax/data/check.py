"""Looks at every image before training: what can't be read, what is there twice, what sizes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from vit_jax.data.cores import own_cores
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

_BLOCK = 64  # images that a thread takes at once


class Image(NamedTuple):
    """An image: the split it is in, what it is called, its class or classes."""

    split: str
    name: str
    label: str


@dataclass(frozen=True)
class CheckedSplit:
    """What was found in one split.

    Attributes:
      count: images, those that can't be read included.
      unreadable: of each, why it can't be read; the text names it.
      class_counts: int64 (classes,), the readable images of each class.
      sizes: int32 (readable, 2), height and width in pixels.
      channels: number of channels: how many images have it.
      grey: how many images of 3 channels have three equal ones.
    """

    count: int
    unreadable: list[str]
    class_counts: np.ndarray
    sizes: np.ndarray
    channels: dict[int, int]
    grey: int


@dataclass(frozen=True)
class Check:
    """What was found in a data set.

    Attributes:
      labels: class names.
      splits: by name.
      identical: groups of images whose pixels, as decoded, are all the same.
    """

    labels: tuple[str, ...]
    splits: dict[str, CheckedSplit]
    identical: list[list[Image]]

    @cached_property
    def leaks(self) -> list[list[Image]]:
        """Groups of identical images that lie in several splits."""
        return [group for group in self.identical if len({p.split for p in group}) > 1]

    @cached_property
    def contradictions(self) -> list[list[Image]]:
        """Groups of identical images of different classes."""
        return [group for group in self.identical if len({p.label for p in group}) > 1]

    def duplicates(self, split: str) -> int:
        """How many images of a split are there already, under another name."""
        counts = (sum(p.split == split for p in group) for group in self.identical)
        return sum(count - 1 for count in counts if count > 1)

    @property
    def problems(self) -> list[str]:
        """What training would suffer from, a line each."""
        found = []
        for name, split in self.splits.items():
            if split.unreadable:
                found.append(f"{count_of(len(split.unreadable))} of {name} can't be read")
            empty = [self.labels[i] for i in np.flatnonzero(split.class_counts == 0)]
            if empty and name.startswith("train"):
                found.append(f"{name} has no image of {_shortened(empty)}")
        if self.leaks:
            found.append(f"{count_of(len(self.leaks))} found in several splits")
        if self.contradictions:
            found.append(f"{count_of(len(self.contradictions))} found under several classes")
        return found


def check(
    sources: Mapping[str, Source],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Check:
    """Reads and decodes every image.

    Memory: the images in the works, and some 60 bytes for each one that was read.

    Args:
      sources: splits by name, of one data set.
      threads: that read and decode; by default one a core, 16 at most.
      progress: called with the numbers of images done and of all.
    """
    threads = min(own_cores(), 16) if threads is None else threads
    total = sum(map(len, sources.values()))
    splits: dict[str, CheckedSplit] = {}
    digests, places, labels = [], [], []
    done = 0
    for number, (name, source) in enumerate(sources.items()):
        blocks = [range(i, min(i + _BLOCK, len(source))) for i in range(0, len(source), _BLOCK)]
        result = _Result(len(source), len(source.labels))
        pool = ThreadPoolExecutor(threads)
        try:
            for block, seen in zip(blocks, pool.map(partial(_look, source), blocks), strict=True):
                result.add(block, seen)
                done += len(block)
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        splits[name] = result.finished()
        read = np.flatnonzero(result.read)
        digests.append(result.digests[read])
        labels += [result.labels[i] for i in read]
        places.append(np.stack([np.full_like(read, number), read], axis=1))
    names = next(iter(sources.values())).labels
    where = np.concatenate(places)

    def image(i: int) -> Image:
        split = list(sources)[where[i, 0]]
        label = ";".join(names[id_] for id_ in labels[i]) or "no class"
        return Image(split, sources[split].describe(int(where[i, 1])), label)

    groups = _equal(np.concatenate(digests))
    return Check(names, splits, [[image(i) for i in group] for group in groups])


def _equal(values: np.ndarray) -> list[np.ndarray]:
    """The indices of each value that is there several times."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, values[order][1:] != values[order][:-1]])
    groups = np.split(order, starts[1:])
    return sorted((g for g in groups if len(g) > 1), key=lambda group: group[0])


class _Seen(NamedTuple):
    shape: tuple[int, int, int]
    grey: bool
    digest: bytes
    labels: tuple[int, ...]


def _look(source: Source, indices: Iterable[int]) -> list[_Seen | str]:
    """What is to be known of some images, or why they can't be read."""
    seen: list[_Seen | str] = []
    for index in indices:
        try:
            example = source[index]
        except UserError as error:
            seen.append(str(error))
            continue
        image, label = np.ascontiguousarray(example["image"]), example["label"]
        digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
        digest.update(image.data)
        ids = (label,) if np.ndim(label) == 0 else tuple(np.flatnonzero(label).tolist())
        seen.append(_Seen(image.shape, _is_grey(image), digest.digest(), ids))
    return seen


def _is_grey(image: np.ndarray) -> bool:
    # A few pixels tell of most images that they are coloured.
    return image.shape[2] == 3 and all(
        (part == part[..., :1]).all() for part in (image[::16, ::16], image)
    )


class _Result:
    """Collects what was seen of a split's images, in little memory."""

    def __init__(self, count: int, classes: int):
        self.read = np.zeros(count, bool)
        self.digests = np.zeros(count, "S16")
        self.labels: list[tuple[int, ...]] = [()] * count
        self._labels: dict[tuple[int, ...], tuple[int, ...]] = {}  # each but once in memory
        self._sizes = np.zeros((count, 2), np.int32)
        self._class_counts = np.zeros(classes, np.int64)
        self._channels: Counter[int] = Counter()
        self._grey = 0
        self._unreadable: list[str] = []

    def add(self, indices: Sequence[int], seen: Sequence[_Seen | str]) -> None:
        for index, one in zip(indices, seen, strict=True):
            if isinstance(one, str):
                self._unreadable.append(one)
                continue
            self.read[index] = True
            self.digests[index] = one.digest
            self.labels[index] = self._labels.setdefault(one.labels, one.labels)
            self._sizes[index] = one.shape[:2]
            self._class_counts[list(one.labels)] += 1
            self._channels[one.shape[2]] += 1
            self._grey += one.grey

    def finished(self) -> CheckedSplit:
        return CheckedSplit(
            count=len(self.read),
            unreadable=self._unreadable,
            class_counts=self._class_counts,
            sizes=self._sizes[self.read],
            channels=dict(self._channels),
            grey=self._grey,
        )


def count_of(number: int, thing: str = "image", plural: str = "s") -> str:
    """A number of things, e.g. "1 image", "1,200 images"."""
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _shortened(names: Sequence[str], shown: int = 5) -> str:
    rest = f" and {len(names) - shown:,} more classes" if len(names) > shown else ""
    return ", ".join(map(repr, names[:shown])) + rest
