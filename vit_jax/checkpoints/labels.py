"""From numbers to probabilities and names of classes, and back."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np

from vit_jax.errors import UserError

LOSSES = ("softmax", "sigmoid")

Label = TypeVar("Label")


def check_loss(loss: str) -> None:
    """Raises UserError for a loss that is none of LOSSES."""
    if loss not in LOSSES:
        raise UserError(f"loss is {loss!r}, expected {' or '.join(LOSSES)}")


def probabilities(logits: jax.Array | np.ndarray, loss: str) -> jax.Array:
    """What a network that was trained with a loss says by its logits (..., classes).

    Of "softmax" the classes exclude each other and sum to 1, of "sigmoid" each is for itself.
    Raises UserError for another loss.
    """
    check_loss(loss)
    return jax.nn.softmax(logits) if loss == "softmax" else jax.nn.sigmoid(logits)


def ranked(
    logits: np.ndarray, labels: Sequence[Label], top: int | None = None, *, loss: str = "softmax"
) -> list[tuple[Label, float]]:
    """The `top` classes (all, by default) of logits (classes,): (label, probability), best first;
    see `probabilities`."""
    probability = np.asarray(probabilities(logits, loss))
    best = np.argsort(-probability, kind="stable")[:top]
    return [(labels[i], float(probability[i])) for i in best]


def index_of(name: str, labels: Sequence[str], count: int) -> int | None:
    """The class that a name means as a number, of `count` classes; None if it means none.

    Where classes are called by numbers themselves, a number is a name and no index.
    """
    is_index = name.isdecimal() and len(name) < 10 and not any(map(str.isdecimal, labels))
    return int(name) if is_index and int(name) < count else None


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
