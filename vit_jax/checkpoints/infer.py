"""Understanding a file of weights: the architecture is read from the arrays themselves."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.formats import open_arrays
from vit_jax.checkpoints.hub import class_names
from vit_jax.checkpoints.layouts import Layout, logged_layout
from vit_jax.errors import UserError
from vit_jax.models.family import FAMILIES, Hints, Size, Spec
from vit_jax.models.shapes import listing

NONFINITE = "NaN or infinite"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_network(
    path: str | os.PathLike,
    *,
    tower: str | None = None,
    heads: int | None = None,
    pre_logits: bool | None = None,
    window: int | None = None,
    **hints: Any,
) -> Iterator[tuple[Layout, Spec]]:
    """Opens a file of weights and finds out what network they are of.

    Args:
      path, tower: see `checkpoints.load_weights`.
      heads, pre_logits: for files of PyTorch's, see `torch.read_torch`.
      window: for those, and for others that don't tell how large windows are.
      **hints: for `read_spec`; they go before what the file says of itself.

    Returns:
      a context manager of its layout, in which arrays can be read while it is open, and the
      architecture.

    Raises UserError if the file can't be read or its arrays do not fit together.
    """
    with open_arrays(path) as stored:
        wishes: dict[str, Any] = dict(heads=heads, pre_logits=pre_logits, window=window)
        layout = logged_layout(stored, Path(path), tower=tower, **wishes)
        hints = {k: v for k, v in hints.items() if v is not None}
        if layout.hints:
            hints["untold"] = {**layout.hints["untold"], **hints.get("untold", {})}
        own = {} if layout.about else {"window": window}
        yield layout, read_spec(layout.arrays, **{**layout.hints, **hints, **own}, where=str(path))


def library_notes(layout: Layout, spec: Spec, path: str | os.PathLike) -> dict[str, Any] | None:
    """What the notes beside weights of PyTorch's would say, see `pretrained.Notes`; None for a file
    of another kind."""
    if not layout.about:
        return None
    from vit_jax.data import from_config  # Slow to import.

    defaults = {f.name: f.default for f in dataclasses.fields(spec.module)}
    untold = {name: getattr(spec, name) for name in spec.untold}
    mean, std = (list(layout.about[name]) for name in ("mean", "std"))
    size = dict(zip(("height", "width"), spec.image_size, strict=True))
    # What these libraries do where nothing else is said.
    usual = (
        {"preprocessor": {"size": size, "resample": 2, "image_mean": mean, "image_std": std}}
        if layout.style.startswith("HF")
        else {"pretrained_cfg": {"mean": mean, "std": std}}
    )
    try:
        preprocess = from_config(layout.about["config"], spec.image_size)
        preprocess = preprocess or from_config(usual, spec.image_size)
    except UserError as e:
        raise UserError(f"{path}, the configuration beside it: {e}") from e
    labels = layout.about["labels"]
    if labels and spec.num_classes is None:
        _log.warning("%s: the config.json beside it names classes, but there is no head", path)
        labels = None
    if labels and len(labels) != spec.num_classes:
        raise UserError(
            f"{path}: the config.json beside it names {len(labels)} classes, but the head has "
            f"{spec.num_classes}: mend or remove its names (label_names, id2label)"
        )
    if not labels and spec.num_classes == 1000:  # Of ImageNet all libraries have one order.
        labels = class_names(1000)
        _log.warning("%s: nothing names its 1000 classes; taken as those of ImageNet", path)
    is_multi = layout.about["config"].get("problem_type") == "multi_label_classification"
    return {
        "classifier": spec.classifier,
        "image_size": spec.image_size,
        "preprocess": preprocess,
        "labels": labels,
        "untold": {name: value for name, value in untold.items() if value != defaults[name]},
        "loss": "sigmoid" if is_multi else "softmax",
    }


def read_spec(
    arrays: Mapping[str, Any],
    *,
    classifier: str | None = None,
    image_size: Size | None = None,
    likely_size: Size | None = None,
    untold: Mapping[str, Any] | None = None,
    window: int | None = None,
    where: str = "the checkpoint",
) -> Spec:
    """Finds out which network a set of arrays belongs to, and checks every one of them.

    Args:
      arrays: arrays (or anything with a shape) under today's names, see `layouts.to_linen`.
      classifier: what no array tells, if it is known: "unpooled" and "first" look like "gap",
        "token_unpooled" like "token". Without it the common ones: "map" with attention pooling,
        "token" with a class token, else "gap", with a warning.
      image_size: (height, width) that the stored position embeddings are for, if it is known.
        Without it a square grid is assumed where possible.
      likely_size: (height, width) to believe where no square grid is possible and it fits. Without
        it the most nearly square grid is assumed, lying, with a warning.
      untold: other fields that no array tells, see `ImageModel.untold`.
      window: see `Hints`.
      where: the file's name, for messages.

    Raises UserError for a classifier that the network can't have, or with the names of missing,
    unexpected and mis-shaped arrays, the first twenty of each.
    """
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    family = next((f for f in reversed(FAMILIES) if f.recognizes(shapes)), FAMILIES[0])
    if classifier is not None and classifier not in family.classifiers:
        raise UserError(
            f"{where}: its classifier is said to be {classifier!r}, but a {family.kind} has "
            f"{' or '.join(family.classifiers)}: mend what was given or noted beside it"
        )
    hints = Hints(classifier, image_size, likely_size, untold, where, window)
    spec = family.from_shapes(shapes, hints)
    for field in untold or {}:
        if field not in family.untold:
            raise UserError(
                f"{where}: {field} is given or noted beside it, but {spec.description} takes only "
                f"{', '.join(family.untold) or 'nothing of that kind'}: leave it out"
            )
    spec = spec.replace(**(untold or {}))
    check_arrays(arrays, spec, where=where)
    return spec


def check_arrays(arrays: Mapping[str, Any], spec: Spec, *, where: str) -> None:
    """Compares arrays with what an architecture needs.

    Raises UserError naming what is missing, unexpected, of another shape or not floating.
    """
    try:
        expected = spec.shapes()
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    found = {key: tuple(array.shape) for key, array in arrays.items()}
    both = sorted(expected.keys() & found.keys())
    wrong = [f"{k} {found[k]}, expected {expected[k]}" for k in both if found[k] != expected[k]]
    integers = [k for k in both if not jnp.issubdtype(arrays[k].dtype, jnp.floating)]
    problems = [
        listing("missing", [f"{k} {expected[k]}" for k in sorted(expected.keys() - found.keys())]),
        listing("unexpected", [f"{k} {found[k]}" for k in sorted(found.keys() - expected.keys())]),
        listing("wrong shape", wrong),
        listing("not floating", [f"{k} {arrays[k].dtype}" for k in integers]),
    ]
    if any(problems):
        found_problems = "; ".join(filter(None, problems))
        raise UserError(f"{where} does not fit {spec.description}: {found_problems}")


def nonfinite(arrays: Mapping[str, Any]) -> list[str]:
    """The arrays that hold NaN or infinity: "NAME COUNT of SIZE". One is in memory at a time."""
    bad = []
    for name, array in arrays.items():
        values = np.asarray(array)
        if count := values.size - np.count_nonzero(np.isfinite(values)):
            bad.append(f"{name} {count:,} of {values.size:,}")
    return bad
