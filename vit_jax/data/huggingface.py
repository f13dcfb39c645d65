"""Hugging Face `datasets`: objects of that library, and what its `save_to_disk` wrote."""

import os
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data.folders import held_out_splits
from vit_jax.data.sources import Source, Splits
from vit_jax.errors import UserError


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
    return _part(_whole(dataset, image, label, name), range(len(dataset)))


def _whole(dataset: Any, image: str, label: str, name: str) -> Source:
    features = getattr(dataset, "features", None) or {}
    kind: Any = features.get(image)
    column_kind: Any = features.get(label)
    classes = getattr(column_kind, "feature", column_kind)  # of a list
    multi_label = classes is not column_kind
    if not hasattr(kind, "decode") or not getattr(classes, "names", None):
        raise UserError(
            f"{name}: columns {', '.join(features) or 'none'}, expected {image!r} of type Image "
            f"and {label!r} of type ClassLabel; name others with image= and label=, or give "
            "one split"
        )
    column = dataset[label][:]
    if multi_label:
        rows = [row or [] for row in column]
        width = max(map(len, rows), default=0)
        ids = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int32)
    else:
        ids = np.array([-1 if id_ is None else id_ for id_ in column], np.int32)
    undecoded = dataset.cast_column(image, type(kind)(decode=False))
    return Source(
        name=name,
        labels=tuple(classes.names),
        channels=3,
        keys=range(len(dataset)),
        label_ids=ids,
        read_key=partial(_content, undecoded, image, name),
        describe_key=partial("{}[{}]".format, name),
        multi_label=multi_label,
        identity=partial(getattr, dataset, "_fingerprint", ""),
    )


def _part(whole: Source, part: range) -> Source:
    """Some of the images, which need labels: those of a competition's test aren't told."""
    assert whole.label_ids is not None
    missing = int((whole.label_ids[part] < 0).sum())
    if missing and not whole.multi_label:
        raise UserError(f"{whole.name}: {missing:,} images have no label; leave them out")
    return whole.take(part)


def saved_splits(path: str, seed: int) -> Splits:
    """The parts of a data set that `save_to_disk` wrote; of a single one a fifth is held out."""
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
    # One source for all, so that parts can be added up.
    together = datasets.concatenate_datasets(list(found.values()))
    whole = _whole(together, "image", "label", path)
    stops = np.cumsum([0, *map(len, found.values())]).tolist()
    return {
        split: partial(_part, whole, range(start, stop))
        for split, start, stop in zip(found, stops, stops[1:], strict=False)
    }


def _content(dataset: Any, image: str, name: str, key: int) -> bytes:
    from vit_jax.data import images  # loads OpenCV

    stored = dataset[int(key)][image]
    if stored is None:
        raise UserError(f"{name}[{key}]: no image; remove the row")
    return stored["bytes"] or images.content(stored["path"])
