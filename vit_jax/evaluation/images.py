"""Evaluating weights on labelled images."""

import csv
import io
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vit_jax import data
from vit_jax.checkpoints.labels import find_classes, index_of
from vit_jax.errors import UserError
from vit_jax.escape import cell, printable
from vit_jax.evaluation.metrics import Scores, evaluate, make_eval_step
from vit_jax.files import atomic_write
from vit_jax.pretrained import Pretrained
from vit_jax.sharding import divisible, make_mesh, replicated

_log = logging.getLogger(__name__)


def evaluate_images(
    vit: Pretrained,
    source: data.Source,
    *,
    batch_size: int = 64,
    corrupt: str = "error",
    loss: str | None = None,
) -> Scores:
    """Scores of a network on labelled images, preprocessed as the weights' notes say.

    Classes are matched as `class_indices` says.

    Args:
      vit: see `vit_jax.load`.
      source: see `data.open_source`.
      batch_size: images at once, over all devices; rounded up to a multiple of their number.
      corrupt: "error" stops at an image that can't be read, "skip" warns and leaves it out.
      loss: "softmax" or "sigmoid", None for the one that the network was trained with; always
        "sigmoid" where an image may have several labels.

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
    loss = loss or vit.loss
    if source.multi_label and loss != "sigmoid":
        _log.warning(
            "these weights were trained for one class an image, and images of %s may have several: "
            "each class is taken for itself, by a sigmoid",
            source.name,
        )
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
        # Two of the source's classes may be one of the network's.
        np.maximum.at(columns.T, classes, labels.T)
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

    A class is known by its name as in `checkpoints.labels.find_classes`. If all of the source's are
    numbers, and none of the network's is called by one, they are indices. Without names and numbers
    classes are matched by position, if there are as many. What is not matched by name is said.

    Raises UserError naming those that can't be matched.
    """
    count = vit.spec.num_classes
    if count is None:
        raise UserError("these weights have no head, so there is nothing to evaluate")
    numbers = [index_of(label, vit.labels or (), count) for label in source.labels]
    if None not in numbers:
        return _said(vit, source, numbers, "by number")
    if vit.labels is None:
        if len(source.labels) != count:
            raise UserError(
                f"{source.name} has {len(source.labels)} classes and the head {count}, and the "
                "weights don't name theirs: they can't be matched"
            )
        return _said(vit, source, range(count), "by position, as the weights don't name theirs")
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


def _said(vit: Pretrained, source: data.Source, indices: Sequence[Any], how: str) -> np.ndarray:
    """The indices, after telling how they were found."""
    classes = [vit.label(i) if vit.labels else f"class {i}" for i in indices[:5]]
    pairs = [f"{name} is {it}" for name, it in zip(source.labels[:5], classes, strict=True)]
    some = ", ".join([*pairs, *(["..."] if len(indices) > 5 else [])])
    _log.warning("%s", printable(f"the classes of {source.name} are matched {how}: {some}"))
    return np.array(indices, np.int32)


def write_predictions(
    path: str | os.PathLike, source: data.Source, vit: Pretrained, scores: Scores
) -> None:
    """Writes a CSV file with one row an image: picture, label, prediction, probability, correct;
    where an image may have several labels also all of them, divided by ";", and the probability of
    each label that the network knows.

    Text is escaped for spreadsheets, see `escape.cell`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["picture", "label", "prediction", "probability", "correct"]
    names = [vit.label(i) for i in range(len(scores.confusion))]
    likely, true = scores.probabilities, scores.labels
    if likely is not None:
        columns += ["labels", *(f"probability of {name}" for name in names)]
    writer.writerow(map(cell, columns))
    for i, truth in enumerate(scores.truth):
        label, said = names[truth] if truth >= 0 else "", names[scores.prediction[i]]
        row = [source.describe(int(scores.index[i])), label, said]
        row += [f"{scores.probability[i]:.6f}", str(int(truth == scores.prediction[i]))]
        if likely is not None and true is not None:
            row.append(";".join(names[j] for j in np.flatnonzero(true[i])))
            row += [f"{p:.6f}" for p in likely[i]]
        writer.writerow(map(cell, row))
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
