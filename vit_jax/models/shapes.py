"""How the fields of a network are read from the names and shapes of its weights."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.family import Hints, Shapes, Size

_log = logging.getLogger(__name__)


class Blocks:
    """The arrays of the numbered blocks "PREFIX0/...", "PREFIX1/...", ..."""

    def __init__(self, shapes: Shapes, prefix: str):
        self.prefix = prefix
        pattern = re.compile(re.escape(prefix) + r"([0-9]{1,4})/(.+)")
        matches = ((pattern.fullmatch(key), shape) for key, shape in shapes.items())
        self._shapes = {(int(m[1]), m[2]): shape for m, shape in matches if m}

    @property
    def depth(self) -> int:
        """The number of blocks: up to the last one, of which at least half are there.

        A missing block is so named as missing, and a stray one with a huge number as unexpected.
        """
        return last_of({index + 1 for index, _ in self._shapes})

    def majority(self, ending: str, rank: int, axis: int) -> int:
        """The size that most blocks agree on, so that one bad block is the one that is named; 0 if
        no array of that name and rank is there."""
        sizes = Counter(
            shape[axis]
            for (_, name), shape in self._shapes.items()
            if name.endswith(ending) and len(shape) == rank and min(shape) > 0
        )
        return sizes.most_common(1)[0][0] if sizes else 0


def last_of(numbers: Iterable[int]) -> int:
    """The last of numbers from 1 up to which at least half are there; at least 1."""
    return max((n for count, n in enumerate(sorted(numbers), 1) if n <= 2 * count), default=1)


def below(shapes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What stands under a prefix, without it."""
    return {k.removeprefix(prefix): x for k, x in shapes.items() if k.startswith(prefix)}


def num_outputs(shapes: Shapes, layer: str) -> int | None:
    """The width of a dense layer's output, from its kernel or else its bias; None without it."""
    ends = (shapes.get(f"{layer}/{array}", ())[-1:] for array in ("kernel", "bias"))
    return next((end[0] for end in ends if end and end[0] > 0), None)


def check_required(
    shapes: Shapes, ranks: Mapping[str, int], blocks: Blocks, sizes: Iterable[int], where: str
) -> None:
    """Raises UserError if the arrays from which the fields are read are not there.

    Args:
      ranks: their names and numbers of axes.
      sizes: what was read of the blocks; 0 if there was nothing to read.
    """
    missing = [key for key in ranks if key not in shapes]
    missing += [] if all(sizes) else [f"{blocks.prefix}0/..."]
    wrong = [
        f"{key} {shapes[key]}, expected {rank} axes and no empty one"
        for key, rank in ranks.items()
        if key in shapes and (len(shapes[key]) != rank or 0 in shapes[key])
    ]
    problems = [p for p in (listing("missing", missing), listing("wrong shape", wrong)) if p]
    if problems:
        raise UserError(
            f"{where} is no ViT checkpoint: {'; '.join(problems)}; "
            f"it holds {len(shapes)} arrays: {_first(sorted(shapes), 5)}"
        )


def check_heads(heads: int, width: int, where: str) -> None:
    """Raises UserError if the heads don't divide the width."""
    if width % heads:
        raise UserError(f"{where}: {heads} attention heads do not divide the width {width}")


def listing(title: str, items: list[str]) -> str:
    """ "TITLE (COUNT): " and the first twenty, each cut to 200 characters; empty without any."""
    return f"{title} ({len(items)}): {_first(items, 20)}" if items else ""


def _first(names: list[str], count: int) -> str:
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:count]]
    return ", ".join(shown) + (f" and {len(names) - count} more" if len(names) > count else "")


def fits(model: Any, patches: int, image_size: Size | None) -> bool:
    """Whether images of that size have so many patches."""
    if image_size is None or min(image_size) < 1:
        return False
    try:
        return math.prod(model.grid_size(image_size)) == patches
    except UserError:  # Smaller than a patch.
        return False


def size_of_grid(model: Any, patches: int, hints: Hints) -> Size:
    """(height, width) of the images that the stored positions of so many patches are for."""
    (height, width), known = model.stride, hints.image_size
    if known is not None:
        if not fits(model, patches, known):
            raise UserError(
                f"{hints.where}: its {patches} positions do not fit images of {known[0]}x{known[1]}"
                f" pixels in patches of {height}x{width}: give the size that the weights are for"
            )
        return known
    side = math.isqrt(patches)
    if side * side == patches:
        return side * height, side * width
    if hints.likely_size is not None and fits(model, patches, hints.likely_size):
        return hints.likely_size
    rows = next(r for r in range(side, 0, -1) if patches % r == 0)
    _log.warning(
        "%s: its %d positions are no square grid; taken as %d rows of %d. If that is wrong, "
        "pass the image size that the weights are for",
        *(hints.where, patches, rows, patches // rows),
    )
    return rows * height, patches // rows * width
