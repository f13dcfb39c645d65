"""Images in arrays: of NumPy, in .npz files, and in Hugging Face's `datasets`."""

import hashlib
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data.headers import is_image
from vit_jax.data.source import Numbering, Source, Splits, held_out_splits, numbered_classes
from vit_jax.errors import UserError

Images = np.ndarray | Sequence[np.ndarray]
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def from_arrays(
    images: Images, labels: Any, *, names: Sequence[str] | None = None, name: str = "arrays"
) -> Source:
    """A source of images in memory, or in a `np.memmap`; they are not copied.

    Args:
      images: (n, h, w) or (n, h, w, channels), or a sequence of such images of various sizes;
        uint8, or other numbers, of which `config.levels` says what is black and white.
      labels: (n,) class numbers or class names; or (n, classes) of 0 and 1, several an image.
      names: of the classes, by number; by default the sorted names, or "0", "1", ...
      name: what errors call the source.

    Raises UserError if these don't fit together.
    """
    _check_lengths(name, images, labels)
    return _source(name, {"": images}, "", labels, names)


def array_splits(dataset: str, seed: int) -> Splits:
    """The splits of an .npz file.

    It holds `SPLIT_images` and `SPLIT_labels` for each split, or `images` and `labels`, of which a
    fifth is held out; and `names` of the classes if they have any.
    """
    try:
        with np.load(os.path.expanduser(dataset), allow_pickle=False) as file:
            # Others make gigabytes of kilobytes, deflate a thousandfold at most.
            if odd := [m for m in file.zip.infolist() if m.compress_type not in _COMPRESSIONS]:
                raise ValueError(f"{odd[0].filename} is compressed another way than by savez")
            arrays = dict(file)
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for what is damaged.
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(
            f"{dataset}: can't be read ({reason}), expected an .npz of arrays"
        ) from None
    images = {
        match[1] or "": array
        for key, array in arrays.items()
        if (match := re.fullmatch(r"(?:(\w+)_)?images", key))
    }
    if not images:
        raise UserError(
            f"{dataset}: holds {', '.join(arrays) or 'nothing'}, expected train_images, "
            "train_labels, test_images, test_labels or images, labels"
        )
    images = dict(sorted(images.items(), key=lambda item: (item[0] != "train", item[0])))
    labels = {}
    for split in images:
        key = f"{split}_labels" if split else "labels"
        if key not in arrays:
            raise UserError(f"{dataset}: no {key} beside {key[:-6]}images; add them")
        labels[split] = arrays[key]
        _check_lengths(dataset, images[split], labels[split])
    names = arrays.get("names")
    if names is None:  # All splits have the classes of the first.
        names = _class_names(dataset, _decoded(next(iter(labels.values()))))
    sources = {split: _source(dataset, images, split, labels[split], names) for split in images}
    if "" in sources:
        return held_out_splits(partial(sources.__getitem__, ""), seed)
    return {split: partial(sources.__getitem__, split) for split in sources}


def _check_lengths(name: str, images: Images, labels: Any) -> None:
    shape = np.shape(labels)
    if len(shape) not in (1, 2) or 0 in shape[1:] or not np.iterable(images):
        raise UserError(
            f"{name}: labels of shape {shape}, expected (n,) or (n, classes), and n images"
        )
    if len(images) != len(labels) or not len(images):
        raise UserError(
            f"{name}: {len(images)} images and {len(labels)} labels, expected one for each"
        )


def _source(name: str, images: Mapping[str, Images], split: str, labels: Any, names: Any) -> Source:
    """The source of one of several splits, whose examples are numbered through."""
    channels = _channels(name, images[split])
    labels = _decoded(labels)
    names = _class_names(name, labels) if names is None else tuple(map(str, _decoded(names)))
    label_ids = _label_ids(name, labels, names)
    numbering = Numbering(name, {split: len(part) for split, part in images.items()})
    return Source(
        name=name,
        labels=names,
        channels=channels,
        keys=numbering.keys(split),
        label_ids=label_ids,
        read_key=partial(_image, images, numbering),
        describe_key=numbering.describe,
        multi_label=label_ids.ndim == 2,
        identity=partial(_digest, images[split]),
    )


def _channels(name: str, images: Images) -> int:
    examples = images[:1] if isinstance(images, np.ndarray) else images
    shapes = {image.shape[2:] or (1,) for image in examples}
    kinds = {image.dtype for image in examples}
    if len(kinds) != 1 or len(shapes) != 1 or not all(is_image(x.shape, x.dtype) for x in examples):
        shape = np.shape(images[0])
        raise UserError(
            f"{name}: images of type {', '.join(map(str, kinds))} and channels "
            f"{', '.join(str(s[-1]) for s in shapes)}, the first of shape {shape}, expected "
            "numbers of one type, (n, h, w) or (n, h, w, channels)"
        )
    return shapes.pop()[0]


def _decoded(values: Any) -> np.ndarray:
    """An array, with text that was bytes; of a single name one of it."""
    values = np.atleast_1d(values)
    is_bytes = values.dtype.kind == "S"
    return np.char.decode(values, "utf-8", "backslashreplace") if is_bytes else values


def _class_names(name: str, labels: np.ndarray) -> tuple[str, ...]:
    if labels.dtype.kind == "U":
        names = sorted(set(labels.ravel().tolist()))
        if "nan" in names:
            raise UserError(f"{name}: labels are 'nan', which is none; leave those images out")
        return tuple(names)
    if labels.dtype.kind not in "iub":
        raise UserError(f"{name}: labels of type {labels.dtype}, expected class numbers or names")
    several = labels.ndim == 2 and labels.shape[1] > 1
    count = labels.shape[1] if several else int(labels.max()) + 1
    return numbered_classes(name, count, len(labels))


def _label_ids(name: str, labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] > 1:
        if labels.shape[1] != len(names) or not np.isin(labels, (0, 1)).all():
            raise UserError(
                f"{name}: labels of shape {labels.shape} from {labels.min()} to {labels.max()}, "
                f"expected (n, {len(names)}) of 0 and 1, a column for each class"
            )
        return _padded([np.flatnonzero(row) for row in labels], labels.shape[1])
    labels = labels.reshape(len(labels))
    if labels.dtype.kind == "U":
        index = {n: i for i, n in enumerate(names)}
        labels = np.array([index.get(str(label), -1) for label in labels])
    if not (labels.dtype.kind in "iub" and labels.min() >= 0 and labels.max() < len(names)):
        raise UserError(
            f"{name}: labels that are none of the {len(names)} classes {', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}; correct them or name all classes"
        )
    return labels.astype(np.int32)


def _padded(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> np.ndarray:
    """int32 (n, width), each row filled up with -1."""
    ids = np.full((len(rows), width), -1, np.int32)
    for target, row in zip(ids, rows, strict=True):
        target[: len(row)] = row
    return ids


def _image(images: Mapping[str, Images], numbering: Numbering, key: int) -> np.ndarray:
    split, place = numbering.find(key)
    image = images[split][place]
    return image if image.ndim == 3 else image[..., None]


def _digest(images: Images) -> str:
    """Of the pixels: numbers name no image."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.shape).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


# Hugging Face's `datasets`: objects of that library, and what its `save_to_disk` wrote.


def from_huggingface(
    dataset: Any, *, image: str = "image", label: str = "label", name: str = "dataset"
) -> Source:
    """A source of the images of a `datasets.Dataset` (one split, not a DatasetDict).

    Args:
      dataset: with a column of type Image and one of type ClassLabel, or of lists of ClassLabel:
        then an image may have several labels.
      image, label: names of these columns.
      name: what errors call the source.

    Raises UserError if it has no such columns, or images without a label.
    """
    return _labelled(_whole_dataset(dataset, image, label, name), range(len(dataset)))


def saved_splits(path: str, seed: int) -> Splits:
    """The splits that `save_to_disk` wrote; of a single one a fifth is held out."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path}: a data set of Hugging Face's; to read it run pip install datasets, or "
            "prepare another kind"
        ) from None
    try:
        found = datasets.load_from_disk(os.path.expanduser(path))
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: can't be opened by `datasets` ({reason})") from None
    if not isinstance(found, dict):
        return held_out_splits(partial(from_huggingface, found, name=path), seed)
    # One source for all, so that splits can be added up.
    together = datasets.concatenate_datasets(list(found.values()))
    whole = _whole_dataset(together, "image", "label", path)
    numbering = Numbering(path, {split: len(part) for split, part in found.items()})
    return {split: partial(_labelled, whole, numbering.keys(split)) for split in found}


def _whole_dataset(dataset: Any, image: str, label: str, name: str) -> Source:
    features = getattr(dataset, "features", None) or {}
    image_type: Any = features.get(image)
    label_type: Any = features.get(label)
    classes = getattr(label_type, "feature", label_type)  # Of a list.
    multi_label = classes is not label_type
    if not hasattr(image_type, "decode") or not getattr(classes, "names", None):
        raise UserError(
            f"{name}: columns {', '.join(features) or 'none'}, expected {image!r} of type Image "
            f"and {label!r} of type ClassLabel; name others with image= and label=, or give "
            "one split"
        )
    column = dataset[label][:]
    if multi_label:
        rows = [row or [] for row in column]
        ids = _padded(rows, max(map(len, rows), default=0))
    else:
        ids = np.array([-1 if id_ is None else id_ for id_ in column], np.int32)
    return Source(
        name=name,
        labels=tuple(classes.names),
        channels=3,
        keys=range(len(dataset)),
        label_ids=ids,
        read_key=partial(
            _content, dataset.cast_column(image, type(image_type)(decode=False)), image, name
        ),
        describe_key=partial("{}[{}]".format, name),
        multi_label=multi_label,
        identity=partial(getattr, dataset, "_fingerprint", ""),
    )


def _labelled(whole: Source, part: range) -> Source:
    """Some of the images, which need labels: those of a competition's test aren't told."""
    assert whole.label_ids is not None
    missing = int((whole.label_ids[part] < 0).sum())
    if missing and not whole.multi_label:
        raise UserError(f"{whole.name}: {missing:,} images have no label; leave them out")
    if (whole.label_ids >= len(whole.labels)).any():
        raise UserError(
            f"{whole.name}: labels up to {whole.label_ids.max()}, expected those of the "
            f"{len(whole.labels)} classes that it names; write it again"
        )
    return whole.take(part)


def _content(dataset: Any, image: str, name: str, key: int) -> bytes:
    from vit_jax.data import images  # Loads OpenCV.

    stored = dataset[int(key)][image]
    if stored is None:
        raise UserError(f"{name}[{key}]: no image; remove the row")
    return stored["bytes"] or images.content(stored["path"])
