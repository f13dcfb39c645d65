"""Folders of pictures: DIR/{train,test}/<class>/* or DIR/<class>/*."""

import hashlib
import os
from collections.abc import Callable
from functools import partial

import numpy as np

from vit_jax.data.sources import Source, Splits
from vit_jax.errors import UserError

TEST_FRACTION = 0.2  # of each class, where a folder brings no test pictures of its own
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def folder_splits(dataset: str, seed: int) -> Splits:
    """The parts of a folder of pictures, see `open_source`."""
    root = os.path.expanduser(dataset)
    folders, files = _list(root)
    # A folder called "train" is the training part if it holds folders; else it's a class of trains.
    parts = [name for name in ("train", "test", "validation", "val") if name in folders]
    parts = [name for name in parts if _list(os.path.join(root, name))[0]]
    if parts and ("train" in parts or set(parts) == set(folders)):
        labels = tuple(_list(os.path.join(root, parts[0]))[0])
        splits: Splits = {p: partial(_scan, dataset, root, p, labels) for p in parts}
        held_out = [name for name in parts if name != "train"]
        if held_out:
            splits.setdefault("test", splits[held_out[0]])
        return splits
    if not folders:
        raise UserError(
            f"{dataset}: no class folders (found {files} pictures and no folder), expected "
            f"{dataset}/<class>/*.jpg or {dataset}/train/<class>/*.jpg"
        )
    open_whole = partial(_scan, dataset, root, "", tuple(folders))
    return held_out_splits(open_whole, seed)


def held_out_splits(open_whole: Callable[[], Source], seed: int) -> Splits:
    """Holds a fifth of each class out for testing."""
    return {
        "train": lambda: _stratified(open_whole(), seed, test=False),
        "test": lambda: _stratified(open_whole(), seed, test=True),
    }


def _scan(dataset: str, root: str, part: str, labels: tuple[str, ...]) -> Source:
    """Lists the pictures below root/part, class by class, without reading them."""
    where = os.path.join(dataset, part) if part else dataset
    folders = _list(os.path.join(root, part))[0]
    ids_of = {name: i for i, name in enumerate(labels)}
    for name in folders:
        if name not in ids_of:
            raise UserError(
                f"{where}: class {name!r} is not among the training classes; rename its folder or "
                "add training pictures"
            )
    if len(labels) == 1:
        raise UserError(
            f"{where}: only one class ({labels[0]!r}), expected two folders or more, one a class"
        )
    keys: list[str] = []
    ids: list[int] = []
    for name in folders:
        found = sorted(_pictures(root, f"{part}/{name}" if part else name))
        if not found:
            raise UserError(
                f"{os.path.join(where, name)}: no pictures in this class folder, expected files "
                f"ending in {', '.join(EXTENSIONS)}; add some or remove the folder"
            )
        keys += found
        ids += [ids_of[name]] * len(found)
    return Source(
        name=dataset,
        labels=labels,
        channels=3,
        keys=keys,
        label_ids=np.array(ids, np.int32),
        read_key=partial(_read_file, root),
        describe_key=partial(os.path.join, root),
    )


def _read_file(root: str, key: str) -> bytes:
    from vit_jax.data import pictures  # loads OpenCV

    return pictures.content(os.path.join(root, key))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What lies in a folder, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder}: can't be opened ({error.strerror}), expected a readable folder of pictures"
        ) from None


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _list(folder: str) -> tuple[list[str], int]:
    """The sorted names of the folders in a folder, and how many pictures lie beside them."""
    entries = _entries(folder)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    return folders, sum(_is_picture(entry.name) for entry in entries)


def _pictures(root: str, folder: str) -> list[str]:
    """Paths of the pictures below a class folder, relative to root, with "/" on every system."""
    found = []
    for entry in _entries(os.path.join(root, folder)):
        # Links to folders are followed to a class, not below it: they may lead in a circle.
        if entry.is_dir(follow_symlinks=False):
            found += _pictures(root, f"{folder}/{entry.name}")
        elif _is_picture(entry.name):
            found.append(f"{folder}/{entry.name}")
    return found


def _stratified(whole: Source, seed: int, *, test: bool) -> Source:
    """Holds a fifth of each class out, chosen by a hash of (seed, relative path).

    A hash, not a random generator, so that the split is the same under every version of NumPy.
    """
    ranks = [
        hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()
        for key in whole.keys
    ]
    held_out = np.zeros(len(whole), bool)
    # With several labels a picture there are no classes to share out.
    label_ids = np.zeros(len(whole)) if whole.multi_label else whole.label_ids
    for label in range(1 if whole.multi_label else len(whole.labels)):
        members = np.flatnonzero(label_ids == label)
        count = round(TEST_FRACTION * len(members))
        held_out[sorted(members, key=ranks.__getitem__)[:count]] = True
    if test and not held_out.any():
        raise UserError(
            f"{whole.name}: too few pictures to hold any out for testing ({len(whole)} in "
            f"{len(whole.labels)} classes), expected 3 a class at least; add pictures"
        )
    return whole.take(np.flatnonzero(held_out == test))
