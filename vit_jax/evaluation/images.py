"""Evaluating weights on labelled images."""

import csv
import io
import os
from collections import defaultdict

import jax
import numpy as np

from vit_jax import data
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
    """Scores of a network on labelled images, made ready as the weights' notes say.

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
    colours = {1: "gray", 3: "rgb"}.get(vit.spec.channels)
    if colours is None:
        raise UserError(f"these weights take {vit.spec.channels} channels, which no image has")
    batches = data.eval_batches(
        source,
        data.parse(f"{colours}|{vit.preprocess}"),
        batch_size=divisible(batch_size),
        workers=-1,  # Processes where that pays.
        corrupt=corrupt,
    )
    mesh = make_mesh()
    model = vit.model_on([*mesh.devices.flat])
    step = make_eval_step(model, mesh=mesh, loss="sigmoid" if source.multi_label else loss)
    params = jax.device_put(vit.params, replicated(mesh))  # Once, not with each batch.
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
    source.

    A class is known by its name, by a word of its name ("tench" of "tench, Tinca tinca"; in any
    case of letters, and with "_" for a space), or, if all of the source's are numbers, by its
    index. Without names and numbers classes are matched by position, if there are as many.

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
    index = defaultdict(list)
    for i, label in enumerate(vit.labels):
        for key in {key for j, word in enumerate(label.split(", ")) for key in _keys(word, j)}:
            index[key].append(i)
        index["whole", label].append(i)
    found = {}
    for label in source.labels:
        keys = ("whole", label), *_keys(label, 0)
        found[label] = next((index[key] for key in keys if key in index), [])
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
    return np.array([indices[0] for indices in found.values()], np.int32)


def _keys(word: str, position: int) -> list[tuple[str, str]]:
    """What a word of a class's name is found by, best first: "Cardigan" is a dog, "cardigan" none;
    "crayfish" is first of all the class that is called so first."""
    word = word.replace("_", " ")
    keys = [("word", word), ("plain", word.lower())]
    return keys if position else [("first", word), *keys]


def write_predictions(
    path: str | os.PathLike, source: data.Source, vit: Pretrained, scores: Scores
) -> None:
    """Writes a CSV file with one row an image: image, label, prediction, probability,
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
    with atomic_write(path) as file:
        # A file name need not be text: what Python can't decode it can write back.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
