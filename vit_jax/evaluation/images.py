"""Evaluating weights on labelled images."""

import csv
import io
import os
from typing import Any

import jax
import numpy as np

from vit_jax import data
from vit_jax.checkpoints.labels import find_classes
from vit_jax.errors import UserError
from vit_jax.evaluation.metrics import Scores, evaluate, make_eval_step
from vit_jax.files import atomic_write
from vit_jax.pretrained import Pretrained
from vit_jax.sharding import divisible, make_mesh, replicated


def evaluate_images(
    vit: Pretrained,
    source: data.Source,
    *,
    batch_size: int = 64,
    corrupt: str = "error",
    loss: str = "softmax",
) -> Scores:
    """Scores of a network on labelled images, preprocessed as the weights' notes say.

    Classes are matched as `class_indices` says.

    Args:
      vit: see `vit_jax.load`.
      source: see `data.open_source`.
      batch_size: images at once, over all devices; rounded up to a multiple of their number.
      corrupt: "error" stops at an image that can't be read, "skip" warns and leaves it out.
      loss: "softmax" or "sigmoid"; always "sigmoid" where an image may have several labels.

    Raises UserError if the classes don't fit.
    """
    classes = class_indices(vit, source)
    colours = {1: "gray|", 3: "rgb|"}.get(vit.spec.channels, "")
    if not colours and source.channels != vit.spec.channels:
        raise UserError(
            f"these weights take images of {vit.spec.channels} channels, and those of "
            f"{source.name} have {source.channels}"
        )
    assert vit.spec.num_classes is not None  # class_indices has seen to it.
    return score(
        vit.model_on(jax.devices()),
        vit.params,
        source,
        f"{colours}{vit.preprocess}",
        classes,
        vit.spec.num_classes,
        batch_size=batch_size,
        corrupt=corrupt,
        loss=loss,
    )


def score(
    model: Any,
    params: Any,
    source: data.Source,
    preprocess: str,
    classes: np.ndarray,
    num_classes: int,
    *,
    batch_size: int,
    corrupt: str,
    loss: str = "softmax",
) -> Scores:
    """Scores of a model, a Linen module for all devices, on labelled images; see `evaluate_images`.

    `classes` says which of the model's `num_classes` each class of the source is.
    """
    ops, normalize = data.parse(preprocess).split()
    images = data.eval_batches(
        source,
        ops,
        batch_size=divisible(batch_size),
        workers=-1,  # Processes where that pays.
        corrupt=corrupt,
    )

    def matched(labels: np.ndarray) -> np.ndarray:
        if labels.ndim == 1:
            return classes[labels]
        columns = np.zeros((len(labels), num_classes), np.float32)
        columns[:, classes] = labels
        return columns

    mesh = make_mesh()
    loss = "sigmoid" if source.multi_label else loss
    step = make_eval_step(model, mesh=mesh, loss=loss, normalize=normalize)
    params = jax.device_put(params, replicated(mesh))  # Once, not with each batch.
    batches = (batch | {"label": matched(batch["label"])} for batch in images)
    return evaluate(step, params, batches, num_classes)


def class_indices(vit: Pretrained, source: data.Source) -> np.ndarray:
    """int32 (classes of the source,): the index in the network's head of each class of the
    source.

    A class is known by its name as in `checkpoints.labels.find_classes`, or, if all of the source's
    are numbers, by its index. Without names and numbers classes are matched by position, if there
    are as many.

    Raises UserError naming those that can't be matched.
    """
    if vit.spec.num_classes is None:
        raise UserError("these weights have no head, so there is nothing to evaluate")
    numbers = [int(label) for label in source.labels if label.isdecimal()]
    by_number = len(numbers) == len(source.labels) and max(numbers) < vit.spec.num_classes
    if by_number and not set(source.labels) <= set(vit.labels or ()):
        return np.array(numbers, np.int32)
    if vit.labels is None:
        if len(source.labels) != vit.spec.num_classes:
            raise UserError(
                f"{source.name} has {len(source.labels)} classes and the head "
                f"{vit.spec.num_classes}, and the weights don't name theirs: they can't be matched"
            )
        return np.arange(len(source.labels), dtype=np.int32)
    found = dict(zip(source.labels, find_classes(vit.labels, source.labels), strict=True))
    unknown = [label for label, indices in found.items() if not indices]
    if unknown:
        raise UserError(
            f"{source.name} has classes that the weights don't know: {', '.join(unknown[:10])}"
            f"{', ...' if len(unknown) > 10 else ''}; they know {'; '.join(vit.labels[:10])}"
            f"{'; ...' if len(vit.labels) > 10 else ''}"
        )
    for label, indices in found.items():
        if len(indices) > 1:
            raise UserError(
                f"{source.name}: the weights have several classes {label!r}, "
                f"{' and '.join(map(str, indices))}: name the folders by these numbers"
            )
    return np.array([index for (index,) in found.values()], np.int32)


def write_predictions(
    path: str | os.PathLike, source: data.Source, vit: Pretrained, scores: Scores
) -> None:
    """Writes a CSV file with one row an image: picture, label, prediction, probability,
    correct."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["picture", "label", "prediction", "probability", "correct"])
    rows = zip(scores.index, scores.truth, scores.prediction, scores.probability, strict=True)
    for index, truth, prediction, probability in rows:
        label = vit.label(truth) if truth >= 0 else ""
        name, said = source.describe(int(index)), vit.label(prediction)
        writer.writerow([name, label, said, f"{probability:.6f}", int(truth == prediction)])
    with atomic_write(path) as file:
        # A file name need not be text: what Python can't decode it can write back.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
