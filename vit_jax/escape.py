"""Text from outside, escaped for where it goes: a terminal or a page, JSON, a spreadsheet."""

import json
import math
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # Nothing to see, but some scripts and emoji need them.
# What makes a spreadsheet compute a cell, in half width and full.
_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def printable(text: str) -> str:
    """The text in one line, with a code (\\x1b) for each character that can't be seen or encoded:
    line breaks, those that steer a terminal or turn the direction of reading, broken bytes."""
    if text.isprintable():
        return text
    return "".join(
        # Unlike Python's own rule with spaces of all kinds: macOS has them in names of files.
        c
        if c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in text
    )


def to_json(value: Any, **options: Any) -> str:
    """JSON that any program reads: null for what is no finite number, and codes for what UTF-8 has
    no bytes for. The options are those of `json.dumps`."""
    return json.dumps(_plain(value), allow_nan=False, **options)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(text: str) -> str:
    """A cell of a table for spreadsheets: `printable`, and after an apostrophe where it begins like
    a formula, which they would compute."""
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULAS) else text
