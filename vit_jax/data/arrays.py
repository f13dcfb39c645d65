"""Images in memory: NumPy arrays, and .npz files of them."""

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data.folders import held_out_splits
from vit_jax.data.sources import Source, Splits
from vit_jax.errors import UserError

Images = np.ndarray | Sequence[np.ndarray]


def from_arrays(
    images: Images,
    labels: Any,
    *,
    names: Sequence[str] | None = None,
    name: str = "arrays",
) -> Source:
    """A source of images in memory, or in a `np.memmap`; they are not copied.

    Args:
      images: uint8 (n, h, w), (n, h, w, 1) or (n, h, w, 3), or a sequence of such images of
        various sizes.
      labels: (n,) class numbers or class names; or (n, classes) of 0 and 1, several an image.
      names: of the classes, by number; by default the sorted names, or "0", "1", ...
      name: what errors call the source.

    Raises UserError if these don't fit together.
    """
    return _source(name, [("", images)], 0, labels, names)


def array_splits(dataset: str, seed: int) -> Splits:
    """The parts of an .npz file.

    It holds `SPLIT_images` and `SPLIT_labels` for each split, or `images` and `labels`, of which a
    fifth is held out; and `names` of the classes if they have any.
    """
    try:
        with np.load(os.path.expanduser(dataset), allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for what is damaged
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(
            f"{dataset}: can't be read ({reason}), expected an .npz of arrays"
        ) from None
    found = [match[1] for key in arrays if (match := re.fullmatch(r"(?:(\w+)_)?images", key))]
    if not found:
        raise UserError(
            f"{dataset}: holds {', '.join(arrays) or 'nothing'}, expected train_images, "
            "train_labels, test_images, test_labels or images, labels"
        )
    found.sort(key=lambda split: (split != "train", split or ""))
    labels = {}
    for split in found:
        key = f"{split}_labels" if split else "labels"
        if key not in arrays:
            raise UserError(f"{dataset}: no {key} beside {key[:-6]}images; add them")
        labels[split] = arrays[key]
    names = arrays.get("names")
    if names is None and labels[found[0]].size:
        names = _class_names(dataset, labels[found[0]])
    parts = [(split or "", arrays[f"{split}_images" if split else "images"]) for split in found]
    sources = {
        split: _source(dataset, parts, place, labels[split], names)
        for place, split in enumerate(found)
    }
    if None in sources:
        return held_out_splits(partial(sources.__getitem__, None), seed)
    return {split: partial(sources.__getitem__, split) for split in sources}


def _source(
    name: str, parts: list[tuple[str, Images]], place: int, labels: Any, names: Any
) -> Source:
    """The source of one of several parts, whose keys go on where those of the last part end."""
    images = parts[place][1]
    shape = np.shape(labels)
    if len(shape) not in (1, 2) or 0 in shape[1:] or not np.iterable(images):
        raise UserError(
            f"{name}: labels of shape {shape}, expected (n,) or (n, classes), and n images"
        )
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"{name}: {len(images)} images and {len(labels)} labels, expected one for each"
        )
    channels = _channels(name, images)
    names = tuple(str(n) for n in (_class_names(name, labels) if names is None else names))
    label_ids = _label_ids(name, labels, names)
    starts = np.cumsum([0, *(len(part) for _, part in parts)]).tolist()
    return Source(
        name=name,
        labels=names,
        channels=channels,
        keys=range(starts[place], starts[place + 1]),
        label_ids=label_ids,
        read_key=partial(_image, [part for _, part in parts], starts),
        describe_key=partial(_describe, name, [split for split, _ in parts], starts),
        multi_label=label_ids.ndim == 2,
        identity=partial(_digest, images),
    )


def _channels(name: str, images: Images) -> int:
    examples = images[:1] if isinstance(images, np.ndarray) else images
    shapes: set[tuple] = {
        (image.shape[2:] or (1,)) if image.ndim > 1 and image.size else ("none",)
        for image in examples
    }
    kinds = {image.dtype for image in examples}
    if kinds != {np.dtype(np.uint8)} or len(shapes) != 1 or not shapes <= {(1,), (3,)}:
        raise UserError(
            f"{name}: images of type {', '.join(map(str, kinds)) or 'none'} and channels "
            f"{', '.join(str(s[-1]) for s in shapes) or 'none'}, expected uint8 (n, h, w), "
            "(n, h, w, 1) or (n, h, w, 3)"
        )
    return next(iter(shapes))[0]


def _class_names(name: str, labels: Any) -> list[str]:
    labels = np.asarray(labels)
    if labels.dtype.kind in "US":
        return sorted({str(label) for label in labels.ravel()})
    if labels.dtype.kind not in "iub":
        raise UserError(f"{name}: labels of type {labels.dtype}, expected class numbers or names")
    several = labels.ndim == 2 and labels.shape[1] > 1
    return list(map(str, range(labels.shape[1] if several else int(labels.max()) + 1)))


def _label_ids(name: str, labels: Any, names: tuple[str, ...]) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] > 1:
        if labels.shape[1] != len(names) or not np.isin(labels, (0, 1)).all():
            raise UserError(
                f"{name}: labels of shape {labels.shape} from {labels.min()} to {labels.max()}, "
                f"expected (n, {len(names)}) of 0 and 1, a column for each class"
            )
        # All in one width, so that parts can be added up.
        rows = [np.flatnonzero(row) for row in labels]
        ids = np.full(labels.shape, -1, np.int32)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = row
        return ids
    labels = labels.reshape(len(labels))
    if labels.dtype.kind in "US":
        index = {n: i for i, n in enumerate(names)}
        labels = np.array([index.get(str(label), -1) for label in labels])
    if not (labels.dtype.kind in "iub" and labels.min() >= 0 and labels.max() < len(names)):
        raise UserError(
            f"{name}: labels that are none of the {len(names)} classes {', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}; correct them or name all classes"
        )
    return labels.astype(np.int32)


def _image(parts: list[Images], starts: list[int], key: int) -> np.ndarray:
    place = bisect_right(starts, key) - 1
    image = parts[place][int(key) - starts[place]]
    return image if image.ndim == 3 else image[..., None]


def _describe(name: str, splits: list[str], starts: list[int], key: int) -> str:
    place = bisect_right(starts, key) - 1
    return f"{name} {splits[place]}".rstrip() + f"[{key - starts[place]}]"


def _digest(images: Images) -> str:
    """Of the pixels: numbers name no image."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
