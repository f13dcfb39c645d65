"""The key styles in which ViT weights were published, and the way between them.

"linen": today's names, those of the parameters in memory. "prelinen": the files of 2020 and 2021
(ViT, AugReg, SAM), where one counter ran over all sub-modules of an encoder block.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from vit_jax.errors import UserError

T = TypeVar("T")

STYLES = ("linen", "prelinen")

_PRELINEN = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}
_LINEN = {old: new for new, old in _PRELINEN.items()}


def key_style(keys: Iterable[str]) -> str:
    """The style of a file's keys, one of STYLES."""
    old = re.compile(
        r"(^|/)encoderblock_\d+/(LayerNorm_2|MultiHeadDotProductAttention_1|MlpBlock_3)/"
    )
    return "prelinen" if any(old.search(key) for key in keys) else "linen"


def to_linen(arrays: Mapping[str, T]) -> dict[str, T]:
    """Renames the keys of any known style to today's. What has no rule keeps its name.

    Raises UserError if an array is there under its old and its new name.
    """
    if key_style(arrays) == "linen":
        return dict(arrays)
    return _rename(arrays, _LINEN)


def to_style(arrays: Mapping[str, T], style: str) -> dict[str, T]:
    """Renames today's keys to those of a published style.

    Raises UserError for an unknown style.
    """
    if style not in STYLES:
        raise UserError(f"unknown key style {style!r}, expected one of {', '.join(STYLES)}")
    return dict(arrays) if style == "linen" else _rename(arrays, _PRELINEN)


def _rename(arrays: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    block = re.compile(rf"(?<=encoderblock_)(\d+)/({'|'.join(names)})(?=/)")
    renamed: dict[str, T] = {}
    for key, value in arrays.items():
        new = block.sub(lambda m: f"{m[1]}/{names[m[2]]}", key)
        if new in renamed:
            raise UserError(
                f"the array {new!r} is there twice, in two key styles: write the file in one of "
                f"{', '.join(STYLES)}"
            )
        renamed[new] = value
    return renamed
