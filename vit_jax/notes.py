"""What the official layouts have no place for, kept in a small .json file beside the weights."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import data
from vit_jax.checkpoints.labels import class_names
from vit_jax.checkpoints.spec import AnySpec, LiTSpec
from vit_jax.errors import UserError
from vit_jax.models import CLASSIFIERS


@dataclasses.dataclass(frozen=True)
class Notes:
    """How weights are to be used.

    Attributes:
      classifier: see `models.CLASSIFIERS`; "lit" for a LiT bundle.
      image_size: (height, width) in pixels.
      preprocess: how images are made ready, e.g. "resize(224)|value_range(-1, 1)".
      labels: names of the classes, or None.
    """

    classifier: str
    image_size: tuple[int, int]
    preprocess: str
    labels: tuple[str, ...] | None

    def to_json(self) -> bytes:
        """The content of the file."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        return text.encode() + b"\n"


def read_notes(weights: Path) -> Notes | None:
    """The notes beside a file of weights; None if there are none. Raises UserError if they are
    damaged."""
    file = weights.with_suffix(".json")
    if file == weights or not file.is_file():
        return None
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
        labels, classifier = notes["labels"], notes["classifier"]
        if classifier not in (*CLASSIFIERS, LiTSpec.classifier):
            raise ValueError(f"classifier {classifier!r} is none of {', '.join(CLASSIFIERS)}")
        if not isinstance(labels, list | None):
            raise ValueError("labels is no list")
        data.parse(notes["preprocess"])
        return Notes(
            classifier,
            height_width([int(size) for size in notes["image_size"]]),
            notes["preprocess"],
            tuple(map(str, labels)) if labels else None,
        )
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{file} is damaged ({type(e).__name__}: {e}): mend it, or remove it"
        ) from e


def original_preprocess(image_size: tuple[int, int]) -> str:
    """How the original evaluates: the whole image squeezed to (h, w), values in [-1, 1]."""
    height, width = image_size
    size = height if height == width else (height, width)
    return f"resize({size})|value_range(-1, 1)"


def preprocess_for(notes: Notes | None, stored: AnySpec, new: AnySpec) -> str:
    """How images are made ready for stored weights, perhaps resampled for `new.image_size`.

    Without notes it is the original's preprocessing; for another size too, but with the recorded
    range of values.
    """
    if notes and new.image_size == stored.image_size:
        return notes.preprocess
    resize, value_range = original_preprocess(new.image_size).split("|")
    if isinstance(new, LiTSpec):  # Its towers saw whole grey levels.
        value_range = f"uint8|{value_range}"
    recorded = re.findall(
        # Numbers in brackets, for each channel, may stand in the brackets.
        r"(?:uint8\|)?(?:value_range|normalize)\((?:[^()]|\([^()]*\))*\)",
        notes.preprocess if notes else "",
    )
    return f"{resize}|{recorded[-1] if recorded else value_range}"


def class_labels(weights: Path, notes: Notes | None, spec: AnySpec) -> tuple[str, ...] | None:
    """The names of the classes: those noted, without notes those of the published heads.

    Raises UserError if they are not as many as the head has.
    """
    labels = notes.labels if notes else class_names(spec.num_classes)
    if labels is not None and len(labels) != spec.num_classes:
        raise UserError(
            f"{weights.with_suffix('.json')} names {len(labels)} classes, but the head has "
            f"{spec.num_classes}: mend or remove that file"
        )
    return labels


def height_width(image_size: Any) -> tuple[int, int]:
    """(height, width) of one number of pixels or two. Raises UserError for anything else."""
    pair = list(image_size) if np.ndim(image_size) == 1 else [image_size] * 2
    if len(pair) != 2 or not all(is_count(size) for size in pair):
        raise UserError(f"image_size is {image_size!r}, expected pixels or (height, width) of them")
    return int(pair[0]), int(pair[1])


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and value >= 1
