"""Understanding a file of weights: the architecture is read from the arrays themselves."""

import dataclasses
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from vit_jax.checkpoints.spec import AnySpec, LiTSpec, MixerSpec, Spec
from vit_jax.errors import UserError

POSITIONS = "Transformer/posembed_input/pos_embedding"

# Fixed sines and cosines leave no trace in a file; most networks saw images of this size.
_USUAL_SIZE = (224, 224)

_Shapes = Mapping[str, tuple[int, ...]]
_Size = tuple[int, int]

_log = logging.getLogger(__name__)


def read_spec(
    arrays: Mapping[str, Any],
    *,
    classifier: str | None = None,
    image_size: _Size | None = None,
    likely_size: _Size | None = None,
    where: str = "the checkpoint",
) -> AnySpec:
    """Finds out which network a set of arrays belongs to, and checks every one of them.

    Args:
      arrays: arrays (or anything with a shape) under today's names, see `layouts.to_linen`.
      classifier: what no array tells, if it is known: "unpooled" looks like "gap", "token_unpooled"
        like "token". Without it the common ones: "map" with attention pooling, "token" with a class
        token, else "gap".
      image_size: (height, width) that the stored position embeddings are for, if it is known.
        Without it a square grid is assumed where possible.
      likely_size: (height, width) to believe where no square grid is possible and it fits. Without
        it the most nearly square grid is assumed, lying, with a warning.
      where: the file's name, for messages.

    Raises UserError that names missing, unexpected and mis-shaped arrays, the first twenty of each.
    """
    shapes = {key: tuple(array.shape) for key, array in arrays.items()}
    spec: AnySpec
    if any(key.startswith("txt/") for key in shapes):
        spec = _lit(shapes, image_size, likely_size, where)
    elif "stem/kernel" in shapes:
        spec = _mixer(shapes, image_size, likely_size, where)
    else:
        spec = _vit(shapes, classifier, image_size, likely_size, where)
    check_arrays(arrays, spec, where=where)
    return spec


def check_arrays(arrays: Mapping[str, Any], spec: AnySpec, *, where: str) -> None:
    """Compares arrays with what an architecture needs.

    Raises UserError naming what is missing, unexpected, of another shape or not floating.
    """
    try:
        expected = spec.shapes()
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
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
        raise UserError(f"{where} does not fit {spec.description}: {'; '.join(problems)}")


def _vit(
    shapes: _Shapes, classifier: str | None, known: _Size | None, likely: _Size | None, where: str
) -> Spec:
    blocks = _Blocks(shapes, "Transformer/encoderblock_")
    heads = blocks.vote("query/kernel", 3, 1)
    mlp_dim = blocks.vote("Dense_0/kernel", 2, 1)
    # With a class token only the notes of a size tell them from positions that got lost.
    fixed_positions = "embedding/kernel" in shapes and not (
        POSITIONS in shapes or ("cls" in shapes and known is None)
    )
    anchors = {"embedding/kernel": 4} | ({} if fixed_positions else {POSITIONS: 3})
    anchors |= {"conv_root/kernel": 4} if "conv_root/kernel" in shapes else {}
    _check_anchors(shapes, anchors, [] if heads and mlp_dim else [f"{blocks.prefix}0/..."], where)
    assert heads
    assert mlp_dim
    ph, pw, channels, hidden_size = shapes["embedding/kernel"]
    _check_heads(heads, hidden_size, where)
    resnet = _resnet(shapes)
    if resnet is not None:
        channels = shapes["conv_root/kernel"][2]
    spec = Spec(
        patch_size=(ph, pw),
        hidden_size=hidden_size,
        num_layers=blocks.depth,
        num_heads=heads,
        mlp_dim=mlp_dim,
        classifier="gap",
        representation_size=_outputs(shapes, "pre_logits"),
        num_classes=_outputs(shapes, "head"),
        channels=channels,
        image_size=(1, 1),
        resnet=resnet,
        position_embedding="sincos2d" if fixed_positions else "learned",
    )
    if fixed_positions:
        size = known or likely or _USUAL_SIZE
        if not known:
            _log.warning(
                "%s: it has no position embeddings; taken as fixed sines and cosines, for images "
                "of %dx%d pixels",
                *(where, *size),
            )
        pooled = "map" if "MAPHead_0/probe" in shapes else "gap"
        classifier = classifier or ("token" if "cls" in shapes else pooled)
        return dataclasses.replace(spec, classifier=classifier, image_size=size)

    tokens = shapes[POSITIONS][1]
    if classifier is not None:
        class_token = classifier in ("token", "token_unpooled")
    else:
        class_token = "cls" in shapes or _lacks_class_token(spec, tokens, (known, likely))
        pooled = "map" if "MAPHead_0/probe" in shapes else "gap"
        classifier = "token" if class_token else pooled
    size = _image_size(spec, tokens - class_token, known, likely, where)
    return dataclasses.replace(spec, classifier=classifier, image_size=size)


def _mixer(shapes: _Shapes, known: _Size | None, likely: _Size | None, where: str) -> MixerSpec:
    blocks = _Blocks(shapes, "MixerBlock_")
    tokens = blocks.vote("token_mixing/Dense_0/kernel", 2, 0)
    tokens_mlp_dim = blocks.vote("token_mixing/Dense_0/kernel", 2, 1)
    channels_mlp_dim = blocks.vote("channel_mixing/Dense_0/kernel", 2, 1)
    complete = tokens and tokens_mlp_dim and channels_mlp_dim
    _check_anchors(shapes, {"stem/kernel": 4}, [] if complete else [f"{blocks.prefix}0/..."], where)
    assert tokens
    assert tokens_mlp_dim
    assert channels_mlp_dim
    ph, pw, channels, hidden_size = shapes["stem/kernel"]
    spec = MixerSpec(
        patch_size=(ph, pw),
        hidden_size=hidden_size,
        num_layers=blocks.depth,
        tokens_mlp_dim=tokens_mlp_dim,
        channels_mlp_dim=channels_mlp_dim,
        num_classes=_outputs(shapes, "head"),
        channels=channels,
        image_size=(1, 1),
    )
    size = _image_size(spec, tokens, known, likely, where)
    return dataclasses.replace(spec, image_size=size)


def _lit(shapes: _Shapes, known: _Size | None, likely: _Size | None, where: str) -> LiTSpec:
    towers: dict[str, dict[str, tuple[int, ...]]] = {"img": {}, "txt": {}}
    for key, shape in shapes.items():
        tower, _, rest = key.partition("/")
        if tower in towers:
            towers[tower][rest] = shape
    image = _vit(towers["img"], None, known, likely, f"{where} (img/)")
    text = towers["txt"]
    bert = any(key.startswith("BertEncoder_0/") for key in text)
    prefix = (
        "BertEncoder_0/encoder_block/layer_sequence/layers_" if bert else "Encoder_0/encoderblock_"
    )
    blocks = _Blocks(text, prefix)
    if bert:
        vocabulary = "BertEncoder_0/embedder/embedders_token_ids/embedding"
        positions = "BertEncoder_0/embedder/embedders_position_ids/embedding"
        mlp_dim = blocks.vote("mlp/dense_layer/kernel", 2, 1)
        # BERT's heads leave no trace in its arrays, but all its published sizes are 64 wide.
        heads = (blocks.vote("query/kernel", 2, 1) or 0) // 64
    else:
        vocabulary, positions = "Embed_0/embedding", "pos_embedding"
        mlp_dim = blocks.vote("MlpBlock_0/Dense_0/kernel", 2, 1)
        heads = blocks.vote("query/kernel", 3, 1) or 0
    _check_anchors(
        text,
        {vocabulary: 2, positions: 2 if bert else 3},
        [] if heads and mlp_dim else [f"{prefix}0/..."],
        f"{where} (txt/)",
    )
    assert mlp_dim
    _check_heads(heads, text[vocabulary][1], f"{where} (txt/)")
    fields = {
        "hidden_size": text[vocabulary][1],
        "num_layers": blocks.depth,
        "num_heads": heads,
        "mlp_dim": mlp_dim,
        "vocab_size": text[vocabulary][0],
        "max_len": text[positions][0 if bert else 1],
    }
    return LiTSpec(
        image=image,
        text_model="bert" if bert else "text_transformer",
        text=tuple(fields.items()),
        text_classes=_outputs(text, "head"),
    )


class _Blocks:
    """The arrays of the numbered blocks "PREFIX0/...", "PREFIX1/...", ..."""

    def __init__(self, shapes: _Shapes, prefix: str):
        self.prefix = prefix
        pattern = re.compile(re.escape(prefix) + r"([0-9]{1,4})/(.+)")
        self._shapes = {
            (int(match[1]), match[2]): shape
            for key, shape in shapes.items()
            if (match := pattern.fullmatch(key))
        }

    @property
    def depth(self) -> int:
        """The number of blocks: up to the last one, of which at least half are there.

        A missing block is so named as missing, and a stray one with a huge number as unexpected.
        """
        return _last({index + 1 for index, _ in self._shapes})

    def vote(self, ending: str, rank: int, axis: int) -> int | None:
        """The size that most blocks agree on, so that one bad block is the one that is named."""
        sizes = Counter(
            shape[axis]
            for (_, name), shape in self._shapes.items()
            if name.endswith(ending) and len(shape) == rank and min(shape) > 0
        )
        return sizes.most_common(1)[0][0] if sizes else None


def _last(numbers: Iterable[int]) -> int:
    """The last of numbers from 1 up to which at least half are there; at least 1."""
    return max((n for count, n in enumerate(sorted(numbers), 1) if n <= 2 * count), default=1)


def _resnet(shapes: _Shapes) -> tuple[int, ...] | None:
    """Units in each stage of a hybrid's ResNet; None if there is none."""
    if "conv_root/kernel" not in shapes:
        return None
    units: dict[int, set[int]] = {}
    for key in shapes:
        # Published networks have up to four stages and 36 units.
        if match := re.match(r"block([1-8])/unit([1-9][0-9]?)/", key):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    stages = _last(units) if units else 0
    return tuple(_last(units.get(stage, ())) for stage in range(1, stages + 1))


def _check_heads(heads: int, width: int, where: str) -> None:
    if width % heads:
        raise UserError(f"{where}: {heads} attention heads do not divide the width {width}")


def _check_anchors(
    shapes: _Shapes, ranks: Mapping[str, int], missing_blocks: Iterable[str], where: str
) -> None:
    """Raises UserError if the arrays from which the architecture is read are not there."""
    missing = [key for key in ranks if key not in shapes] + list(missing_blocks)
    wrong = [
        f"{key} {shapes[key]}, expected {rank} axes and no empty one"
        for key, rank in ranks.items()
        if key in shapes and (len(shapes[key]) != rank or 0 in shapes[key])
    ]
    problems = [p for p in (_listing("missing", missing), _listing("wrong shape", wrong)) if p]
    if problems:
        raise UserError(
            f"{where} is no ViT checkpoint: {'; '.join(problems)}; "
            f"it holds {len(shapes)} arrays: {_first(sorted(shapes), 5)}"
        )


def _first(names: list[str], count: int) -> str:
    shown = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:count]]
    return ", ".join(shown) + (f" and {len(names) - count} more" if len(names) > count else "")


def _listing(title: str, items: list[str]) -> str:
    return f"{title} ({len(items)}): {_first(items, 20)}" if items else ""


def _outputs(shapes: _Shapes, layer: str) -> int | None:
    """The width of a dense layer's output, from its kernel or else its bias; None without it."""
    ends = (shapes.get(f"{layer}/{array}", ())[-1:] for array in ("kernel", "bias"))
    return next((end[0] for end in ends if end and end[0] > 0), None)


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _fits(spec: Spec | MixerSpec, patches: int, image_size: _Size | None) -> bool:
    if image_size is None or min(image_size) < 1:
        return False
    try:
        return math.prod(spec.model().grid_size(image_size)) == patches
    except UserError:  # Smaller than a patch.
        return False


def _lacks_class_token(spec: Spec, tokens: int, sizes: Iterable[_Size | None]) -> bool:
    """Whether `cls` is missing rather than not needed: 197 positions are a square and one more."""
    if any(_fits(spec, tokens, size) for size in sizes):
        return False
    return not _is_square(tokens) and _is_square(tokens - 1)


def _image_size(
    spec: Spec | MixerSpec, patches: int, known: _Size | None, likely: _Size | None, where: str
) -> _Size:
    """(height, width) of the images that the stored positions are for, see `read_spec`."""
    height, width = spec.model().stride
    if known is not None:
        if not _fits(spec, patches, known):
            raise UserError(
                f"{where}: its {patches} positions do not fit images of {known[0]}x{known[1]} "
                f"pixels in patches of {height}x{width}: give the size that the weights are for"
            )
        return known
    side = math.isqrt(patches)
    if side * side == patches:
        return side * height, side * width
    if likely is not None and _fits(spec, patches, likely):
        return likely
    rows = next(r for r in range(side, 0, -1) if patches % r == 0)
    _log.warning(
        "%s: its %d positions are no square grid; taken as %d rows of %d. If that is wrong, "
        "pass the image size that the weights are for",
        *(where, patches, rows, patches // rows),
    )
    return rows * height, patches // rows * width
