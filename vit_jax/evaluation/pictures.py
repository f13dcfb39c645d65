"""Evaluating weights on labelled pictures."""

import csv
import io
import os
from collections import defaultdict

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

    Classes are matched as `class_indices` says.

    Args:
      vit: see `vit_jax.load`.
      source: see `data.open_source`.
      batch_size: pictures at once, over all devices; rounded up to a multiple of their number.
      corrupt: "error" stops at a picture that can't be read, "skip" warns and leaves it out.
      loss: "softmax" or "sigmoid".

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
    step = make_eval_step(vit.model, mesh=mesh, loss=loss)
    params = jax.device_put(vit.params)
    matched = (batch | {"label": classes[batch["label"]]} for batch in batches)
    assert vit.spec.num_classes is not None  # class_indices has seen to it.
    return evaluate(step, params, matched, vit.spec.num_classes)


def class_indices(vit: Pretrained, source: data.Source) -> np.ndarray:
    """int32 (classes of the source,): the index in the network's head of each class of the
    source.

    A class is known by its name, by one of the words of its name ("tench" of "tench, Tinca
    tinca"; capitals don't count, and "_" is a space), or, if all of the source's are numbers, by its
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
    # The whole of a name, a word of it, a word in other spelling: "Cardigan" is a dog first.
    whole, words, plain = (defaultdict(list) for _ in range(3))
    for i, label in enumerate(vit.labels):
        parts = dict.fromkeys((label, *label.split(", ")))
        for index, names in ((whole, [label]), (words, parts), (plain, {*map(_plain, parts)})):
            for name in names:
                index[name].append(i)
    found = {
        label: whole.get(label) or words.get(label) or plain.get(_plain(label), [])
        for label in source.labels
    }
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


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().lower()


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
                vit.label(truth),
                vit.label(prediction),
                f"{probability:.6f}",
                int(truth == prediction),
            ]
        )
    with atomic_file(path) as file:
        # A file name need not be text: what Python can't decode it can write back.
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
