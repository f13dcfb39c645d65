"""Understanding a file of weights: the architecture is read from the arrays themselves."""

import dataclasses
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import VARIANTS, VisionTransformer

_BLOCK = re.compile(r"Transformer/encoderblock_([0-9]{1,4})/(.+)")
_POSITIONS = "Transformer/posembed_input/pos_embedding"


@dataclasses.dataclass(frozen=True)
class Spec:
    """A Vision Transformer in numbers: what is needed to build it and to feed it.

    patch_size and image_size are (height, width) in pixels; num_classes and representation_size are
    None where there is no head or no `pre_logits` layer.
    """

    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: str
    representation_size: int | None
    num_classes: int | None
    channels: int
    image_size: tuple[int, int]

    @property
    def name(self) -> str | None:
        """The official name of this architecture, or None if it has none."""
        for name, fields in VARIANTS.items():
            if all(getattr(self, k) == v for k, v in fields.items() if k != "dropout_rate"):
                return name
        return None

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.model().grid_size(self.image_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture, the class token among them."""
        return math.prod(self.grid_size) + self.model().has_class_token

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def model(self, **overrides: Any) -> VisionTransformer:
        """The network. Overrides are fields of `VisionTransformer`, e.g. dropout_rate."""
        names = {f.name for f in dataclasses.fields(VisionTransformer)}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        return VisionTransformer(**(fields | overrides))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, {"a/b/c": shape}."""
        # All blocks have the same shapes, so that tracing one of them is enough.
        model = self.model(num_layers=1)
        images = jax.ShapeDtypeStruct((1, *self.image_size, self.channels), jnp.float32)
        variables = jax.eval_shape(
            functools.partial(model.init, train=False), jax.random.key(0), images
        )
        shapes = {}
        for key, leaf in flatten_dict(variables["params"], sep="/").items():
            if match := _BLOCK.fullmatch(key):
                for i in range(self.num_layers):
                    shapes[f"Transformer/encoderblock_{i}/{match[2]}"] = leaf.shape
            else:
                shapes[key] = leaf.shape
        return shapes


def read_spec(
    arrays: Mapping[str, np.ndarray],
    *,
    classifier: str | None = None,
    image_size: tuple[int, int] | None = None,
    likely_size: tuple[int, int] | None = None,
    where: str = "the checkpoint",
) -> Spec:
    """Finds out which Vision Transformer a set of arrays belongs to, and checks every one of them.

    Args:
      arrays: arrays (or anything with a shape) under today's names, see `layouts.to_linen`.
      classifier: what no array tells, if it is known: "unpooled" looks like "gap", "token_unpooled"
        like "token". Without it the common ones, "token" with a class token and "gap" without.
      image_size: (height, width) that the stored position embeddings are for, if it is known.
        Without it a square grid is assumed where possible.
      likely_size: (height, width) to believe where no square grid is possible and it fits. Without
        it the most nearly square grid is assumed, lying, with a warning.
      where: the file's name, for messages.

    Raises UserError that names every missing, unexpected and mis-shaped array.
    """
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    blocks = _blocks(shapes)
    _check_anchors(shapes, blocks, where)
    ph, pw, channels, hidden_size = shapes["embedding/kernel"]
    tokens = shapes[_POSITIONS][1]
    patch_size, sizes = (ph, pw), (image_size, likely_size)
    if classifier is not None:
        class_token = classifier in ("token", "token_unpooled")
    else:
        class_token = "cls" in shapes or _lacks_class_token(tokens, patch_size, sizes)
    size = _image_size(tokens - class_token, patch_size, *sizes, where)
    spec = Spec(
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=_depth(blocks),
        num_heads=_vote(blocks, "query/kernel", 1),
        mlp_dim=_vote(blocks, "Dense_0/kernel", 1),
        classifier=classifier or ("token" if class_token else "gap"),
        representation_size=_outputs(shapes, "pre_logits"),
        num_classes=_outputs(shapes, "head"),
        channels=channels,
        image_size=size,
    )
    check_arrays(arrays, spec, where=where)
    return spec


def check_arrays(arrays: Mapping[str, np.ndarray], spec: Spec, *, where: str) -> None:
    """Compares arrays with what an architecture needs.

    Raises UserError naming all that are missing, unexpected, of another shape or not floating.
    """
    if spec.hidden_size % spec.num_heads:
        raise UserError(
            f"{where}: {spec.num_heads} attention heads do not divide the width {spec.hidden_size}"
        )
    expected = spec.shapes()
    problems = [
        _listing(
            "missing", [f"{k} {expected[k]}" for k in sorted(expected.keys() - arrays.keys())]
        ),
        _listing(
            "unexpected",
            [f"{k} {arrays[k].shape}" for k in sorted(arrays.keys() - expected.keys())],
        ),
        _listing(
            "wrong shape",
            [
                f"{k} {tuple(arrays[k].shape)}, expected {expected[k]}"
                for k in sorted(expected.keys() & arrays.keys())
                if tuple(arrays[k].shape) != expected[k]
            ],
        ),
        _listing(
            "not floating",
            [
                f"{k} {arrays[k].dtype}"
                for k in sorted(expected.keys() & arrays.keys())
                if not jnp.issubdtype(arrays[k].dtype, jnp.floating)
            ],
        ),
    ]
    problems = [p for p in problems if p]
    if problems:
        name = spec.name or f"a ViT of width {spec.hidden_size} and {spec.num_layers} blocks"
        raise UserError(f"{where} does not fit {name}: {'; '.join(problems)}")


def _check_anchors(shapes: Mapping[str, tuple[int, ...]], blocks: Mapping, where: str) -> None:
    """Raises UserError if the arrays from which the architecture is read are not there."""
    ranks = {"embedding/kernel": 4, _POSITIONS: 3}
    missing = [key for key in ranks if key not in shapes]
    if not blocks:
        missing.append("Transformer/encoderblock_0/...")
    wrong = [
        f"{key} {shapes[key]}, expected {rank} axes and no empty one"
        for key, rank in ranks.items()
        if key in shapes and (len(shapes[key]) != rank or 0 in shapes[key])
    ]
    problems = [p for p in (_listing("missing", missing), _listing("wrong shape", wrong)) if p]
    if problems:
        raise UserError(
            f"{where} is no ViT checkpoint: {'; '.join(problems)}; "
            f"it holds {len(shapes)} arrays: {_first(sorted(shapes))}"
        )


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _listing(title: str, items: list[str]) -> str:
    return f"{title} ({len(items)}): {', '.join(items)}" if items else ""


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The encoder blocks' arrays; none if they don't tell the heads and the MLP's width."""
    blocks = {key: shape for key, shape in shapes.items() if _BLOCK.fullmatch(key)}
    if _sizes(blocks, "query/kernel", 1) and _sizes(blocks, "Dense_0/kernel", 1):
        return blocks
    return {}


def _depth(blocks: Iterable[str]) -> int:
    """The number of blocks: up to the last one, of which at least half are there.

    A missing block is so named as missing, and a stray one with a huge number as unexpected.
    """
    indices = sorted({int(_BLOCK.fullmatch(key)[1]) for key in blocks})  # type: ignore[index]
    return 1 + max((i for count, i in enumerate(indices, 1) if i + 1 <= 2 * count), default=0)


def _sizes(blocks: Mapping[str, tuple[int, ...]], ending: str, axis: int) -> Counter[int]:
    rank = 3 if ending == "query/kernel" else 2
    return Counter(
        s[axis] for k, s in blocks.items() if k.endswith(ending) and len(s) == rank and min(s) > 0
    )


def _vote(blocks: Mapping[str, tuple[int, ...]], ending: str, axis: int) -> int:
    """The size that most blocks agree on, so that one bad block is the one that is named."""
    return _sizes(blocks, ending, axis).most_common(1)[0][0]


def _outputs(shapes: Mapping[str, tuple[int, ...]], layer: str) -> int | None:
    """The width of a dense layer's output, from its kernel or else its bias; None without it."""
    ends = (shapes.get(f"{layer}/{array}", ())[-1:] for array in ("kernel", "bias"))
    return next((end[0] for end in ends if end and end[0] > 0), None)


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _fits(patches: int, patch_size: tuple[int, int], image_size: tuple[int, int] | None) -> bool:
    if image_size is None:
        return False
    return (image_size[0] // patch_size[0]) * (image_size[1] // patch_size[1]) == patches


def _lacks_class_token(
    tokens: int, patch_size: tuple[int, int], sizes: Iterable[tuple[int, int] | None]
) -> bool:
    """Whether `cls` is missing rather than not needed: 197 positions are a square and one more."""
    if any(_fits(tokens, patch_size, size) for size in sizes):
        return False
    return not _is_square(tokens) and _is_square(tokens - 1)


def _image_size(
    patches: int,
    patch_size: tuple[int, int],
    known: tuple[int, int] | None,
    likely: tuple[int, int] | None,
    where: str,
) -> tuple[int, int]:
    """(height, width) of the pictures that the stored positions are for, see `read_spec`."""
    height, width = patch_size
    if known is not None:
        if not _fits(patches, patch_size, known):
            raise UserError(
                f"{where}: its {patches} positions do not fit pictures of {known[0]}x{known[1]} "
                f"pixels in patches of {height}x{width}: give the size that the weights are for"
            )
        return known
    side = math.isqrt(patches)
    if side * side == patches:
        return side * height, side * width
    if likely is not None and _fits(patches, patch_size, likely):
        return likely
    rows = next(r for r in range(side, 0, -1) if patches % r == 0)
    logging.getLogger(__name__).warning(
        "%s: its %d positions are no square grid; taken as %d rows of %d. If that is wrong, "
        "pass the image size that the weights are for",
        *(where, patches, rows, patches // rows),
    )
    return rows * height, patches // rows * width
