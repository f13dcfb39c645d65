"""The class names of the published heads: 1,000 classes are ImageNet's, 21,843 ImageNet-21k's."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

import numpy as np

from vit_jax.checkpoints import hub
from vit_jax.errors import UserError

# The names that the original prints, one a line. Downloaded, for they are many.
IMAGENET21K = f"{hub.STORE}/bit_models/imagenet21k_wordnet_lemmas.txt"

_log = logging.getLogger(__name__)

Label = TypeVar("Label")


def class_names(num_classes: int | None) -> tuple[str, ...] | None:
    """The names of a published head's classes, in the order of its outputs.

    Those of ImageNet come with the package. Those of ImageNet-21k are downloaded once; where that
    fails the log says so, and there are no names, which is no reason not to use the weights.

    Args:
      num_classes: the width of the head, or None.

    Returns:
      one name a class, all words of its WordNet synset: "tench, Tinca tinca"; or None for other
      heads.
    """
    if num_classes == 1_000:
        file = resources.files("vit_jax.checkpoints") / "imagenet_labels.txt"
        return _lines(file.read_text("utf-8"))
    if num_classes != 21_843:
        return None
    try:
        # One quick try: whoever loads a local file may not even have a network.
        path = hub.fetch(IMAGENET21K, attempts=1, timeout=5)
        names = _lines(path.read_text("utf-8"))
    except (UserError, OSError, UnicodeDecodeError) as e:
        _log.warning("the classes of ImageNet-21k go without names: %s", e)
        return None
    if len(names) != num_classes:
        _log.warning(
            "the classes of ImageNet-21k go without names: %s has %d lines, expected %d; "
            "remove it, and it is fetched again",
            *(path, len(names), num_classes),
        )
        return None
    return names


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip().replace("_", " ") for line in text.splitlines())


def ranked(
    logits: np.ndarray, labels: Sequence[Label], top: int | None = None
) -> list[tuple[Label, float]]:
    """The `top` classes (all, by default) of logits (classes,): (label, softmax), best first."""
    exp = np.exp(logits - logits.max())
    probability = exp / exp.sum()
    best = np.argsort(-probability, kind="stable")[:top]
    return [(labels[i], float(probability[i])) for i in best]


def find_classes(labels: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """The classes that each name may mean, by their indices.

    A class is known by its whole label, else by a word of it ("tench" of "tench, Tinca tinca"; in
    any case of letters, and with "_" for a space).
    """
    index = defaultdict(list)
    for i, label in enumerate(labels):
        index["whole", label].append(i)
        for key in {key for j, word in enumerate(label.split(", ")) for key in _keys(word, j)}:
            index[key].append(i)
    keys = ((("whole", name), *_keys(name, 0)) for name in names)
    return [next((index[key] for key in of_name if key in index), []) for of_name in keys]


def _keys(word: str, position: int) -> list[tuple[str, str]]:
    """What a word of a label is found by, best first: "Cardigan" is a dog, "cardigan" none;
    "crayfish" is first of all the class that is called so first."""
    word = word.replace("_", " ")
    keys = [("word", word), ("plain", word.lower())]
    return keys if position else [("first", word), *keys]
