"""Reading and writing weights as Orbax folders, leaf by leaf where Orbax lets one."""

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from vit_jax.checkpoints.lazy import Array, LazyArray
from vit_jax.checkpoints.npz import first_line
from vit_jax.errors import UserError

_MARKERS = ("_CHECKPOINT_METADATA", "_METADATA")


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint that Orbax wrote."""
    return any((Path(path) / name).is_file() for name in _MARKERS)


@contextlib.contextmanager
def open_orbax(path: str | os.PathLike) -> Iterator[dict[str, LazyArray]]:
    """The arrays of an Orbax folder; the names along the way to a leaf are joined with "/".

    Leaves that are no arrays are left out.

    Raises UserError if the folder can't be read; damaged values are noticed when they are read.
    """
    ocp = _orbax()
    path = Path(path).resolve()
    with _explained(path):
        found = ocp.metadata(path).metadata
        leaves, tree = jax.tree_util.tree_flatten_with_path(found)
        nothing = [...] * len(leaves)

    def opened(i: int, leaf: Any) -> LazyArray:
        def read() -> np.ndarray:
            # A value without memory that says: this leaf, as a NumPy array.
            wanted = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
            partial = jax.tree.unflatten(tree, [*nothing[:i], wanted, *nothing[i + 1 :]])
            with _explained(path):
                loaded = ocp.load(path, partial)
                array = jax.tree.leaves(loaded)[i]
                return np.asarray(array).reshape(leaf.shape)

        return LazyArray(leaf.shape, leaf.dtype, read)

    arrays: dict[str, LazyArray] = {}
    for i, (keys, leaf) in enumerate(leaves):
        if hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            if name in arrays:
                raise UserError(f"{path}: two arrays are named {name!r}: write the folder again")
            arrays[name] = opened(i, leaf)
    yield arrays


def write_orbax(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes arrays as an Orbax folder of the nested tree.

    All of them are in memory at once: Orbax takes only whole trees. The folder appears under its
    name only when it is complete; a checkpoint of that name is then removed.

    Raises UserError if it can't be written.
    """
    ocp = _orbax()
    path = Path(path).resolve()
    if path.exists() and not is_orbax(path):
        raise UserError(f"{path} is there and no Orbax folder: remove it, or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it first")
    tree = unflatten_dict({k: np.asarray(v) for k, v in arrays.items()}, sep="/")
    new, old = (path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}" for _ in range(2))
    try:
        with _explained(path, "written", "make room or mend the cause, then do it again"):
            ocp.save(new, tree)
            if path.exists():
                path.rename(old)
            new.rename(path)
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _explained(
    path: Path, done: str = "read", advice: str = "the folder is damaged or incomplete"
) -> Iterator[None]:
    """Tells what failed: Orbax and TensorStore raise errors of many kinds and many lines."""
    try:
        yield
    except Exception as e:
        raise UserError(f"{path} can't be {done} ({first_line(e)[:300]}): {advice}") from e


def _orbax() -> Any:
    # Slow to import, and it reports each of its doings through absl.
    from orbax.checkpoint import v1 as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    return ocp
