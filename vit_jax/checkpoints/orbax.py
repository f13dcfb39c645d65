"""Reading and writing weights as Orbax folders, one large array or some small ones at a time."""

import contextlib
import functools
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
from vit_jax.checkpoints.zarr import ZarrFolder
from vit_jax.errors import UserError

_BATCH = 1 << 25  # Bytes of the arrays that are written together.
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
        leaves = jax.tree_util.tree_leaves_with_path(ocp.metadata(path).metadata)
        folder = ZarrFolder(_folder(path))

    def read(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        with _explained(path):
            return folder.read(name).astype(dtype, copy=False).reshape(shape)

    named: dict[str, LazyArray] = {}
    for keys, leaf in leaves:
        if not isinstance(getattr(leaf, "dtype", None), np.dtype):
            continue
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if name in named:
            raise UserError(f"{path}: two arrays are named {name!r}: write the folder again")
        stored = jax.tree_util.keystr(keys, simple=True, separator=".")
        values = functools.partial(read, stored, leaf.shape, leaf.dtype)
        named[name] = LazyArray(leaf.shape, leaf.dtype, values)
    if not named:  # What Orbax says of an empty tree, and of one that it can't read.
        raise UserError(f"{path}: Orbax finds no array in it: the folder is damaged or incomplete")
    yield named


def _folder(path: Path) -> Path:
    """Where the tree is that Orbax takes, of a folder that may have several."""
    folders = (path, path / "state", *sorted(path.iterdir()))
    return next(folder for folder in folders if (folder / "_METADATA").is_file())


def _batches(arrays: Mapping[str, Array]) -> Iterator[list[str]]:
    """Names of arrays of at most _BATCH bytes together, or of one that is larger."""
    batch: list[str] = []
    for name, array in arrays.items():
        if batch and sum(arrays[n].nbytes for n in batch) + array.nbytes > _BATCH:
            yield batch
            batch = []
        batch.append(name)
    yield batch


def write_orbax(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes arrays as an Orbax folder of the nested tree.

    Small neighbours are read and written together, so that no more than they, or one larger array,
    are in memory. The folder appears under its name only when it is complete; a checkpoint of that
    name is then removed.

    Raises UserError if it can't be written.
    """
    ocp = _orbax()
    path = Path(path).resolve()
    if path.exists() and not is_orbax(path):
        raise UserError(f"{path} is there and no Orbax folder: remove it, or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it first")
    # In a hidden folder, not hidden itself: Orbax overlooks its own parts if their names begin with
    # a point.
    work = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}"
    new, old = work / "new", work / "old"
    try:
        context = ocp.Context()
        # Weights hardly shrink when compressed, and that takes another copy of them in memory.
        context.array.saving.use_compression = False
        context.memory.deepcopy_host_arrays = False
        with _explained(path, "written", "make room or mend the cause, then do it again"), context:
            for batch in _batches(arrays):
                part = {name: np.asarray(arrays[name]) for name in batch}
                ocp.partial.save(new, unflatten_dict(part, sep="/"))
                del part  # Before the next are read.
            ocp.partial.finalize(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)


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
    # Slow to import, and it reports each of its doings through absl, and each failure of one array
    # through asyncio too.
    from orbax.checkpoint import v1 as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return ocp
