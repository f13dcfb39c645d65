"""Understanding a file of weights: the architecture is read from the arrays themselves."""

import dataclasses
import functools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.models import VARIANTS, VisionTransformer

_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/(.+)")
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
            if all(getattr(self, field) == value for field, value in fields.items()):
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
    where: str = "the checkpoint",
) -> Spec:
    """Finds out which Vision Transformer a set of arrays belongs to, and checks every one of them.

    Args:
      arrays: arrays (or anything with a shape) under today's names, see `layouts.to_linen`.
      classifier: what no array tells, if it is known: "unpooled" looks like "gap", "token_unpooled"
        like "token". Without it the common ones, "token" with a class token and "gap" without.
      image_size: (height, width) that the stored position embeddings are for, if it is known.
        Without it a square grid is assumed where possible, else the most nearly square one, lying.
      where: the file's name, for messages.

    Raises UserError that names every missing, unexpected and mis-shaped array.
    """
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    anchors = {"embedding/kernel": 4, _POSITIONS: 3}
    found = {key: shapes[key] for key, rank in anchors.items() if len(shapes.get(key, ())) == rank}
    blocks = _blocks(shapes)
    if len(found) < len(anchors) or not blocks:
        missing = [key for key in anchors if key not in shapes]
        wrong = [f"{k} {shapes[k]}" for k in anchors if k in shapes and k not in found]
        if not blocks:
            missing.append("Transformer/encoderblock_0/...")
        raise UserError(
            f"{where} is no ViT checkpoint: "
            + "; ".join(
                filter(
                    None, [_listing("missing", missing), _listing("wrong number of axes", wrong)]
                )
            )
            + f"; it holds {len(shapes)} arrays: {_first(sorted(shapes))}"
        )

    ph, pw, channels, hidden_size = found["embedding/kernel"]
    tokens = found[_POSITIONS][1]
    class_token = "cls" in shapes
    if (
        not class_token
        and math.isqrt(tokens) ** 2 != tokens
        and math.isqrt(tokens - 1) ** 2 == tokens - 1
    ):
        class_token = True  # 197 tokens without a class token: it is missing.
    heads, mlp = _vote(blocks, "query/kernel", 1), _vote(blocks, "Dense_0/kernel", 1)
    grid = _grid(tokens - class_token, (ph, pw), image_size, where)
    spec = Spec(
        patch_size=(ph, pw),
        hidden_size=hidden_size,
        num_layers=1 + max(int(_BLOCK.fullmatch(key)[1]) for key in blocks),  # type: ignore[index]
        num_heads=heads,
        mlp_dim=mlp,
        classifier=classifier or ("token" if class_token else "gap"),
        representation_size=_last_axis(shapes, "pre_logits/kernel"),
        num_classes=_last_axis(shapes, "head/kernel"),
        channels=channels,
        image_size=(grid[0] * ph, grid[1] * pw),
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


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _listing(title: str, items: list[str]) -> str:
    return f"{title} ({len(items)}): {', '.join(items)}" if items else ""


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The encoder blocks' arrays from which heads and MLP width are read, if both kinds are
    there."""
    blocks = {key: shape for key, shape in shapes.items() if _BLOCK.fullmatch(key)}
    for ending, rank in (("query/kernel", 3), ("Dense_0/kernel", 2)):
        if not any(k.endswith(ending) and len(s) == rank and min(s) > 0 for k, s in blocks.items()):
            return {}
    return blocks


def _vote(blocks: Mapping[str, tuple[int, ...]], ending: str, axis: int) -> int:
    """The size that most blocks agree on, so that one bad block is the one that is named."""
    rank = 3 if ending == "query/kernel" else 2
    sizes = Counter(
        s[axis] for k, s in blocks.items() if k.endswith(ending) and len(s) == rank and min(s) > 0
    )
    return sizes.most_common(1)[0][0]


def _last_axis(shapes: Mapping[str, tuple[int, ...]], key: str) -> int | None:
    kernel, bias = shapes.get(f"{key}"), shapes.get(key.replace("kernel", "bias"))
    return kernel[-1] if kernel else bias[-1] if bias else None


def _grid(
    patches: int, patch_size: tuple[int, int], image_size: tuple[int, int] | None, where: str
) -> tuple[int, int]:
    if image_size is not None:
        grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
        if grid[0] * grid[1] == patches:
            return grid
    side = math.isqrt(max(patches, 1))
    if side * side == patches:
        return side, side
    rows = next(r for r in range(side, 0, -1) if patches % r == 0)
    logging.getLogger(__name__).warning(
        "%s: its %d positions are no square grid; taken as %d rows of %d. If that is wrong, "
        "pass the image size that the weights are for",
        *(where, patches, rows, patches // rows),
    )
    return rows, patches // rows
