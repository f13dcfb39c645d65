"""Folders of image files, one a class: DIR/<class>/* or DIR/{train,test}/<class>/*."""

import os
import stat
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np

from vit_jax.data.source import Source, Splits, held_out_splits, some_of, split_name
from vit_jax.errors import UserError
from vit_jax.escape import printable
from vit_jax.files import open_file

# What is called so is taken for an image without opening it: a folder may hold a million, far away.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".npy"),
)
# And this for none, as there may be one beside each image. The content tells what others are.
_NO_IMAGES = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf"),
    *(".npz", ".zip", ".gz", ".tgz", ".tar", ".mp4", ".avi", ".mov", ".wav", ".py", ".ipynb"),
)
_OF_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx", "@eadir")  # As hidden as what has a dot.
_HIDDEN, _IMAGE, _FOLDER = "hidden", "image", "folder"


class Folder(NamedTuple):
    """The sorted names of the folders and images in a folder, and how much else, by kind."""

    folders: list[str]
    images: list[str]
    left_out: Counter[str]


def folder_splits(dataset: str, seed: int) -> Splits:
    """The splits of a folder of images; without any a fifth is held out.

    Raises UserError if it isn't plain which folders are classes.
    """
    notes: list[str] = []
    told: list[str] = []
    doubts: list[str] = []
    root, top = _enter(os.path.expanduser(dataset), notes, doubts)
    parts: dict[str, str] = {}
    for name in top.folders:
        if not (split := split_name(name)):
            continue
        path, content = _enter(os.path.join(root, name), told, doubts, split)
        if content.folders and split in parts:
            raise UserError(
                f"{dataset}: both {parts[split]!r} and {name!r} are named like the split "
                f"{split!r}; rename one"
            )
        if content.folders:
            parts[split] = os.path.relpath(path, root).replace(os.sep, "/")
            told += [f"{name} is the split {split}"] * (split != name)
    # A folder called "train" is the training split if it holds folders; else a class of trains.
    if "train" in parts or (parts and len(parts) == len(top.folders)):
        order = sorted(parts, key=("train", "test", "validation", "val").index)
        names = list_images(os.path.join(root, parts[order[0]]), links=True).folders
        used = {folder.partition("/")[0] for folder in parts.values()}
        beside = [name for name in top.folders if name not in used]
        if beside:
            doubts.append(f"left out in {root}: folders beside the splits, {some_of(beside)}")
        _tell_left_out(root, top, notes, doubts)
        return {
            split: partial(_open_split, dataset, root, parts[split], names, notes + told, doubts)
            for split in order
        }
    expected = f"expected {dataset}/<class>/*.jpg or {dataset}/train/<class>/*.jpg"
    if _are_like_splits(root, top.folders):
        raise UserError(
            f"{dataset}: it isn't plain whether the folders {some_of(top.folders)} are splits or "
            f"classes, {expected}; rename them, or give a table of the images"
        )
    if not top.folders:
        found = ", ".join([f"{len(top.images):,} images", *counted(top.left_out)])
        raise UserError(f"{dataset}: no class folders (found {found} and no folder), {expected}")
    return held_out_splits(
        partial(_open_split, dataset, root, "", top.folders, notes, doubts), seed
    )


def _enter(path: str, notes: list[str], doubts: list[str], split: str = "") -> tuple[str, Folder]:
    """A folder, or the one that all of it lies in, if that is none of images and isn't named like
    another split. (As there is but one, it can't be a class.)"""
    content = list_images(path, links=True)
    while len(content.folders) == 1 and split_name(content.folders[0]) in ("", split):
        below = os.path.join(path, content.folders[0])
        inner = list_images(below, links=True)
        if len(inner.folders) < 1 + bool(inner.images):
            break  # It is a class.
        notes.append(f"{below} was entered, the only folder there")
        _tell_left_out(path, content, notes, doubts)
        path, content = below, inner
    return path, content


def _are_like_splits(root: str, folders: list[str]) -> bool:
    """Whether several are named like splits, or all hold folders of the same names and no image."""
    if len({split_name(name) for name in folders} - {""}) > 1:
        return True
    names: list[str] = []
    for folder in folders:
        content = list_images(os.path.join(root, folder))
        if content.images or not content.folders or (names and names != content.folders):
            return False
        names = content.folders
    return len(folders) > 1


def _open_split(
    dataset: str, root: str, split: str, names: list[str], notes: list[str], doubts: list[str]
) -> Source:
    """Lists the images below root/split, class by class, without reading them."""
    path, notes, doubts = os.path.join(root, split), [*notes], [*doubts]
    top = list_images(path, links=True)
    ids_of = {name: i for i, name in enumerate(names)}
    keys, counts, below = [], [], Folder([], top.images, top.left_out)
    for name in top.folders:
        if name not in ids_of:
            raise UserError(
                f"{path}: class {name!r} is not among the training classes; rename its folder or "
                "add training images"
            )
        left_out: Counter[str] = Counter()
        found = images_below(os.path.join(path, name), left_out)
        if not found:
            raise UserError(
                f"{os.path.join(path, name)}: no images in this class folder (found "
                f"{', '.join(counted(left_out)) or 'nothing'}); add some or remove the folder"
            )
        keys.append(packed([f"{split}/{name}/{image}".lstrip("/") for image in found]))
        counts.append(len(found))
        top.left_out.update(left_out)
    _tell_left_out(path.rstrip("/"), below, notes, doubts)
    return Source(
        name=dataset,
        labels=tuple(names),
        channels=channels_of(root, keys[0][0]),
        keys=np.concatenate(keys),
        label_ids=np.repeat(np.array([ids_of[name] for name in top.folders], np.int32), counts),
        read_key=partial(content_below, root),
        describe_key=partial(os.path.join, root),
        notes=tuple(notes),
        doubts=tuple(doubts),
    )


def images_below(path: str, left_out: Counter[str]) -> list[str]:
    """Sorted paths of the images in and below a class folder, with "/" on every system."""
    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        content = list_images(os.path.join(path, folder) if folder else path)
        found += [folder + name for name in content.images]
        folders += [f"{folder}{name}/" for name in content.folders]
        left_out.update(content.left_out)
    return sorted(found)


def list_images(path: str, *, links: bool = False) -> Folder:
    """Lists a folder, and opens what tells by its name neither that it is an image nor that not.

    Args:
      links: whether links to folders are folders. Below a class they may lead in a circle.

    Raises UserError if the folder can't be opened, or such a link leads nowhere or in a circle.
    """
    found = Folder([], [], Counter())
    names = {_FOLDER: found.folders, _IMAGE: found.images}
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                kind = _kind(entry, links)
                if kind in names:
                    names[kind].append(entry.name)
                else:
                    found.left_out[kind] += 1
    except OSError as error:
        raise UserError(
            f"{path}: can't be opened ({error.strerror}), expected a readable folder of images"
        ) from None
    found.folders.sort()
    found.images.sort()
    return found


def _kind(entry: os.DirEntry[str], links: bool) -> str:
    name = entry.name.lower()
    if name.startswith(".") or name in _OF_SYSTEMS:
        return _HIDDEN
    is_link, is_file = entry.is_symlink(), entry.is_file(follow_symlinks=False)
    if name.endswith(ENDINGS) and (is_file or is_link):
        return _IMAGE  # What a link leads to is found out when it is read.
    if is_link:
        try:
            mode = os.stat(entry.path).st_mode
        except OSError as error:
            if not links:
                return "links that lead nowhere"
            raise UserError(
                f"{entry.path}: a link that leads nowhere ({error.strerror}), expected a folder; "
                "mend or remove it"
            ) from None
        if stat.S_ISDIR(mode) and links:
            _refuse_circle(entry.path)
            return _FOLDER
        if stat.S_ISDIR(mode):
            return "links to folders"
        is_file = stat.S_ISREG(mode)
    elif entry.is_dir():
        return _FOLDER
    if not is_file:
        return "pipes or devices"
    return other_kind(entry.path) or _IMAGE


def other_kind(path: str) -> str:
    """The ending of a file that is no image by its name or content; "" of an image."""
    name = os.path.basename(path).lower()
    ending = os.path.splitext(name)[1]
    if name.endswith(ENDINGS) or (ending not in _NO_IMAGES and _is_image(path)):
        return ""
    return ending or "no ending"


def _refuse_circle(path: str) -> None:
    target, here = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    if os.path.commonpath([target, here]) == target:
        raise UserError(
            f"{path}: a link that leads in a circle, to {target}, which it lies in; expected the "
            "folder of a class; remove it"
        )


def _is_image(path: str) -> bool:
    from vit_jax.data.headers import kind_of

    try:
        with open_file(path) as file:
            return bool(kind_of(file.read(64)))
    except OSError:
        return True  # It may be one: reading it says what is the matter.


def _tell_left_out(where: str, content: Folder, notes: list[str], doubts: list[str]) -> None:
    """Adds what of a folder is not used to the notes, or to the doubts if it may be images."""
    harmless = {kind: n for kind, n in content.left_out.items() if kind in (_HIDDEN, *_NO_IMAGES)}
    if harmless:
        notes.append(f"left out in {where}: {', '.join(counted(Counter(harmless)))}")
    if others := content.left_out - Counter(harmless):
        doubts.append(
            f"left out in {where}, as they are no images that can be read: "
            f"{', '.join(counted(others))}; convert or remove them"
        )
    if content.images:
        doubts.append(
            f"left out in {where}: images beside the folders, {len(content.images):,}; put them in "
            "folders of classes or remove them"
        )


def counted(kinds: Counter[str]) -> list[str]:
    """As "12 (.txt)", the most first, a few of them."""
    first = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:8]
    told = [f"{count:,} ({printable(kind)})" for kind, count in first]
    return told + [f"{len(kinds) - 8:,} more kinds"] * (len(kinds) > 8)


# What tables of images need, too.


def packed(names: list[str]) -> np.ndarray:
    """Texts in about half of a list's memory, unless one of them is no Unicode."""
    try:
        return np.array(names, np.dtypes.StringDType())
    except UnicodeEncodeError:
        return np.array(names, object)


def content_below(root: str, key: str) -> bytes:
    """The content of the file of an image at a path below a folder."""
    from vit_jax.data import images  # Loads OpenCV.

    return images.content(os.path.join(root, key))


def channels_of(root: str, key: str) -> int:
    """Of all images, by the first: what an array or a TIFF has, 3 of other kinds and of grey ones.

    It is looked into unless it is named as one that has no more. One that can't be read is told
    when it is read.
    """
    if key.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")):
        return 3
    from vit_jax.data.headers import kind_of, read_header

    try:
        content = content_below(root, key)
        known = kind_of(content) in ("TIFF", "NumPy")
        return {1: 3}.get(found := read_header(content).channels, found) if known else 3
    except UserError:
        return 3
