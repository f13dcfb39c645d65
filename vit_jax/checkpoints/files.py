"""One door to files of weights: .npz, .safetensors and Orbax folders."""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from vit_jax.checkpoints.lazy import Array, LazyArray
from vit_jax.checkpoints.npz import open_npz, unreadable, write_npz
from vit_jax.checkpoints.orbax import is_orbax, open_orbax, write_orbax
from vit_jax.checkpoints.safetensors import open_safetensors, write_safetensors
from vit_jax.errors import UserError

_WRITERS = {".npz": write_npz, ".safetensors": write_safetensors, ".orbax": write_orbax}

# The endings by which `write_arrays` knows what to write.
ENDINGS = tuple(_WRITERS)


def open_arrays(
    path: str | os.PathLike,
) -> contextlib.AbstractContextManager[dict[str, LazyArray]]:
    """Opens a file of weights of any kind, which is seen from its content.

    Returns:
      a context manager of {name: array}; the arrays can be read while it is open.

    Raises UserError if there is no such file, it is of no known kind, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        if is_orbax(path):
            return open_orbax(path)
        raise UserError(
            f"{path} is a folder, but none that Orbax wrote: expected a file of weights"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as e:
        raise unreadable(path, e) from e
    if start[:4] == b"PK\x03\x04":
        return open_npz(path)
    if start[8:] == b"{":
        return open_safetensors(path)
    found = f"a file that starts with {start!r}" if start else "an empty file"
    raise UserError(
        f"{path} holds no weights: expected an .npz or .safetensors file or an Orbax folder, "
        f"found {found}"
    )


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes arrays in their order to the kind of file that the name's ending says.

    One array is in memory at a time; for ".orbax", a folder, small ones together. What was there
    under that name is replaced when the new one is complete.

    Raises UserError for another ending, or if it can't be written.
    """
    check_ending(path)
    _WRITERS[Path(path).suffix](path, arrays)


def check_ending(path: str | os.PathLike) -> None:
    """Raises UserError unless `write_arrays` knows what to write under this name."""
    if Path(path).suffix not in _WRITERS:
        raise UserError(
            f"can't tell what to write as {Path(path).name!r}: expected a name that ends in "
            f"{' or '.join(ENDINGS)}"
        )


def split_tower(source: str | os.PathLike) -> tuple[str | os.PathLike, str | None]:
    """Takes a tower's name off a file's: "siglip.npz:img" -> ("siglip.npz", "img").

    A file that really has that name is left alone, and so is a name without a tower.
    """
    match = re.fullmatch(r"(.+):([A-Za-z]\w*)", os.fspath(source))
    if match is None or os.path.exists(source):
        return source, None
    return match[1], match[2]
