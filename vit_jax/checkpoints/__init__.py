"""How weights come in and go out: every file layout, and nothing about training."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.architecture import Spec, check_arrays, read_spec
from vit_jax.checkpoints.layouts import STYLES, key_style, to_linen, to_style
from vit_jax.checkpoints.npz import atomic_file, read_npz, write_npz
from vit_jax.checkpoints.positions import resample
from vit_jax.errors import UserError

__all__ = [
    "STYLES",
    "Spec",
    "adapt",
    "atomic_file",
    "check_arrays",
    "key_style",
    "load_npz",
    "read_npz",
    "read_spec",
    "resample",
    "save_npz",
    "to_linen",
    "to_style",
    "to_tree",
    "write_npz",
]

_POSITIONS = "Transformer/posembed_input/pos_embedding"


def load_npz(
    path: str | os.PathLike,
    *,
    classifier: str | None = None,
    image_size: tuple[int, int] | None = None,
    likely_size: tuple[int, int] | None = None,
) -> tuple[dict[str, np.ndarray], Spec]:
    """Reads an official .npz file in any known key style.

    Args:
      path: the file.
      classifier, image_size, likely_size: what the arrays can't tell, see
        `architecture.read_spec`.

    Returns:
      (arrays, spec): float32 arrays under today's names, and the architecture they belong to.

    Raises UserError if the file can't be read or its arrays do not fit together.
    """
    arrays = to_linen(read_npz(path))
    spec = read_spec(
        arrays,
        classifier=classifier,
        image_size=image_size,
        likely_size=likely_size,
        where=str(path),
    )
    return {k: np.asarray(v, np.float32) for k, v in arrays.items()}, spec


def adapt(
    arrays: Mapping[str, np.ndarray],
    spec: Spec,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    pre_logits: bool | None = None,
) -> tuple[dict[str, np.ndarray], Spec]:
    """Changes weights for another task, as the official fine-tuning does.

    Args:
      arrays, spec: what `load_npz` gave.
      num_classes: None keeps the head; a number puts a new head of zeros in its place.
      image_size: (height, width); None keeps the grid, else the position embeddings are resampled.
      pre_logits: None keeps the tanh layer with a kept head and drops it with a new one; True keeps
        it, False drops it.

    Returns:
      (arrays, spec) of the changed network. Arrays that didn't change are shared with the input.

    Raises UserError if there is no layer to keep, or the kept head doesn't fit without it.
    """
    arrays, new = dict(arrays), spec
    if num_classes is not None and num_classes < 1:
        raise UserError(f"num_classes is {num_classes}, expected at least 1")
    keep = (num_classes is None) if pre_logits is None else pre_logits
    if pre_logits and spec.representation_size is None:
        raise UserError("pre_logits=True, but the weights have no pre_logits layer: leave it out")
    if not keep and spec.representation_size is not None:
        if (
            num_classes is None
            and spec.num_classes
            and spec.representation_size != spec.hidden_size
        ):
            raise UserError(
                f"the head takes {spec.representation_size} features and does not fit without "
                f"pre_logits, which leaves {spec.hidden_size}: pass num_classes for a new head"
            )
        del arrays["pre_logits/kernel"], arrays["pre_logits/bias"]
        new = dataclasses.replace(new, representation_size=None)
    if num_classes is not None:
        features = new.representation_size or new.hidden_size
        arrays["head/kernel"] = np.zeros((features, num_classes), np.float32)
        arrays["head/bias"] = np.zeros((num_classes,), np.float32)
        new = dataclasses.replace(new, num_classes=num_classes)
    if image_size is not None:
        new = dataclasses.replace(new, image_size=image_size)
        arrays[_POSITIONS] = resample(
            arrays[_POSITIONS],
            spec.grid_size,
            new.grid_size,
            class_token=spec.model().has_class_token,
        )
    return arrays, new


def save_npz(path: str | os.PathLike, params: Mapping[str, Any], *, style: str = "linen") -> None:
    """Writes a parameter tree as an official .npz file, atomically.

    Args:
      path: the file.
      params: nested dict of arrays.
      style: "linen" for today's key names, "prelinen" for those of the 2020 and 2021 files.
    """
    flat = {k: np.asarray(v) for k, v in flatten_dict(params, sep="/").items()}
    write_npz(path, to_style(flat, style))


def to_tree(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"a/b": array} as a nested dict."""
    return unflatten_dict(dict(arrays), sep="/")
