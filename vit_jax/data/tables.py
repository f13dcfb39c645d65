"""Tables that name images: FILE.csv, FILE.tsv or FILE.jsonl, or DIR/train.csv beside DIR/test.csv.

A row is an image: `path`, relative to the table's folder; `label`, or several as "cat;dog", or a
column of 0 and 1 for each class; perhaps the `split` that it belongs to, and the `group` that stays
together.
"""

import codecs
import csv
import difflib
import functools
import io
import itertools
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TextIO

import numpy as np

from vit_jax.data.image_files import ENDINGS, channels_of, content_below, packed
from vit_jax.data.source import Source, Splits, held_out_splits, some_of, split_name
from vit_jax.errors import UserError
from vit_jax.escape import printable
from vit_jax.files import list_folder, open_file

TABLES = (".csv", ".tsv", ".jsonl")
# What columns are called, in any case of letters; of several there the first in this order counts.
_COLUMNS = {
    "path": (
        *("path", "filename", "file_name", "filepath", "file_path", "file", "image", "image_path"),
        *("image_name", "image_id", "img", "id", "name"),
    ),
    "label": ("labels", "label", "class", "class_name", "category", "target"),
    "split": ("split",),
    "group": ("group",),
}
_HOT = {"0": False, "0.0": False, "1": True, "1.0": True}


class _Row(NamedTuple):
    where: str  # "labels.csv line 7"
    path: str
    labels: tuple[str, ...]
    several: bool  # Whether it is written as one of several labels.
    split: str  # "" where the table doesn't say.
    group: str


def is_table(name: str) -> bool:
    """Whether a file is a table, by its name."""
    return name.lower().endswith(TABLES)


def is_label(text: str) -> bool:
    """Whether a cell of this text is one class of this name."""
    missing = text.casefold() in ("nan", "<na>")
    return bool(text) and text == text.strip() and ";" not in text and not missing


def split_tables(names: Iterable[str]) -> dict[str, str]:
    """Split: name of its table, of the files in a folder, as train.csv and Test.csv.

    Raises UserError if a split has two.
    """
    found: dict[str, str] = {}
    for name in sorted(filter(is_table, names)):
        if split := split_name(os.path.splitext(name)[0]):
            if split in found:
                raise UserError(
                    f"{found[split]} and {name} are both the table of the split {split!r}, "
                    "expected one; rename the other"
                )
            found[split] = name
    return found


def table_splits(dataset: str, seed: int) -> Splits:
    """The splits of a table of images, or of the tables in a folder.

    Classes are the sorted labels of the training rows. The splits are those of the `split` column,
    or the files train.csv and test.csv; with neither a fifth is held out, as of a folder.

    Raises UserError naming the first line that is wrong: an image that isn't there, no label, a
    class that training lacks.
    """
    path = os.path.expanduser(dataset)
    notes: list[str] = []
    doubts: list[str] = []
    parts: dict[str, list[_Row]] = defaultdict(list)
    if not is_table(path) or os.path.isdir(path):
        root = path
        for split, name in split_tables(list_folder(path)).items():
            parts[split] = _read_table(os.path.join(root, name), notes, doubts)
    else:
        root = os.path.dirname(path)
        for row in _read_table(path, notes, doubts):
            parts[split_name(row.split) or row.split].append(row)
        if "" in parts and len(parts) > 1:
            raise UserError(
                f"{parts[''][0].where}: no split, expected one of "
                f"{', '.join(filter(None, parts))} as in other lines; write it"
            )
    parts = _find_images(root, parts, notes)
    groups = _groups(parts, notes, doubts)
    multi_label = any(row.several for part in parts.values() for row in part)
    first = parts["train"] if "train" in parts else next(iter(parts.values()))
    labels = tuple(sorted({label for row in first for label in row.labels}))
    width = max(len(row.labels) for part in parts.values() for row in part)
    sources = {
        split: Source(
            name=dataset,
            labels=labels,
            channels=channels_of(root, first[0].path),
            keys=packed([row.path for row in part]),
            label_ids=_label_ids(part, labels, width if multi_label else None),
            read_key=partial(content_below, root),
            describe_key=partial(os.path.join, root),
            multi_label=multi_label,
            notes=tuple(notes),
            doubts=tuple(doubts),
        )
        for split, part in parts.items()
    }
    if "" in sources:
        return held_out_splits(lambda: sources[""], seed, groups)
    return {split: partial(sources.__getitem__, split) for split in sources}


def listed_images(path: str, notes: list[str]) -> list[str]:
    """The paths of the images of a table, of which nothing else is looked at; `notes` gets what was
    guessed. One that isn't there stays as it is written.

    Raises UserError for a table without a column of paths, or a row without one.
    """
    root, rows = os.path.dirname(path), _read_table(path, notes, [], labelled=False)
    found = _find_images(root, {"": rows}, notes, must_exist=False)[""]
    return [os.path.join(root, row.path) for row in found]


# Reading.


def _read_table(
    path: str, notes: list[str], doubts: list[str], *, labelled: bool = True
) -> list[_Row]:
    name = os.path.basename(path)
    rows = []
    seen: dict[Any, Any] = {}  # Equal labels share their memory.
    try:
        with open_file(path) as file:
            is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            file.seek(0)
            text = io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig", newline="")
            is_json = path.lower().endswith(".jsonl")
            records = (
                _json_lines(text) if is_json else _csv_lines(name, text, notes, doubts, labelled)
            )
            for number, record in records:
                if not labelled and isinstance(record, dict):
                    used = _columns(tuple(record)).get("path")
                    record = {**dict.fromkeys(record), used: record[used]} if used else record
                row = _row(f"{name} line {number}", record)
                rows.append(row._replace(labels=seen.setdefault(row.labels, row.labels)))
    except (OSError, UnicodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: can't be read ({reason}), expected a table of images in UTF-8 or UTF-16"
        ) from None
    if not rows:
        raise UserError(f"{path}: no images, expected a line for each; add some")
    if labelled and not any(row.several for row in rows):
        for row in rows:
            if not row.labels:
                raise UserError(
                    f"{row.where}: no label for {row.path}; write one or remove the line"
                )
    labels = {label for found in seen for label in found}
    if missing := sorted(n for n in labels if n.casefold() in ("na", "n/a", "none", "null")):
        doubts.append(
            f"of {name} the classes {some_of(missing)} may be how a program writes that a label is "
            "missing: remove their rows if so"
        )
    columns = _columns(tuple(record))
    columns = columns if labelled else {"path": columns["path"]}
    for kind, column in columns.items():
        if column.strip().casefold() not in (kind, "labels"):
            notes.append(f"of {name} the column {column!r} is taken for the {kind}")
    if unused := [column for column in record if column not in columns.values()]:
        notes.append(f"of {name} columns are not used: {some_of(unused)}")
    return rows


@functools.lru_cache
def _columns(names: tuple[str, ...]) -> dict[str, str]:
    """Which of the columns of a table has the path, the label, the split and the group."""
    plain = {name.strip().casefold(): name for name in reversed(names)}
    return {
        kind: next(plain[word] for word in words if word in plain)
        for kind, words in _COLUMNS.items()
        if not plain.keys().isdisjoint(words)
    }


def _csv_lines(
    name: str, file: TextIO, notes: list[str], doubts: list[str], labelled: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    first = file.readline()
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(itertools.chain([first], file), delimiter=delimiter, strict=True)
    reader.fieldnames = names = [column.strip() for column in reader.fieldnames or []]
    columns = _columns(tuple(names))
    # Without labels, the other columns may be of 0 and 1, one a class.
    classes = [n for n in names if n and n not in columns.values() and "label" not in columns]
    classes = classes if labelled else []
    if "path" not in columns or (labelled and "label" not in columns and len(classes) < 2):
        wanted = "path and label" if labelled else "path"
        raise csv.Error(f"its first line names the columns {', '.join(names)[:80]!r}, not {wanted}")
    if twice := [n for n in {*columns.values(), *classes} if names.count(n) > 1]:
        raise csv.Error(f"its first line names a column {twice[0]!r} twice")
    unseen = set(classes)
    for record in reader:
        surplus = record.pop(None, [])
        if any(map(str.strip, surplus)):
            raise csv.Error(
                f"line {reader.line_num} has {len(names) + len(surplus)} cells and the first "
                f"{len(names)}: put quotes around what has a {delimiter!r} in it"
            )
        if classes:
            cells = {n: (record.pop(n) or "").strip() for n in classes}
            if strange := next((n for n, cell in cells.items() if cell not in _HOT), None):
                raise csv.Error(
                    f"no column is called label, and {strange!r} in line {reader.line_num} is "
                    f"{cells[strange][:40]!r}, not 0 or 1 as in a column for each class"
                )
            found = [n for n in classes if _HOT[cells[n]]]
            record["label"] = ";".join(found)
            unseen -= set(found)
        yield reader.line_num, record
    if classes:
        notes.append(f"of {name} the columns {some_of(classes)} are classes")
        doubts += [f"of {name} no image is of {some_of(sorted(unseen))}"] * bool(unseen)


def _json_lines(file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _row(where: str, record: Any) -> _Row:
    columns = _columns(tuple(record)) if isinstance(record, dict) else {}
    cells = {kind: record[column] for kind, column in columns.items()}
    path, label = cells.get("path"), cells.get("label")
    path = str(path) if type(path) is int else path  # An image may be named by its number.
    if not isinstance(path, str) or not path.strip():
        raise UserError(
            f"{where}: no path, expected an image's path and its label, as "
            'a.jpg,cat or {"path": "a.jpg", "label": "cat"}'
        )
    several = isinstance(label, list) or columns.get("label", "").casefold() == "labels"
    several = several or ";" in str(label)
    names = label if isinstance(label, list) else [] if label is None else str(label).split(";")
    if isinstance(label, dict) or not all(type(name) in (str, int) for name in names):
        raise UserError(f"{where}: labels are {str(label)[:80]}, expected texts or numbers")
    labels = tuple(dict.fromkeys(name for n in names if (name := str(n).strip())))
    if missing := [name for name in labels if name.casefold() in ("nan", "<na>")]:
        raise UserError(
            f"{where}: the label is {missing[0]!r}, as programs write that one is missing; write "
            "a class, or remove the line"
        )
    split, group = (str(cells.get(kind) or "").strip() for kind in ("split", "group"))
    return _Row(where, path.strip(), labels, several, split, printable(group))


def _find_images(
    root: str, parts: dict[str, list[_Row]], notes: list[str], *, must_exist: bool = True
) -> dict[str, list[_Row]]:
    """The rows with the paths of files that are there. Looks into each folder once, which is
    quicker than at each image."""

    @functools.cache
    def names(folder: str) -> frozenset[str]:
        try:
            return frozenset(list_folder(os.path.join(root, folder) or "."))
        except UserError:  # A bucket that can't be read.
            raise
        except (OSError, ValueError):  # ValueError: no path at all.
            return frozenset()

    @functools.cache
    def spellings(folder: str) -> dict[str, list[str]]:
        found = defaultdict(list)
        for name in sorted(names(folder)):
            stem, ending = os.path.splitext(name)
            for spelling in {name, stem} if ending.lower() in ENDINGS else {name}:
                found[_plain(spelling)].append(name)
        return found

    def find(row: _Row) -> str:
        """ "" if there is none, by any spelling."""
        if os.path.basename(row.path) in names(os.path.dirname(row.path)):
            return row.path
        real = ""
        for part in row.path.replace("\\", "/").split("/"):
            found = [part]
            if part not in ("", ".", "..") and part not in names(real):
                found = spellings(real).get(_plain(part), [])
            if len(found) > 1:
                raise UserError(
                    f"{row.where}: {row.path} may be {' or '.join(found)}; write it in full"
                )
            if not found:
                return ""
            real += f"{found[0]}/"
        return real[:-1]

    paths = {split: [find(row) for row in part] for split, part in parts.items()}
    both = [pair for split, part in parts.items() for pair in zip(part, paths[split], strict=True)]
    missing = [row for row, path in both if not path]
    if missing and must_exist:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0].where}: there is no {os.path.join(root, missing[0].path)}{more}; paths "
            "are relative to the table's folder"
        )
    if others := [(row.path, path) for row, path in both if path and row.path != path]:
        one, real = others[0]
        notes.append(
            f"{len(others):,} images have another name than in the table, as {real} ({one})"
        )
    return {
        split: [row._replace(path=p or row.path) for row, p in zip(part, paths[split], strict=True)]
        for split, part in parts.items()
    }


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _groups(parts: dict[str, list[_Row]], notes: list[str], doubts: list[str]) -> list[str] | None:
    """Of each row what stays together: the images of a group, the rows of an image. None if each
    is alone."""
    first: dict[str, _Row] = {}
    split_of: dict[str, str] = {}
    groups, across, repeats, differing, regrouped = [], set(), 0, 0, 0
    for split, part in parts.items():
        for row in part:
            path = os.path.normpath(row.path)
            earlier = first.setdefault(path, row)
            repeats += earlier is not row
            differing += earlier.labels != row.labels
            regrouped += earlier.group != row.group
            groups.append(earlier.group or path)
            if split_of.setdefault(groups[-1], split) != split:
                across.add(groups[-1])
    if repeats:
        notes.append(f"{repeats:,} rows name an image again; the rows of one stay together")
    if differing:
        doubts.append(
            f"{differing:,} rows name an image again with another label; write several labels of "
            "an image in one row, as cat;dog"
        )
    if regrouped:
        doubts.append(
            f"{regrouped:,} rows name an image again with another group, of which the first "
            "counts; give an image the same group everywhere"
        )
    if across:
        doubts.append(f"in several splits are the images or groups {some_of(sorted(across))}")
    return groups if repeats or any(row.group for part in parts.values() for row in part) else None


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
