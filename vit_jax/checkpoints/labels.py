"""From numbers to names of classes and back."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Label = TypeVar("Label")


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
