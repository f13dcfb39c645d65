"""Folders of images: DIR/{train,test}/<class>/* or DIR/<class>/*."""

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from vit_jax.data.sources import Source, Splits
from vit_jax.errors import UserError
from vit_jax.files import cache_folder

TEST_FRACTION = 0.2  # of each class, where a folder brings no test images of its own
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
CACHED_FROM = 10_000  # images; fewer are listed anew each time
# A folder changed so lately may change again without its times telling: FAT counts in 2 seconds.
_SETTLED_NS = 3_000_000_000

_Entries = tuple[list[str], list[str], list[str]]


def folder_splits(dataset: str, seed: int) -> Splits:
    """The parts of a folder of images, see `open_source`."""
    root = os.path.expanduser(dataset)
    folders, files = _classes(_Listing(root))
    # A folder called "train" is the training part if it holds folders; else it's a class of trains.
    parts = [name for name in ("train", "test", "validation", "val") if name in folders]
    parts = [name for name in parts if _classes(_Listing(os.path.join(root, name)))[0]]
    if parts and ("train" in parts or set(parts) == set(folders)):
        labels = tuple(_classes(_Listing(os.path.join(root, parts[0])))[0])
        splits: Splits = {p: partial(_scan, dataset, root, p, labels) for p in parts}
        held_out = [name for name in parts if name != "train"]
        if held_out:
            splits.setdefault("test", splits[held_out[0]])
        return splits
    if not folders:
        raise UserError(
            f"{dataset}: no class folders (found {files} images and no folder), expected "
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
    """Lists the images below root/part, class by class, without reading them."""
    where = os.path.join(dataset, part) if part else dataset
    listing = _Listing(os.path.join(root, part))
    folders, _ = _classes(listing)
    ids_of = {name: i for i, name in enumerate(labels)}
    for name in folders:
        if name not in ids_of:
            raise UserError(
                f"{where}: class {name!r} is not among the training classes; rename its folder or "
                "add training images"
            )
    if len(labels) == 1:
        raise UserError(
            f"{where}: only one class ({labels[0]!r}), expected two folders or more, one a class"
        )
    keys, counts = [], []
    for name in folders:
        found = sorted(_images(listing, name))
        if not found:
            raise UserError(
                f"{os.path.join(where, name)}: no images in this class folder, expected files "
                f"ending in {', '.join(EXTENSIONS)}; add some or remove the folder"
            )
        keys.append(_packed([f"{part}/{path}" for path in found] if part else found))
        counts.append(len(found))
    listing.save()
    return Source(
        name=dataset,
        labels=labels,
        channels=3,
        keys=np.concatenate(keys),
        label_ids=np.repeat(np.array([ids_of[name] for name in folders], np.int32), counts),
        read_key=partial(_read_file, root),
        describe_key=partial(os.path.join, root),
    )


def _packed(names: list[str]) -> np.ndarray:
    """Texts in about half of a list's memory, unless one of them is no Unicode."""
    try:
        return np.array(names, np.dtypes.StringDType())
    except UnicodeEncodeError:
        return np.array(names, object)


def _read_file(root: str, key: str) -> bytes:
    from vit_jax.data import images  # loads OpenCV

    return images.content(f"{root}/{key}")


class _Listing:
    """What lies in a folder and below, kept in the cache from one opening to the next.

    Each folder whose times tell that it was changed since is listed anew. Images are never
    examined: that one has another content makes no difference to a listing.
    """

    def __init__(self, root: str):
        self.root = root
        place = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        self._file = cache_folder() / "listings" / f"{place}.json"
        self._known: dict[str, list[str]] | None = None  # folder: times, then names by kind
        self._used: dict[str, list[str]] = {}
        self._changed = False

    def entries(self, folder: str) -> _Entries:
        """The sorted names of the folders, images and other links in a folder below the root.

        Hidden ones are left out. Raises UserError if the folder can't be opened.
        """
        path = os.path.join(self.root, folder) if folder else self.root
        try:
            now = time.time_ns()
            status = os.stat(path)
            stamp = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
            kept = self._kept().get(folder, [])
            if len(kept) != 4 or kept[0] != stamp:
                kept = [stamp, *("/".join(names) for names in _list(path))]
                self._changed = True
        except OSError as error:
            raise UserError(
                f"{path}: can't be opened ({error.strerror}), expected a readable folder of images"
            ) from None
        if now - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            self._used[folder] = kept
        folders, images, links = (names.split("/") if names else [] for names in kept[1:])
        return folders, images, links

    def save(self) -> None:
        """Keeps what was listed. No cache is no harm: errors in writing it are passed over."""
        count = sum(kept[2].count("/") + 1 for kept in self._used.values())
        if not self._changed or count < CACHED_FROM:
            return
        temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._used))
            os.replace(temporary, self._file)

    def _kept(self) -> dict[str, list[str]]:
        if self._known is None:
            try:
                self._known = dict(json.loads(self._file.read_text()))
            except (OSError, ValueError, TypeError):  # not there, or damaged
                self._known = {}
        return self._known


def _list(path: str) -> _Entries:
    folders, images, links = [], [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                continue  # Opening a named pipe would wait for ever.
            elif entry.name.lower().endswith(EXTENSIONS):
                images.append(entry.name)
            elif entry.is_symlink():
                links.append(entry.name)
    return sorted(folders), sorted(images), sorted(links)


def _classes(listing: _Listing) -> tuple[list[str], int]:
    """The sorted names of the folders in a folder, and how many images lie beside them."""
    folders, images, links = listing.entries("")
    for link in links:
        path = os.path.join(listing.root, link)
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except OSError as error:
            raise UserError(
                f"{path}: a link that leads nowhere ({error.strerror}), expected a folder; mend or "
                "remove it"
            ) from None
        if is_folder:
            target, here = os.path.realpath(path), os.path.realpath(listing.root)
            if os.path.commonpath([target, here]) == target:
                raise UserError(
                    f"{path}: a link that leads in a circle, to {target}, which it lies in; "
                    "expected the folder of a class; remove it"
                )
            folders.append(link)
    return sorted(folders), len(images)


def _images(listing: _Listing, folder: str) -> list[str]:
    """Paths of the images below a class folder, with "/" on every system."""
    # Links to folders are followed to a class, not below it: they may lead in a circle.
    folders, images, _ = listing.entries(folder)
    found = [f"{folder}/{name}" for name in images]
    for name in folders:
        found += _images(listing, f"{folder}/{name}")
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
    # With several labels an image there are no classes to share out.
    label_ids = np.zeros(len(whole)) if whole.multi_label else whole.label_ids
    for label in range(1 if whole.multi_label else len(whole.labels)):
        members = np.flatnonzero(label_ids == label)
        count = round(TEST_FRACTION * len(members))
        held_out[sorted(members, key=ranks.__getitem__)[:count]] = True
    return whole.take(np.flatnonzero(held_out == test))
