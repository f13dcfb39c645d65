"""The 50,000 checkpoints of "How to train your ViT?" (arXiv:2106.10270): their table.

A row of `index.csv` is one fine-tuning of one pre-trained checkpoint: what it was pre-trained on
(`name, ds, lr, aug, wd, do, sd`), how well that went (`best_val, final_val, final_test`), the same
of the fine-tuning (`adapt_...`), speed and size, and the files (`filename, adapt_filename`, without
".npz").
"""

import ast
import csv
import difflib
import io
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.files import open_file

MODELS = (
    *("Ti_16", "S_16", "S_32", "B_8", "B_16", "B_32", "L_16"),
    *("R_Ti_16", "R26_S_32", "R50_L_32"),
)

# What the table recommends of them, for those who can't fetch it: what stands behind the model.
_RECOMMENDED = {
    "Ti_16": "aug_none-wd_0.03-do_0.0-sd_0.0",
    "S_16": "aug_light1-wd_0.03-do_0.0-sd_0.0",
    "S_32": "aug_none-wd_0.1-do_0.0-sd_0.0",
    "B_16": "aug_medium1-wd_0.1-do_0.0-sd_0.0",
    "B_32": "aug_light1-wd_0.1-do_0.0-sd_0.0",
    "L_16": "aug_strong1-wd_0.1-do_0.0-sd_0.0",
    "R_Ti_16": "aug_none-wd_0.03-do_0.0-sd_0.0",
    "R26_S_32": "aug_light1-wd_0.1-do_0.0-sd_0.0",
    "R50_L_32": "aug_medium1-wd_0.1-do_0.1-sd_0.1",
}
RECOMMENDED = {model: f"{model}-i21k-300ep-lr_0.001-{end}" for model, end in _RECOMMENDED.items()}

Value = str | int | float | None
Row = dict[str, Value]

_NEEDED = ("name", "ds", "final_val", "filename")


def model_of(official: str) -> str:
    """The AugReg name of an official model: "R_Ti_16" for "R+ViT-Ti_16"."""
    return official.replace("ViT-", "").replace("+", "_")


def is_file_name(text: str) -> bool:
    """Whether a text is built like the file names in the table: MODEL-DATASET-EPOCHSep-..."""
    model, *rest = text.split("-", 3)
    known = model in MODELS and len(rest) == 3 and rest[1].endswith("ep")
    return known and re.fullmatch(r"[\w.,+-]+", text, re.ASCII) is not None


def read_index(path: str | os.PathLike) -> list[Row]:
    """Reads the table.

    Returns:
      its rows. A column that holds nothing but numbers gives numbers, int if all of them are whole;
      an empty cell or "nan" gives None.

    Raises UserError if the file is no such table or is damaged.
    """
    try:
        with open_file(path) as file:
            text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
        lines = [line for line in csv.reader(text) if line]
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(
            f"{path} can't be read as a table ({e}): remove it, and it is fetched again"
        ) from e
    header, lines = (lines[0], lines[1:]) if lines else ([], [])
    missing = [column for column in _NEEDED if column not in header]
    uneven = next((i for i, line in enumerate(lines) if len(line) != len(header)), None)
    problem = ""
    if missing:
        problem = f"no column {missing[0]}, found {', '.join(header) or 'nothing'}"
    elif len(set(header)) != len(header):
        problem = f"a column twice, found {', '.join(header)}"
    elif uneven is not None:
        problem = f"line {uneven + 2} has {len(lines[uneven])} cells, expected {len(header)}"
    if problem:
        raise UserError(f"{path} is no AugReg index: {problem}; remove it, and it is fetched again")
    columns = [_column([line[i] for line in lines]) for i in range(len(header))]
    named = [i for i, name in enumerate(header) if name]
    return [{header[i]: columns[i][n] for i in named} for n in range(len(lines))]


def _column(cells: Sequence[str]) -> list[Value]:
    texts: list[str | None] = [c if c and c.lower() != "nan" else None for c in cells]
    try:
        numbers = [None if text is None else float(text) for text in texts]
    except ValueError:
        return list(texts)
    if all(n is None or (math.isfinite(n) and n.is_integer()) for n in numbers):
        return [None if n is None else int(n) for n in numbers]
    return list(numbers)


def recommended(rows: Iterable[Row], model: str) -> str:
    """The file name, without ".npz", of the checkpoint of a model that is best to start from.

    It is the one pre-trained on ImageNet-21k that did best in the end on that data set's held-out
    part, as the original chooses.

    Args:
      rows: the table.
      model: one of MODELS, e.g. "R_Ti_16".

    Raises UserError if there is none.
    """
    known = [
        row
        for row in rows
        if row["ds"] == "i21k"
        and row["final_val"] is not None
        and str(row["filename"]).startswith(f"{model}-")
    ]
    if not known:
        raise UserError(
            f"the AugReg index has no {model} pre-trained on ImageNet-21k: choose another of "
            f"{', '.join(MODELS)}, or a file by its name"
        )
    best = max(known, key=operator.itemgetter("final_val"))
    return str(best["filename"]).removesuffix(".npz")


def best_adapted(rows: Iterable[Row], model: str, dataset: str) -> Row:
    """The row of a model's fine-tuning to a data set that did best on that one's held-out part.

    Of ImageNet it is up to 1.5 points better than a fine-tuning of the recommended checkpoint,
    which did best on the data that it was pre-trained on.

    Args:
      rows: the table.
      model: one of MODELS.
      dataset: an `adapt_ds` of the table, e.g. "imagenet2012".

    Raises UserError if there is none.
    """
    named = [row for row in rows if str(row["filename"]).startswith(f"{model}-")]
    known = [row for row in named if row.get("adapt_final_val") is not None]
    fitting = [row for row in known if row["adapt_ds"] == dataset]
    if not fitting:
        there = sorted({str(row["adapt_ds"]) for row in known})
        raise UserError(
            f"the AugReg index has no {model} fine-tuned to {dataset!r}, only to "
            f"{', '.join(there) or 'nothing'}"
        )
    return max(fitting, key=operator.itemgetter("adapt_final_val"))


def sort(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows in falling order of a column, those without a value last. Equal ones keep their order.

    Raises UserError for an unknown column.
    """
    if rows:
        _check_column(column, rows[0])
    there = [row for row in rows if row[column] is not None]
    there.sort(key=operator.itemgetter(column), reverse=True)
    return there + [row for row in rows if row[column] is None]


def query(rows: Sequence[Row], expression: str) -> list[Row]:
    """The rows for which an expression over the columns holds.

    Args:
      rows: the table.
      expression: comparisons (== != < <= > >=, in, not in) of columns, texts, numbers, None and
        lists of those, joined by and, or, not and parentheses, in Python's notation:
        "name == 'B/16' and ds in ('i21k', 'i1k') and wd <= 0.03". `in` before a column looks for a
        part of its text: "'medium' in aug". What is not there (None) is neither above nor below
        anything, and has no parts and is part of no text.

    Raises UserError for anything else, for an unknown column with the nearest names, and if a text
    is compared in size with a number.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        reason = e.msg if isinstance(e, SyntaxError) else "it is too long or has odd characters"
        raise UserError(
            f"the query {expression!r} can't be understood ({reason}): write it like "
            "\"name == 'B/16' and ds == 'i21k'\""
        ) from e
    if not rows:
        return []
    try:
        holds = _compile(tree.body, rows[0], expression)
        return [row for row in rows if holds(row)]
    except RecursionError as e:
        raise UserError("the query is nested too deeply: write it shorter") from e


def _unless_missing(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda a, b: a is not None and b is not None and compare(a, b)


def _is_in(a: Any, b: Any) -> bool:
    nothing = b is None or (a is None and isinstance(b, str))
    return not nothing and a in b


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: _unless_missing(operator.lt),
    ast.LtE: _unless_missing(operator.le),
    ast.Gt: _unless_missing(operator.gt),
    ast.GtE: _unless_missing(operator.ge),
    ast.In: _is_in,
    ast.NotIn: lambda a, b: not _is_in(a, b),
}


def _compile(node: ast.expr, columns: Row, text: str) -> Callable[[Row], Any]:
    """A function of a row. Only what is listed here exists: no calls, attributes or subscripts."""
    match node:
        case ast.BoolOp(op, values):
            parts = [_compile(value, columns, text) for value in values]
            every = isinstance(op, ast.And)
            return lambda row: (all if every else any)(part(row) for part in parts)
        case ast.UnaryOp(ast.Not(), operand):
            inner = _compile(operand, columns, text)
            return lambda row: not inner(row)
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as number)):
            return lambda row: -number
        case ast.Constant(str() | int() | float() | None as value):
            return lambda row: value
        case ast.List(elements) | ast.Tuple(elements):
            items = [_compile(element, columns, text) for element in elements]
            return lambda row: [item(row) for item in items]
        case ast.Name(id=name):
            _check_column(name, columns)
            return lambda row: row[name]
        case ast.Compare(left, ops, comparators) if all(type(op) in _COMPARISONS for op in ops):
            terms = [_compile(term, columns, text) for term in (left, *comparators)]
            tests = [_COMPARISONS[type(op)] for op in ops]

            def holds(row: Row) -> bool:
                values = [term(row) for term in terms]
                try:
                    return all(t(a, b) for t, a, b in zip(tests, values, values[1:], strict=False))
                except TypeError as e:
                    raise UserError(
                        f"the query {text!r} compares what can't be compared ({e}): texts stand in "
                        "quotes, numbers without"
                    ) from e

            return holds
    found = ast.get_source_segment(text.strip(), node) or type(node).__name__
    raise UserError(
        f"a query can't contain {found!r}: expected columns, texts and numbers, joined by "
        "== != < <= > >= in, not, and, or"
    )


def _check_column(name: str, columns: Row) -> None:
    if name not in columns:
        near = difflib.get_close_matches(name, columns, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(columns)}"
        raise UserError(f"the AugReg index has no column {name!r}: {hint}")
