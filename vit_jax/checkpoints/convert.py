"""From one file of weights to another, one array at a time."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.checkpoints.formats import (
    LazyArray,
    check_ending,
    notes_beside,
    split_tower,
    write_arrays,
)
from vit_jax.checkpoints.infer import NONFINITE, library_notes, nonfinite, open_network
from vit_jax.checkpoints.layouts import to_style
from vit_jax.errors import UserError
from vit_jax.files import atomic_write, expand_user
from vit_jax.models import Spec
from vit_jax.models.shapes import listing

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_log = logging.getLogger(__name__)


class Converted(NamedTuple):
    """What `convert` wrote: the architecture, the number of arrays, and the files."""

    spec: Spec
    arrays: int
    files: tuple[Path, ...]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    style: str = "linen",
    dtype: str | None = None,
    heads: int | None = None,
    window: int | None = None,
    force: bool = False,
) -> Converted:
    """Writes weights again as another kind of file, or in another layout.

    One array is in memory at a time, two where its type changes; Orbax may need three. Without
    `dtype` every value keeps its bits. Of a file that holds more than the network (an optimizer, a
    second tower) only the network is taken. The .json with the labels and the preprocessing beside
    the source, and the vocabulary of a LiT bundle, come along.

    Args:
      source: any file that `formats.open_arrays` opens, with ":img" behind it for one tower of it.
      target: a name that ends in .npz, .safetensors or .orbax (a folder).
      style: the layout to write, one of `layouts.STYLES`.
      dtype: "float32" or "bfloat16", what to store numbers as; None for what they are.
      heads: attention heads, if the source is a file of PyTorch's that doesn't tell them.
      window: of a Swin Transformer, if nothing tells it.
      force: whether files that are there may be replaced.

    Raises UserError if the source is not understood, the target is there already, or the notes of
    the whole source would be taken for those of one tower.
    """
    check_ending(target)
    to_style({}, style)  # An unknown style is refused before anything is read.
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    path, tower = split_tower(source)
    path, target = Path(expand_user(path)), Path(expand_user(target))
    notes = notes_beside(path)
    if tower and notes and notes.resolve() == target.with_suffix(".json").resolve():
        raise UserError(
            f"{target} would share {notes}, which is about all of {path}: choose a "
            "name with another beginning"
        )
    hints = dict(heads=heads, window=window) | _noted(path, tower)
    with open_network(path, tower=tower, **hints) as opened:
        layout, spec = opened
        arrays, told = layout.arrays, library_notes(layout, spec, path)
        endings = (".json", ".txt", ".model") if spec.classifies_by_text else (".json",)
        check_notes(target, path)
        pairs = [(notes_beside(path, ending), target.with_suffix(ending)) for ending in endings]
        sidecars = [
            (old, new) for old, new in pairs if old is None or old.resolve() != new.resolve()
        ]
        check_free([target, *(new for _, new in sidecars)], force)
        if dtype is not None:
            arrays = {key: array.astype(DTYPES[dtype]) for key, array in arrays.items()}
        bad: list[str] = []

        def watched(key: str, array: Any) -> LazyArray:
            def read() -> np.ndarray:
                values = np.asarray(array)
                bad.extend(nonfinite({key: values}))
                return values

            return LazyArray(array.shape, array.dtype, read)

        arrays = {key: watched(key, array) for key, array in arrays.items()}
        write_arrays(target, to_style(arrays, style))
    if bad:  # Whoever converts a broken run's weights wants them as they are.
        _log.warning("%s holds weights that are no numbers, %s", target, listing(NONFINITE, bad))
    written = [target]
    for old, new in sidecars:
        # The notes of a whole file are not those of one tower.
        if old and tower is None:
            with atomic_write(new) as out:
                out.write(old.read_bytes())
            written.append(new)
        elif told:  # What their files don't say stands in other files beside them.
            with atomic_write(new) as out:
                out.write(json.dumps(told, indent=1, ensure_ascii=False).encode() + b"\n")
            written.append(new)
        else:  # Notes of the weights that were there before would be wrong for these.
            new.unlink(missing_ok=True)
    return Converted(spec, len(arrays), tuple(written))


def check_notes(target: Path, source: Path) -> None:
    """Raises UserError if the notes beside a new file would be the file that it is made of."""
    if target.with_suffix(".json").resolve() == source.resolve():
        raise UserError(f"the notes of {target} would replace {source}: choose another name")


def check_free(files: Iterable[Path], force: bool) -> None:
    """Raises UserError if one of them is there and may not be replaced."""
    there = [str(file) for file in files if file.exists()]
    if there and not force:
        raise UserError(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} there already: choose "
            "another name, or say --force"
        )


def _noted(path: Path, tower: str | None) -> dict[str, Any]:
    """What the notes beside weights tell of the network and its arrays may leave open.

    Raises UserError if they are damaged: they would be copied.
    """
    file = notes_beside(path)
    if file is None:
        return {}
    try:
        notes = json.loads(file.read_bytes())
        height, width = notes["image_size"]
        if not type(height) is type(width) is int:
            raise ValueError(f"image_size is {height!r}, {width!r}")
        told: dict[str, Any] = {"image_size": (height, width)}
        if not tower:  # Of which the notes of the whole file tell no more.
            told |= {"classifier": notes.get("classifier"), "untold": dict(notes.get("untold", {}))}
        return told
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{file} is damaged ({type(e).__name__}: {e}): mend it, or remove it"
        ) from e
