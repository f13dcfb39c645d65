"""Image files on disk: folders of them, one a class, and tables that name them.

Folders are DIR/{train,test}/<class>/* or DIR/<class>/*. Tables are FILE.csv or FILE.jsonl, or
DIR/train.csv beside DIR/test.csv; a row is an image: `path`, relative to the table's folder;
`label`, or several as "cat;dog"; and perhaps the `split` that it belongs to.
"""

import contextlib
import csv
import difflib
import hashlib
import io
import json
import os
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.source import Source, Splits, held_out_splits
from vit_jax.errors import UserError
from vit_jax.files import cache_folder, list_folder, open_file

SPLITS = ("train", "test", "validation", "val")  # What folders and tables of splits are called.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
CACHED_FROM = 10_000  # Images; fewer are listed anew each time.
# A folder changed so lately may change again without its times telling: FAT counts in 2 seconds.
_SETTLED_NS = 3_000_000_000


def _packed(names: list[str]) -> np.ndarray:
    """Texts in about half of a list's memory, unless one of them is no Unicode."""
    try:
        return np.array(names, np.dtypes.StringDType())
    except UnicodeEncodeError:
        return np.array(names, object)


def _content(root: str, key: str) -> bytes:
    from vit_jax.data import images  # Loads OpenCV.

    return images.content(os.path.join(root, key))


# Folders.


def folder_splits(dataset: str, seed: int) -> Splits:
    """The splits of a folder of images; without any a fifth is held out."""
    root = os.path.expanduser(dataset)
    folders, files = _classes(_Listing(root))
    # A folder called "train" is the training split if it holds folders; else a class of trains.
    classes = {
        split: _classes(_Listing(os.path.join(root, split)))[0]
        for split in SPLITS
        if split in folders
    }
    classes = {split: names for split, names in classes.items() if names}
    if classes and ("train" in classes or set(classes) == set(folders)):
        labels = tuple(next(iter(classes.values())))
        return {split: partial(_folder_source, dataset, root, split, labels) for split in classes}
    if not folders:
        raise UserError(
            f"{dataset}: no class folders (found {files} images and no folder), expected "
            f"{dataset}/<class>/*.jpg or {dataset}/train/<class>/*.jpg"
        )
    return held_out_splits(partial(_folder_source, dataset, root, "", tuple(folders)), seed)


def _folder_source(dataset: str, root: str, split: str, labels: tuple[str, ...]) -> Source:
    """Lists the images below root/split, class by class, without reading them."""
    where = os.path.join(dataset, split) if split else dataset
    listing = _Listing(os.path.join(root, split))
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
        found = sorted(_images_below(listing, name))
        if not found:
            raise UserError(
                f"{os.path.join(where, name)}: no images in this class folder, expected files "
                f"ending in {', '.join(EXTENSIONS)}; add some or remove the folder"
            )
        keys.append(_packed([f"{split}/{path}" for path in found] if split else found))
        counts.append(len(found))
    listing.save()
    return Source(
        name=dataset,
        labels=labels,
        channels=3,
        keys=np.concatenate(keys),
        label_ids=np.repeat(np.array([ids_of[name] for name in folders], np.int32), counts),
        read_key=partial(_content, root),
        describe_key=partial(os.path.join, root),
    )


def _classes(listing: "_Listing") -> tuple[list[str], int]:
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


def _images_below(listing: "_Listing", folder: str) -> Iterator[str]:
    """Paths of the images in and below a class folder, with "/" on every system."""
    # Links to folders are followed to a class, not below it: they may lead in a circle.
    folders, images, _ = listing.entries(folder)
    yield from (f"{folder}/{name}" for name in images)
    for name in folders:
        yield from _images_below(listing, f"{folder}/{name}")


class _Listing:
    """What lies in a folder and below, kept in the cache from one opening to the next.

    Each folder whose times tell that it was changed since is listed anew. Images are never
    examined: that one has another content makes no difference to a listing.
    """

    def __init__(self, root: str):
        self.root = root
        place = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        self._file = cache_folder() / "listings" / f"{place}.json"
        self._used: dict[str, list[str]] = {}  # Folder: its times, then names by kind.
        self._changed = False
        try:
            self._known: dict[str, list[str]] = dict(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError):  # Not there, or damaged.
            self._known = {}

    def entries(self, folder: str) -> list[list[str]]:
        """The sorted names of the folders, images and other links in a folder below the root.

        Hidden ones are left out. Raises UserError if the folder can't be opened.
        """
        path = os.path.join(self.root, folder) if folder else self.root
        try:
            now = time.time_ns()
            status = os.stat(path)
            stamp = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
            kept = self._known.get(folder, [])
            if len(kept) != 4 or kept[0] != stamp:
                kept = [stamp, *("/".join(sorted(names)) for names in _list_folder(path))]
                self._changed = True
        except OSError as error:
            raise UserError(
                f"{path}: can't be opened ({error.strerror}), expected a readable folder of images"
            ) from None
        if now - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS:
            self._used[folder] = kept
        return [names.split("/") if names else [] for names in kept[1:]]

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


def _list_folder(path: str) -> tuple[list[str], list[str], list[str]]:
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
    return folders, images, links


# Tables.


class _Row(NamedTuple):
    where: str  # "labels.csv line 7"
    path: str
    labels: tuple[str, ...]
    several: bool  # Whether it is written as one of several labels.
    split: str  # "" where the table doesn't say.


def table_splits(dataset: str, seed: int) -> Splits:
    """The splits of a table of images, or of the tables in a folder.

    Classes are the sorted labels of the training rows. The splits are those of the `split` column,
    or the files train.csv and test.csv; with neither a fifth is held out, as of a folder.

    Raises UserError naming the first line that is wrong: an image that isn't there, no label, a
    class that training lacks.
    """
    path = os.path.expanduser(dataset)
    parts: dict[str, list[_Row]] = defaultdict(list)
    if not path.lower().endswith((".csv", ".jsonl")) or os.path.isdir(path):
        root, names = path, list_folder(path)
        for split in SPLITS:
            files = [file for file in (f"{split}.csv", f"{split}.jsonl") if file in names]
            if files:
                parts[split] = _read_table(os.path.join(root, files[0]))
    else:
        root = os.path.dirname(path)
        for row in _read_table(path):
            parts[row.split].append(row)
        if "" in parts and len(parts) > 1:
            raise UserError(
                f"{parts[''][0].where}: no split, expected one of "
                f"{', '.join(filter(None, parts))} as in other lines; write it"
            )
    rows = [row for part in parts.values() for row in part]
    _check_images(root, rows)
    multi_label = any(row.several for row in rows)
    first = parts["train"] if "train" in parts else next(iter(parts.values()))
    labels = tuple(sorted({label for row in first for label in row.labels}))
    if len(labels) < 2 and not multi_label:
        raise UserError(
            f"{dataset}: {len(labels)} class{'' if len(labels) == 1 else 'es'} {labels}, expected "
            "two or more; add images of others"
        )
    width = max(len(row.labels) for row in rows)
    sources = {
        split: Source(
            name=dataset,
            labels=labels,
            channels=3,
            keys=_packed([row.path for row in part]),
            label_ids=_label_ids(part, labels, width if multi_label else None),
            read_key=partial(_content, root),
            describe_key=partial(os.path.join, root),
            multi_label=multi_label,
        )
        for split, part in parts.items()
    }
    if "" in sources:
        return held_out_splits(lambda: sources[""], seed)
    return {split: partial(sources.__getitem__, split) for split in sources}


def _read_table(path: str) -> list[_Row]:
    name = os.path.basename(path)
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
            records = _json_lines(file) if path.lower().endswith(".jsonl") else _csv_lines(file)
            rows = []
            seen: dict[Any, Any] = {}  # Equal labels share their memory.
            for number, record in records:
                row = _row(f"{name} line {number}", record)
                rows.append(row._replace(labels=seen.setdefault(row.labels, row.labels)))
    except (OSError, UnicodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: can't be read ({reason}), expected a table of images in UTF-8"
        ) from None
    if not rows:
        raise UserError(f"{path}: no images, expected a line for each; add some")
    if not any(row.several for row in rows):
        for row in rows:
            if not row.labels:
                raise UserError(
                    f"{row.where}: no label for {row.path}; write one or remove the line"
                )
    return rows


def _csv_lines(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    reader.fieldnames = columns = [column.strip() for column in reader.fieldnames or []]
    if "path" not in columns or not {"label", "labels"} & set(columns):
        raise csv.Error(
            f"its first line names the columns {', '.join(columns)[:80]!r}, not path and label"
        )
    for record in reader:
        surplus = record.pop(None, [])
        if any(map(str.strip, surplus)):
            raise csv.Error(
                f"line {reader.line_num} has {len(columns) + len(surplus)} cells and the first "
                f"{len(columns)}: put quotes around what has a comma in it"
            )
        yield reader.line_num, record


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _row(where: str, record: Any) -> _Row:
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise UserError(
            f"{where}: no path, expected an image's path and its label, as "
            'a.jpg,cat or {"path": "a.jpg", "label": "cat"}'
        )
    label = record.get("labels", record.get("label"))
    several = "labels" in record or isinstance(label, list) or ";" in str(label)
    if isinstance(label, list) and not all(type(name) in (str, int) for name in label):
        raise UserError(f"{where}: labels are {str(label)[:80]}, expected texts or numbers")
    names = label if isinstance(label, list) else [] if label is None else str(label).split(";")
    labels = tuple(dict.fromkeys(name for n in names if (name := str(n).strip())))
    path, split = record["path"].strip(), str(record.get("split") or "").strip()
    if not path:
        raise UserError(f"{where}: no path, expected that of an image")
    return _Row(where, path, labels, several, split)


def _check_images(root: str, rows: list[_Row]) -> None:
    """Looks into each folder once, which is quicker than at each image."""
    folders: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        folders[os.path.dirname(row.path)].append(row)
    missing = []
    for folder, members in folders.items():
        try:
            there = set(list_folder(os.path.join(root, folder) or "."))
        except UserError:  # A bucket that can't be read.
            raise
        except (OSError, ValueError):  # ValueError: no path at all.
            there = set()
        missing += [row for row in members if os.path.basename(row.path) not in there]
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0].where}: there is no {os.path.join(root, missing[0].path)}{more}; paths "
            "are relative to the table's folder"
        )


def _label_ids(rows: list[_Row], labels: tuple[str, ...], width: int | None) -> np.ndarray:
    """int32 (n,), or (n, width) filled up with -1."""
    index = {label: i for i, label in enumerate(labels)}
    ids = np.full((len(rows), width or 1), -1, np.int32)
    for row, target in zip(rows, ids, strict=True):
        for place, label in enumerate(row.labels):
            if label not in index:
                close = difflib.get_close_matches(label, labels, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(
                    f"{row.where}: class {label!r} is not among the training classes; correct it "
                    f"or add training images{hint}"
                )
            target[place] = index[label]
    return ids if width else ids[:, 0]
