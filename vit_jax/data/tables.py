"""Tables of images: FILE.csv or FILE.jsonl, or DIR/train.csv beside DIR/test.csv.

A row is an image: `path`, relative to the table's folder; `label`, or several as "cat;dog"; and
perhaps the `split` that it belongs to.
"""

import csv
import difflib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.folders import held_out_splits
from vit_jax.data.sources import Source, Splits
from vit_jax.errors import UserError

SPLITS = ("train", "test", "validation", "val")  # what tables in a folder may be called


class _Row(NamedTuple):
    where: str  # "labels.csv line 7"
    path: str
    labels: tuple[str, ...]
    split: str  # "" where the table doesn't say


def table_splits(dataset: str, seed: int) -> Splits:
    """The parts of a table of images, or of the tables in a folder.

    Classes are the sorted labels of the training rows. The parts are those of the `split` column,
    or the files train.csv and test.csv; with neither a fifth is held out, as of a folder.

    Raises UserError naming the first line that is wrong: an image that isn't there, no label, a
    class that training lacks.
    """
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        root, parts = path, {}
        for name in SPLITS:
            files = [f for f in (f"{name}.csv", f"{name}.jsonl") if f in os.listdir(root)]
            if files:
                parts[name] = _read_table(os.path.join(root, files[0]))
    else:
        root, parts = os.path.dirname(path), _by_split(dataset, _read_table(path))
    rows = [row for part in parts.values() for row in part[0]]
    multi_label = any(multi for _, multi in parts.values())
    _check_images(root, rows)
    first = parts.get("train") or next(iter(parts.values()))
    labels = tuple(sorted({label for row in first[0] for label in row.labels}))
    if len(labels) < 2 and not multi_label:
        raise UserError(
            f"{dataset}: {len(labels)} class{'' if len(labels) == 1 else 'es'} {labels}, expected "
            "two or more; add images of others"
        )
    width = max(len(row.labels) for row in rows)
    sources = {
        name: Source(
            name=dataset,
            labels=labels,
            channels=3,
            keys=_packed([row.path for row in part]),
            label_ids=_label_ids(part, labels, width if multi_label else None),
            read_key=partial(_content, root),
            describe_key=partial(os.path.join, root),
            multi_label=multi_label,
        )
        for name, (part, _) in parts.items()
    }
    if "" in sources:
        return held_out_splits(lambda: sources[""], seed)
    return {name: partial(sources.__getitem__, name) for name in sources}


def _packed(names: list[str]) -> np.ndarray:
    return np.array(names, np.dtypes.StringDType())  # a third of a list's memory


def _content(root: str, key: str) -> bytes:
    from vit_jax.data import images  # loads OpenCV

    return images.content(os.path.join(root, key))


def _by_split(dataset: str, table: tuple[list[_Row], bool]) -> dict[str, tuple[list[_Row], bool]]:
    rows, multi = table
    parts: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        parts[row.split].append(row)
    if "" in parts and len(parts) > 1:
        raise UserError(
            f"{parts[''][0].where}: no split, expected one of {', '.join(filter(None, parts))} as "
            "in other lines; write it"
        )
    return {name: (part, multi) for name, part in parts.items()}


# Reading.


def _read_table(path: str) -> tuple[list[_Row], bool]:
    """The rows of a file, and whether it is one of several labels an image."""
    name = os.path.basename(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = _json_lines(file) if path.lower().endswith(".jsonl") else _csv_lines(file)
            rows, multi = [], False
            seen: dict[Any, Any] = {}  # equal labels share their memory
            for number, record in records:
                row, several = _row(f"{name} line {number}", record)
                rows.append(row._replace(labels=seen.setdefault(row.labels, row.labels)))
                multi |= several
    except (OSError, UnicodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: can't be read ({reason}), expected a table of images in UTF-8"
        ) from None
    if not rows:
        raise UserError(f"{path}: no images, expected a line for each; add some")
    for row in rows:
        if not (row.labels or multi):
            raise UserError(f"{row.where}: no label for {row.path}; write one or remove the line")
    return rows, multi


def _csv_lines(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(file, strict=True)
    columns = [column.strip() for column in next(reader, [])]
    if "path" not in columns or not {"label", "labels"} & set(columns):
        raise csv.Error(
            f"its first line names the columns {', '.join(columns)[:80]!r}, not path and label"
        )
    for cells in reader:
        if any(map(str.strip, cells[len(columns) :])):
            raise csv.Error(
                f"line {reader.line_num} has {len(cells)} cells and the first {len(columns)}: put "
                "quotes around what has a comma in it"
            )
        if cells:
            yield reader.line_num, dict(zip(columns, cells, strict=False))


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _row(where: str, record: Any) -> tuple[_Row, bool]:
    """A row, and whether it is written as one of several labels."""
    if not isinstance(record, dict) or not isinstance(record.get("path"), str):
        raise UserError(
            f"{where}: no path, expected an image's path and its label, as "
            'a.jpg,cat or {"path": "a.jpg", "label": "cat"}'
        )
    label = record.get("labels", record.get("label"))
    several = "labels" in record or isinstance(label, list) or ";" in str(label)
    names = label if isinstance(label, list) else [] if label is None else str(label).split(";")
    if not all(type(name) in (str, int) for name in (names if isinstance(label, list) else [])):
        raise UserError(f"{where}: labels are {str(label)[:80]}, expected texts or numbers")
    labels = dict.fromkeys(name for n in names if (name := str(n).strip()))
    split = record.get("split") or ""
    path = record["path"].strip()
    if not path:
        raise UserError(f"{where}: no path, expected that of an image")
    return _Row(where, path, tuple(labels), str(split).strip()), several


# Checking.


def _check_images(root: str, rows: list[_Row]) -> None:
    """Looks into each folder once, which is quicker than at each image."""
    folders: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        folders[os.path.dirname(row.path)].append(row)
    missing = []
    for folder, members in folders.items():
        try:
            there = set(os.listdir(os.path.join(root, folder) or "."))
        except (OSError, ValueError):  # ValueError: no path at all
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
