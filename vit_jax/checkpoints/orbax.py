"""Reading and writing weights as Orbax folders, some leaves at a time."""

import contextlib
import functools
import logging
import math
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

_BATCH = 1 << 25  # Bytes of the leaves that are read together.
_MARKERS = ("_CHECKPOINT_METADATA", "_METADATA")


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint that Orbax wrote."""
    return any((Path(path) / name).is_file() for name in _MARKERS)


@contextlib.contextmanager
def open_orbax(path: str | os.PathLike) -> Iterator[dict[str, LazyArray]]:
    """The arrays of an Orbax folder; the names along the way to a leaf are joined with "/".

    Orbax takes long to read one leaf, however small, so that small neighbours are read together;
    those read last are kept until others are asked for. Leaves that are no arrays are left out.

    Raises UserError if the folder can't be read; damaged values are noticed when they are read.
    """
    ocp = _orbax()
    path = Path(path).resolve()
    with _explained(path):
        leaves, tree = jax.tree_util.tree_flatten_with_path(ocp.metadata(path).metadata)
    arrays = {
        i: leaf
        for i, (_, leaf) in enumerate(leaves)
        if hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype)
    }
    if not arrays:  # What Orbax says of an empty tree, and of one that it can't read.
        raise UserError(f"{path}: Orbax finds no array in it: the folder is damaged or incomplete")
    batches = _batches({i: math.prod(a.shape) * a.dtype.itemsize for i, a in arrays.items()})

    @functools.lru_cache(maxsize=1)
    def read_batch(batch: range) -> dict[int, np.ndarray]:
        # Values without memory say: these leaves, as NumPy arrays; "..." says: not this one.
        wanted = {i: np.broadcast_to(np.zeros((), a.dtype), a.shape) for i, a in arrays.items()}
        partial = [wanted[i] if i in wanted and i in batch else ... for i in range(len(leaves))]
        with _explained(path):
            loaded = jax.tree.leaves(ocp.load(path, jax.tree.unflatten(tree, partial)))
            return {i: np.asarray(loaded[i]).reshape(arrays[i].shape) for i in batch if i in arrays}

    named: dict[str, LazyArray] = {}
    for i, array in arrays.items():
        name = jax.tree_util.keystr(leaves[i][0], simple=True, separator="/")
        if name in named:
            raise UserError(f"{path}: two arrays are named {name!r}: write the folder again")
        batch = next(batch for batch in batches if i in batch)
        read = functools.partial(lambda batch, i: read_batch(batch)[i], batch, i)
        named[name] = LazyArray(array.shape, array.dtype, read)
    yield named


def _batches(sizes: Mapping[int, int]) -> list[range]:
    """Cuts indices into runs of at most _BATCH bytes, or of one array that is larger."""
    batches, start, total = [], 0, 0
    for i, size in sizes.items():
        if total + size > _BATCH:
            batches.append(range(start, i))
            start, total = i, 0
        total += size
    return [*batches, range(start, max(sizes, default=-1) + 1)]


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
    keys = list(arrays)
    batches = _batches({i: arrays[key].nbytes for i, key in enumerate(keys)})
    # In a hidden folder, not hidden itself: Orbax overlooks its own parts if their names begin with
    # a point.
    work = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}"
    new, old = work / "new", work / "old"
    try:
        # Weights hardly shrink when compressed, and that takes another copy of them in memory.
        plain = ocp.options.ArrayOptions.Saving(use_compression=False)
        context = ocp.Context(array_options=ocp.options.ArrayOptions(saving=plain))
        with _explained(path, "written", "make room or mend the cause, then do it again"), context:
            for batch in batches:
                part = {keys[i]: np.asarray(arrays[keys[i]]) for i in batch}
                ocp.partial.save(new, unflatten_dict(part, sep="/"))
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
