"""Evaluating weights on labelled pictures."""

import csv
import io
import os

import jax
import numpy as np
from jax.sharding import AxisType

from vit_jax import data
from vit_jax.checkpoints import atomic_file
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import Scores, evaluate, make_eval_step
from vit_jax.pretrained import Pretrained


def evaluate_pictures(
    vit: Pretrained,
    source: data.Source,
    *,
    batch_size: int = 64,
    corrupt: str = "error",
    loss: str = "softmax",
) -> Scores:
    """Scores of a network on labelled pictures, made ready as the weights' notes say.

    Classes are matched by name where the weights know theirs, else by position.

    Args:
      vit: see `vit_jax.load`.
      source: see `data.open_source`.
      batch_size: pictures at once, over all devices; rounded up to a multiple of their number.
      corrupt: "error" stops at a picture that can't be read, "skip" warns and leaves it out.
      loss: "softmax" or "sigmoid"; always "sigmoid" where a picture may have several labels.

    Raises UserError if the classes don't fit.
    """
    classes = class_indices(vit, source)
    devices = jax.device_count()
    batches = data.eval_batches(
        source,
        data.parse(vit.preprocess),
        batch_size=-(-max(batch_size, 1) // devices) * devices,
        corrupt=corrupt,
    )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    step = make_eval_step(vit.model, mesh=mesh, loss="sigmoid" if source.multi_label else loss)
    params = jax.device_put(vit.params)
    assert vit.spec.num_classes is not None  # class_indices has seen to it.
    matched = (
        batch | {"label": _matched(batch["label"], classes, vit.spec.num_classes)}
        for batch in batches
    )
    return evaluate(step, params, matched, vit.spec.num_classes)


def _matched(labels: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Labels of the source, numbers or columns of 0 and 1, as labels of the network's head."""
    if labels.ndim == 1:
        return classes[labels]
    columns = np.zeros((len(labels), num_classes), np.float32)
    columns[:, classes] = labels
    return columns


def class_indices(vit: Pretrained, source: data.Source) -> np.ndarray:
    """int32 (classes of the source,): the index in the network's head of each class of the
    source."""
    if vit.spec.num_classes is None:
        raise UserError("these weights have no head, so there is nothing to evaluate")
    if vit.labels is None:
        if len(source.labels) != vit.spec.num_classes:
            raise UserError(
                f"{source.name} has {len(source.labels)} classes and the head "
                f"{vit.spec.num_classes}, and the weights don't name theirs: they can't be matched"
            )
        return np.arange(len(source.labels), dtype=np.int32)
    index = {label: i for i, label in enumerate(vit.labels)}
    unknown = [label for label in source.labels if label not in index]
    if unknown:
        raise UserError(
            f"{source.name} has classes that the weights don't know: {', '.join(unknown[:10])}; "
            f"they know {', '.join(vit.labels[:10])}{', ...' if len(vit.labels) > 10 else ''}"
        )
    return np.array([index[label] for label in source.labels], np.int32)


def write_predictions(
    path: str | os.PathLike, source: data.Source, vit: Pretrained, scores: Scores
) -> None:
    """Writes a CSV file with one row a picture: picture, label, prediction, probability,
    correct."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "label", "prediction", "probability", "correct"])
    rows = zip(scores.index, scores.truth, scores.prediction, scores.probability, strict=True)
    for index, truth, prediction, probability in rows:
        writer.writerow(
            [
                source.describe(int(index)),
                vit.label(truth) if truth >= 0 else "",
                vit.label(prediction),
                f"{probability:.6f}",
                int(truth == prediction),
            ]
        )
    with atomic_file(path) as file:
        # A file name need not be text: what Python can't decode it can write back.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
