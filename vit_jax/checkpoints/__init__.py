"""How weights come in and go out: every file layout, and nothing about training."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints.formats import (
    ENDINGS,
    check_ending,
    container,
    is_orbax,
    open_arrays,
    read_npz,
    split_tower,
    write_arrays,
    write_npz,
)
from vit_jax.checkpoints.infer import (
    NONFINITE,
    check_arrays,
    library_notes,
    nonfinite,
    open_network,
    read_spec,
)
from vit_jax.checkpoints.layouts import STYLES, Layout, read_layout, to_linen, to_style
from vit_jax.errors import UserError
from vit_jax.models.family import Spec
from vit_jax.models.shapes import listing

__all__ = [
    "ENDINGS",
    "NONFINITE",
    "STYLES",
    "Spec",
    "check_arrays",
    "check_ending",
    "container",
    "is_orbax",
    "library_notes",
    "load_weights",
    "nonfinite",
    "open_arrays",
    "open_network",
    "read_layout",
    "read_npz",
    "read_spec",
    "read_values",
    "save_weights",
    "split_tower",
    "to_linen",
    "to_style",
    "to_tree",
    "write_arrays",
    "write_npz",
]

_log = logging.getLogger(__name__)


def load_weights(
    path: str | os.PathLike,
    *,
    tower: str | None = None,
    values: bool = True,
    allow_nonfinite: bool = False,
    **hints: Any,
) -> tuple[dict[str, np.ndarray], Spec]:
    """Reads a file of weights of any kind, in any layout that was published.

    Args:
      path: an .npz or .safetensors file, or an Orbax folder.
      tower: of a file with several networks the one to take, see `layouts.read_layout`.
      values: False for the architecture alone: no value is read, and there are no arrays.
      allow_nonfinite: whether there may be NaN and infinity among the values.
      **hints: what the arrays can't tell: heads and pre_logits, see `infer.open_network`, and
        classifier, image_size, likely_size and untold, see `infer.read_spec`.

    Returns:
      (arrays, spec): float32 arrays under today's names, and the architecture they belong to.

    Raises UserError if the file can't be read, its arrays do not fit together, or some value is NaN
    or infinite. No value is read before they are known to fit.
    """
    with open_network(path, tower=tower, **hints) as (layout, spec):
        return read_values(layout, path, allow_nonfinite) if values else {}, spec


def read_values(
    layout: Layout, path: str | os.PathLike, allow_nonfinite: bool = False
) -> dict[str, np.ndarray]:
    """The arrays of an open file in float32. Raises UserError as `load_weights`."""
    found, bad = {}, []
    for key, array in layout.arrays.items():
        with np.errstate(over="ignore"):  # What is no float32 is told below.
            found[key] = np.asarray(array, np.float32)
        bad += nonfinite({key: found[key]})  # While it is in the processor's cache.
    if bad and not allow_nonfinite:
        raise UserError(
            f"{path} holds weights that are no numbers, {listing(NONFINITE, bad)}: the run "
            "that wrote it has diverged, or it is damaged; take an earlier checkpoint, or, to look "
            "at this one, load(..., allow_nonfinite=True)"
        )
    return found


def save_weights(
    path: str | os.PathLike, params: Mapping[str, Any], *, style: str = "linen"
) -> None:
    """Writes a parameter tree in an official layout, atomically.

    Args:
      path: a name that ends in .npz, .safetensors or .orbax, which says what to write.
      params: nested dict of arrays.
      style: one of STYLES: "linen" for today's key names, "prelinen" for those of the 2020 and 2021
        files, "2020" for those of the first hybrids.

    Raises UserError for another ending or style, or if it can't be written.
    """
    flat = {k: np.asarray(v) for k, v in sorted(flatten_dict(params, sep="/").items())}
    write_arrays(path, to_style(flat, style))
    if bad := nonfinite(flat):
        _log.warning("%s holds weights that are no numbers, %s", path, listing(NONFINITE, bad))


def to_tree(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"a/b": array} as a nested dict."""
    return unflatten_dict(dict(arrays), sep="/")
