"""Weights of PyTorch's libraries: timm, Facebook's repositories, Hugging Face's transformers.

What a library calls its arrays is a table {its name: (today's names, operation)}, by which one
driver goes in both directions; "{i}" is a block's number. Of several names the array holds one
after the other, and "{i}" of the first. No value is read: see `formats.LazyArray`.

A file of theirs doesn't tell heads, epsilon and GELU. They come from the config.json beside it,
else from what the library does.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from vit_jax.checkpoints import huggingface, pth
from vit_jax.checkpoints.formats import LazyArray, rows
from vit_jax.errors import UserError
from vit_jax.models.shapes import listing

_GIVE_HEADS = "give their number, --heads N, --config.model.num_heads=N or load(..., heads=N)"

_log = logging.getLogger(__name__)

Arrays = Mapping[str, Any]
Table = dict[str, tuple[tuple[str, ...], str]]


class Op(NamedTuple):
    """How an array of theirs becomes one of ours and back.

    Attributes:
      rank: how many axes theirs has; None for any number.
      to: (array, heads) -> array.
      back: array -> array.
    """

    rank: int | None
    to: Callable[[np.ndarray, int], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


OPS = {
    "same": Op(None, lambda a, _: a, lambda a: a),
    "matrix": Op(2, lambda a, _: a.T, lambda a: a.T),
    "convolution": Op(4, lambda a, _: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1)),
    # (d, d) -> (d, h, d/h), (d) -> (h, d/h) and (d, d) -> (h, d/h, d), h heads.
    "heads": Op(2, lambda a, h: a.T.reshape(a.shape[1], h, -1), lambda a: a.reshape(len(a), -1).T),
    "head bias": Op(1, lambda a, h: a.reshape(h, -1), lambda a: a.reshape(-1)),
    "merge heads": Op(
        2, lambda a, h: a.T.reshape(h, -1, len(a)), lambda a: a.reshape(-1, a.shape[-1]).T
    ),
    "one image": Op(2, lambda a, _: a[None], lambda a: a[0]),
}


def _dense(theirs: str, *ours: str, op: str = "matrix", bias: str = "same") -> Table:
    return {
        f"{theirs}.weight": (tuple(f"{name}/kernel" for name in ours), op),
        f"{theirs}.bias": (tuple(f"{name}/bias" for name in ours), bias),
    }


def _heads(theirs: str, *ours: str) -> Table:
    return _dense(theirs, *ours, op="heads", bias="head bias")


def _norm(theirs: str, ours: str) -> Table:
    return {
        f"{theirs}.weight": ((f"{ours}/scale",), "same"),
        f"{theirs}.bias": ((f"{ours}/bias",), "same"),
    }


def _plain(names: Mapping[str, str]) -> Table:
    return {theirs: ((ours,), "same") for theirs, ours in names.items()}


POSITIONS = "Transformer/posembed_input/pos_embedding"
_BLOCK = "Transformer/encoderblock_{i}"
_MLP = f"{_BLOCK}/MlpBlock_0"
_QUERY, _KEY, _VALUE, _OUT = (
    f"{_BLOCK}/MultiHeadDotProductAttention_0/{part}" for part in ("query", "key", "value", "out")
)
_POOL = "MAPHead_0"
_POOL_QUERY, _POOL_KEY, _POOL_VALUE, _POOL_OUT = (
    f"{_POOL}/MultiHeadDotProductAttention_0/{part}" for part in ("query", "key", "value", "out")
)
_SCALES = (f"{_BLOCK}/LayerScale_0/scale", f"{_BLOCK}/LayerScale_1/scale")

TIMM: Table = {
    **_plain({"cls_token": "cls", "dist_token": "dist", "reg_token": "registers"}),
    **_plain({"pos_embed": POSITIONS}),
    **_dense("patch_embed.proj", "embedding", op="convolution"),
    **_norm("blocks.{i}.norm1", f"{_BLOCK}/LayerNorm_0"),
    **_heads("blocks.{i}.attn.qkv", _QUERY, _KEY, _VALUE),
    **_dense("blocks.{i}.attn.proj", _OUT, op="merge heads"),
    **_plain({"blocks.{i}.ls1.gamma": _SCALES[0], "blocks.{i}.ls2.gamma": _SCALES[1]}),
    **_norm("blocks.{i}.norm2", f"{_BLOCK}/LayerNorm_1"),
    **_dense("blocks.{i}.mlp.fc1", f"{_MLP}/Dense_0"),
    **_dense("blocks.{i}.mlp.fc2", f"{_MLP}/Dense_1"),
    **_norm("norm", "Transformer/encoder_norm"),
    **_norm("fc_norm", "fc_norm"),
    **_plain({"attn_pool.latent": f"{_POOL}/probe"}),
    **_heads("attn_pool.q", _POOL_QUERY),
    **_heads("attn_pool.kv", _POOL_KEY, _POOL_VALUE),
    **_dense("attn_pool.proj", _POOL_OUT, op="merge heads"),
    **_norm("attn_pool.norm", f"{_POOL}/LayerNorm_0"),
    **_dense("attn_pool.mlp.fc1", f"{_POOL}/MlpBlock_0/Dense_0"),
    **_dense("attn_pool.mlp.fc2", f"{_POOL}/MlpBlock_0/Dense_1"),
    **_dense("head", "head"),
    **_dense("head_dist", "head_dist"),
}
TIMM_SWIGLU: Table = {
    **_dense("blocks.{i}.mlp.fc1", f"{_MLP}/Dense_0", f"{_MLP}/Dense_1"),
    **_dense("blocks.{i}.mlp.fc2", f"{_MLP}/Dense_2"),
}
# DeiT-III and DINOv2 as their authors published them.
_FACEBOOK: Table = {
    **_plain({"register_tokens": "registers"}),
    **_plain({"blocks.{i}.gamma_1": _SCALES[0], "blocks.{i}.gamma_2": _SCALES[1]}),
    **_dense("blocks.{i}.mlp.w12", f"{_MLP}/Dense_0", f"{_MLP}/Dense_1"),
    **_dense("blocks.{i}.mlp.w3", f"{_MLP}/Dense_2"),
}

_HF: Table = {
    **_plain({"embeddings.cls_token": "cls", "embeddings.position_embeddings": POSITIONS}),
    **_dense("embeddings.patch_embeddings.projection", "embedding", op="convolution"),
    **_heads("encoder.layer.{i}.attention.attention.query", _QUERY),
    **_heads("encoder.layer.{i}.attention.attention.key", _KEY),
    **_heads("encoder.layer.{i}.attention.attention.value", _VALUE),
    **_dense("encoder.layer.{i}.attention.output.dense", _OUT, op="merge heads"),
    **_norm("layernorm", "Transformer/encoder_norm"),
    **_dense("classifier", "head"),
}
HF_VIT: Table = {
    **_HF,
    **_norm("encoder.layer.{i}.layernorm_before", f"{_BLOCK}/LayerNorm_0"),
    **_norm("encoder.layer.{i}.layernorm_after", f"{_BLOCK}/LayerNorm_1"),
    **_dense("encoder.layer.{i}.intermediate.dense", f"{_MLP}/Dense_0"),
    **_dense("encoder.layer.{i}.output.dense", f"{_MLP}/Dense_1"),
    **_dense("pooler.dense", "pre_logits"),
}
HF_DEIT: Table = {
    **HF_VIT,
    **_plain({"embeddings.distillation_token": "dist"}),
    **_dense("cls_classifier", "head"),
    **_dense("distillation_classifier", "head_dist"),
}
HF_DINOV2: Table = {
    **_HF,
    **_plain({"embeddings.register_tokens": "registers"}),
    **_norm("encoder.layer.{i}.norm1", f"{_BLOCK}/LayerNorm_0"),
    **_norm("encoder.layer.{i}.norm2", f"{_BLOCK}/LayerNorm_1"),
    **_plain({f"encoder.layer.{{i}}.layer_scale{n + 1}.lambda1": _SCALES[n] for n in (0, 1)}),
    **_dense("encoder.layer.{i}.mlp.fc1", f"{_MLP}/Dense_0"),
    **_dense("encoder.layer.{i}.mlp.fc2", f"{_MLP}/Dense_1"),
}
_HF5_SWIGLU: Table = {
    **_dense("encoder.layer.{i}.mlp.gate_proj", f"{_MLP}/Dense_0"),
    **_dense("encoder.layer.{i}.mlp.up_proj", f"{_MLP}/Dense_1"),
    **_dense("encoder.layer.{i}.mlp.down_proj", f"{_MLP}/Dense_2"),
}
HF_SWIGLU: Table = {
    **_dense("encoder.layer.{i}.mlp.weights_in", f"{_MLP}/Dense_0", f"{_MLP}/Dense_1"),
    **_dense("encoder.layer.{i}.mlp.weights_out", f"{_MLP}/Dense_2"),
}
SIGLIP: Table = {
    **_dense("embeddings.patch_embedding", "embedding", op="convolution"),
    "embeddings.position_embedding.weight": ((POSITIONS,), "one image"),
    **_norm("encoder.layers.{i}.layer_norm1", f"{_BLOCK}/LayerNorm_0"),
    **_heads("encoder.layers.{i}.self_attn.q_proj", _QUERY),
    **_heads("encoder.layers.{i}.self_attn.k_proj", _KEY),
    **_heads("encoder.layers.{i}.self_attn.v_proj", _VALUE),
    **_dense("encoder.layers.{i}.self_attn.out_proj", _OUT, op="merge heads"),
    **_norm("encoder.layers.{i}.layer_norm2", f"{_BLOCK}/LayerNorm_1"),
    **_dense("encoder.layers.{i}.mlp.fc1", f"{_MLP}/Dense_0"),
    **_dense("encoder.layers.{i}.mlp.fc2", f"{_MLP}/Dense_1"),
    **_norm("post_layernorm", "Transformer/encoder_norm"),
    **_plain({"head.probe": f"{_POOL}/probe"}),
    "head.attention.in_proj_weight": (
        tuple(f"{name}/kernel" for name in (_POOL_QUERY, _POOL_KEY, _POOL_VALUE)),
        "heads",
    ),
    "head.attention.in_proj_bias": (
        tuple(f"{name}/bias" for name in (_POOL_QUERY, _POOL_KEY, _POOL_VALUE)),
        "head bias",
    ),
    **_dense("head.attention.out_proj", _POOL_OUT, op="merge heads"),
    **_norm("head.layernorm", f"{_POOL}/LayerNorm_0"),
    **_dense("head.mlp.fc1", f"{_POOL}/MlpBlock_0/Dense_0"),
    **_dense("head.mlp.fc2", f"{_POOL}/MlpBlock_0/Dense_1"),
    **_dense("classifier", "head"),
}
# How transformers 5 calls its modules in memory; it saves the names above.
_HF5 = (
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", r".attention.attention.\1."),
    (r"\.attention\.q\.", ".attention.query."),
    (r"\.attention\.k\.", ".attention.key."),
    (r"\.attention\.v\.", ".attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_HF5_MLP = ((r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."))


class Layout(NamedTuple):
    """One that a file can have.

    Attributes:
      kind: whose, and of which network.
      table: of its names.
      dropped: a regular expression for arrays that are not the network's.
      told: fields of the network that no array tells.
      config: what a config.json beside it would say, where there is none.
      heads: of today's name of an array, the attention heads; None if all blocks have as many,
        which are then found by the usual rules.
      known_from: {field: place}, of what no array tells.
    """

    kind: str
    table: Table
    dropped: str
    told: dict[str, Any]
    config: Mapping[str, Any] = MappingProxyType({})
    heads: Callable[[str], int] | None = None
    known_from: Mapping[str, str] = MappingProxyType({})


class Known(NamedTuple):
    """What is known beside arrays: the file's name, the config.json beside it, and what was given
    of heads and windows."""

    file: str
    config: Mapping[str, Any]
    heads: int | None
    window: int | None


# Of a family with a file of its own: of arrays without what stands before their names their layout,
# None if they are another network's.
FAMILIES: list[Callable[[Arrays, Known], Layout | None]] = []


class TorchFile(NamedTuple):
    """What a file of theirs turned out to be.

    Attributes:
      arrays: under today's names.
      kind: see `Layout`; with the part of the file that was taken, if it has several.
      left_out: names of the arrays that are not the network's.
      hints: for `infer.read_spec`.
      about: mean, std: of the images' values from 0 to 1, which the network is for; labels: the
        names of the classes, or None; known_from: {field: place}, of what no array tells.
    """

    arrays: dict[str, Any]
    kind: str
    left_out: tuple[str, ...]
    hints: dict[str, Any]
    about: dict[str, Any]


# The array by which a network of theirs is found, whatever stands before its name.
_ANCHOR = re.compile(
    r"(.*?)(patch_embed\.proj\.weight|embeddings\.patch_embeddings\.projection\.weight"
    r"|embeddings\.patch_embedding\.weight|tokens_to_token\.project\.weight)"
)
# The axes of what is looked at before all arrays are.
_RANKS = {
    "patch_embed.proj.weight": 4,
    "embeddings.patch_embeddings.projection.weight": 4,
    "embeddings.patch_embedding.weight": 4,
    "tokens_to_token.project.weight": 2,
    "pos_embed": 3,
    "embeddings.position_embeddings": 3,
    "embeddings.position_embedding.weight": 2,
    "reg_token": 3,
}
# What may stand before it, the parts of a training checkpoint in the order of choice.
_WRAPPERS = (
    *pth.WRAPPERS,
    *("module", "_orig_mod", "backbone", "base_model", "base_encoder", "encoder"),
)
_HF_NAMES = ("vit", "deit", "dinov2", "dinov2_with_registers", "vision_model", "swin", "swinv2")

_NO_SWIN = r"^(?!.*layers\.\d+\.blocks\.)"
# Networks that have the anchor, or none, but are others. The first that fits is named.
_OTHERS = {
    r"blocks_token_only\.": "CaiT",
    r"layers\.\d+\.blocks\.\d+\.spatial_mlp\.": "Swin-MLP",
    r"attn\.meta_mlp\.": "timm's SwinV2-CR",
    r"features\.1\.0\.attn\.": "torchvision's Swin",
    r"storage_tokens|rope_embed\.|^(model\.)?layer\.\d+\.attention\.q_proj": "DINOv3",
    r"attn\.(q_norm|k_norm|norm)\.": "a ViT with norms within attention",
    rf"{_NO_SWIN}.*(relative_position|rel_pos)|attention\.lambda_1|encoder\.layer\.\d+\.lambda_1": (
        "BEiT"
    ),
    rf"{_NO_SWIN}.*attn\.q_bias|(^|\.)rope\.|mlp\.fc1_g": "EVA",
    r"class_embedding|visual\.(conv1|transformer)|norm_pre\.|pre_layrnorm": "CLIP",
    r"(^|\.)conv_proj\.weight": "torchvision's ViT",
    r"patch_embed\.(backbone|conv)": "a hybrid or another stem of timm's",
}


def from_flax(arrays: Arrays) -> Arrays:
    """The arrays of transformers' networks in Flax as those in PyTorch, whose names and values they
    have; others as they are."""
    anchor = re.compile(r"(.*/)?embeddings/patch_embeddings?(/projection)?/kernel")
    if not any(map(anchor.fullmatch, arrays)):
        return arrays
    found = {}
    for key, array in arrays.items():
        name = re.sub(r"/(kernel|scale|embedding)$", "/weight", key).replace("/", ".")
        op = {2: "matrix", 4: "convolution"}.get(len(array.shape), "same")
        back = OPS[op if key.endswith("/kernel") else "same"].back
        found[name] = _lazily(array, lambda a, _, back=back: back(a))
    return found


def is_torch(arrays: Arrays) -> bool:
    """Whether the names are those of a PyTorch library. Raises UserError, with its name, for a
    network of theirs that is none of ours."""
    if any(key.endswith("/kernel") for key in arrays):
        return False
    anchors = [key for key in arrays if _ANCHOR.fullmatch(key)]
    if any(len(arrays[key].shape) == 5 for key in anchors):
        raise UserError(_refusal("a network of videos (V-JEPA, VideoMAE)"))
    for pattern, name in _OTHERS.items():
        if any(re.search(pattern, key) for key in arrays):
            raise UserError(_refusal(name))
    if any(re.search(r"layers\.\d+\.blocks\.", key) for key in arrays) and any(
        re.search(r"(^|\.)(mask_token$|decoder\.)", key) for key in arrays
    ):
        raise UserError(_refusal("a Swin Transformer pre-trained by SimMIM, with its decoder"))
    if any("gamma_1" in key for key in arrays) and not any("pos_embed" in key for key in arrays):
        raise UserError(_refusal("DINOv3" if any("reg_token" in key for key in arrays) else "EVA"))
    return bool(anchors)


def _refusal(name: str) -> str:
    return (
        f"it is {name}, by its arrays, which has no place here: expected a ViT, DeiT, DeiT-III, "
        "MAE, DINOv2 or SigLIP of timm, Facebook or Hugging Face, a T2T-ViT or a Swin Transformer"
    )


def read_torch(
    arrays: Arrays,
    path: Path | None = None,
    *,
    heads: int | None = None,
    pre_logits: bool | None = None,
    window: int | None = None,
) -> TorchFile:
    """Gives a file of theirs today's names.

    Args:
      arrays: as they stand in the file, for which `is_torch` is true.
      path: the file, beside which there may be a config.json of timm or transformers.
      heads: attention heads, if they are known.
      pre_logits: whether the pooler of Hugging Face's ViT is taken, a tanh layer that was trained
        in few files.
      window: of a Swin Transformer of version 2, where nothing else tells it.

    Raises UserError if an array is unknown or has another number of axes than expected, or if
    nothing tells the number of heads.
    """
    taken, prefix, inside = _unwrap(arrays)
    for key, rank in _RANKS.items():
        shape = tuple(inside[key].shape) if key in inside else (1,) * rank
        if len(shape) != rank or 0 in shape:
            raise UserError(f"{taken[key]} has shape {shape}, expected {rank} axes, none of them 0")
    is_timm = "patch_embed.proj.weight" in inside
    config = (huggingface.read_config(path.parent) if path else None) or {}
    name = path.name if path else ""
    try:
        known = Known(name, config, heads, window)
        layout = next(filter(None, (family(inside, known) for family in FAMILIES)), None)
        settings = {} if layout and layout.heads else _settings(config)
        labels, stated = _labels(config), _stated_values(config)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as e:
        raise UserError(
            f"the config.json beside it is damaged ({type(e).__name__}: {e}): mend or remove it"
        ) from e
    is_facebook = bool(prefix) or name.endswith((".pth", ".pt", ".tar"))
    layout = layout or (
        _timm_layout(inside, settings, "timm" if settings or not is_facebook else "fb", name)
        if is_timm
        else _hf_layout(inside, bool(pre_logits))
    )
    named = str(config.get("architecture", ""))
    if named and not (layout.heads or re.match(_ARCHITECTURES, named)):
        _log.warning("timm's %s is not known here: taken as %s", named, layout.kind)
    places = dict.fromkeys(settings, "config.json")
    told = layout.told | {k: v for k, v in settings.items() if k in layout.told and v is not None}
    table = layout.table
    width = inside[_anchor_of(inside)].shape[0]
    if settings.get("width", width) != width:
        raise UserError(
            f"the config.json beside it is of a network of width {settings['width']}, but this one "
            f"is {width} wide: put its own there, or none"
        )
    heads_of = layout.heads
    if heads_of is None:
        heads, places["num_heads"] = _heads_and_place(inside, width, heads, settings)
    found, left_out, unknown = {}, [], []
    for key, array in inside.items():
        if re.search(layout.dropped, key):
            left_out.append(taken[key])
            continue
        template, block = (key, "") if key in table else _template(key)
        if template not in table:
            unknown.append(f"{taken[key]} {tuple(array.shape)}")
            continue
        targets, op = table[template]
        parts = _split(array, len(targets), OPS[op], taken[key])
        for target, part in zip(targets, parts, strict=True):
            try:
                ours = target.replace("{i}", block)
                count = heads_of(ours) if heads_of else heads or 1
                found[ours] = _lazily(part, OPS[op].to, count)
            except ValueError:
                raise UserError(
                    f"{taken[key]} has shape {tuple(array.shape)}, not divided by {count} heads"
                ) from None
    if unknown:
        raise UserError(
            f"it is {layout.kind}, but has arrays that are not known there, "
            f"{listing('unknown', unknown)}: it is another network"
        )
    if POSITIONS not in found and heads_of is None:
        raise UserError(f"it is {layout.kind} without position embeddings: it is another network")
    inner = set(taken.values())
    left_out += [key for key in arrays if key not in inner]
    fields = {k: v for k, v in told.items() if k not in ("classifier", "image_size")}
    hints = {"untold": fields, "classifier": told.get("classifier")}
    if size := settings.get("image_size"):
        _check_size(size, found, fields)
        hints["image_size"] = size
    elif size := told.get("image_size"):
        hints["image_size"] = size
    places = {
        field: places.get(field, "what the library does")
        for field in ("num_heads", "activation", "layer_norm_epsilon")
    }
    places = dict(layout.known_from) or places
    kind = f"{layout.kind} ({prefix})" if prefix else layout.kind
    stated = stated or _stated_values(layout.config) or _values(layout.kind, name)
    about = stated | {"labels": labels, "known_from": places}
    about["config"] = {**layout.config, **config}
    return TorchFile(found, kind, tuple(left_out), hints, about)


def _heads_and_place(
    inside: Arrays, width: int, heads: Any, settings: Mapping[str, Any]
) -> tuple[int, str]:
    """The attention heads of a network of one width, and what tells them.

    Raises UserError if nothing does, or they don't divide the width.
    """
    place = "what was given"
    if heads is not None:
        if settings.get("num_heads", heads) != heads:
            raise UserError(
                f"{heads} attention heads are given, but the config.json beside it tells "
                f"{settings['num_heads']}: leave them out, or mend that file"
            )
    elif settings.get("num_heads"):
        heads, place = settings["num_heads"], "config.json"
    else:
        heads, place = _usual_heads(inside, width), f"the width {width}"
    if type(heads) is not int or heads < 1 or width % heads:
        raise UserError(f"{heads} attention heads do not divide the width {width}: {_GIVE_HEADS}")
    return heads, place


def write_torch(arrays: Arrays, table: Table, depth: int) -> dict[str, Any]:
    """Gives arrays with today's names those of a table, in its order.

    Raises UserError if an array has no place in it.
    """
    written, used = {}, set()
    for template, (targets, op) in table.items():
        for i in range(depth if "{i}" in template else 1):
            names = [target.replace("{i}", str(i)) for target in targets]
            if names[0] in arrays:
                parts = [
                    _lazily(arrays[name], lambda a, _, op=op: OPS[op].back(a)) for name in names
                ]
                written[template.replace("{i}", str(i))] = _joined(parts)
                used.update(names)
    if unused := sorted(arrays.keys() - used):
        raise UserError(f"the other library has no place for {listing('arrays', unused)}")
    return written


# One array.


def _template(key: str) -> tuple[str, str]:
    """("blocks.{i}.norm1.weight", "3") of "blocks.3.norm1.weight"."""
    match = re.search(r"\.(\d+)\.", key)
    if not match:
        return key, ""
    return f"{key[: match.start(1)]}{{i}}{key[match.end(1) :]}", str(int(match[1]))


def _lazily(array: Any, function: Callable, heads: int = 0) -> Any:
    """function(array, heads) of an array that may still be in its file."""
    if not isinstance(array, LazyArray):
        return function(array, heads)
    # One number that looks like an array of that shape.
    shape = function(np.broadcast_to(np.zeros((), array.dtype), array.shape), heads).shape
    return LazyArray(shape, array.dtype, lambda: function(array.read(), heads))


def _split(array: Any, parts: int, op: Op, where: str) -> list[Any]:
    shape = tuple(array.shape)
    if (op.rank is not None and len(shape) != op.rank) or 0 in shape or shape[:1] == ():
        raise UserError(f"{where} has shape {shape}, expected {op.rank or 'some'} axes")
    if parts == 1:
        return [array]
    if shape[0] % parts:
        raise UserError(f"{where} has shape {shape}, expected {parts} equal parts of rows")
    return rows(array.reshape((parts, shape[0] // parts, *shape[1:])))


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyArray(shape, parts[0].dtype, lambda: np.concatenate([np.asarray(p) for p in parts]))


# What a file is.


def _unwrap(arrays: Arrays) -> tuple[dict[str, str], str, dict[str, Any]]:
    """The network of a file, without what stands before its names.

    Returns:
      ({name: its name in the file}, the part of the file that was taken, {name: array}).
    """
    base = rf"({'|'.join(_HF_NAMES)})\."
    wrappers = {}
    for match in filter(None, map(_ANCHOR.fullmatch, arrays)):
        wrapper = re.sub(rf"{base}$", "", match[1])
        words = re.findall(r"[^./]+", wrapper)
        if strange := [word for word in words if word not in _WRAPPERS]:
            raise UserError(
                f"its arrays stand under {strange[0]!r} ({match[0]}), where no library puts them: "
                "take what stands there into a file of its own"
            )
        wrappers[wrapper] = min(map(_WRAPPERS.index, words), default=-1)
    wrapper = min(wrappers, key=lambda name: wrappers[name])
    taken, inside = {}, {}
    for key, array in arrays.items():
        if key.startswith(wrapper):
            name = re.sub(rf"^{base}", "", key.removeprefix(wrapper))
            name = re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name)  # DINOv2's chunks of blocks.
            taken[name], inside[name] = key, array
    if "embeddings.patch_embeddings.projection.weight" in inside:
        renames = _HF5 if any(".norm1." in k for k in inside) else (*_HF5, *_HF5_MLP)
        for pattern, new in renames:
            taken = {re.sub(pattern, new, k): v for k, v in taken.items()}
        inside = dict(zip(taken, inside.values(), strict=True))
    return taken, wrapper.rstrip("./"), inside


def _anchor_of(inside: Arrays) -> str:
    return next(key for key in inside if _ANCHOR.fullmatch(key))


def _timm_layout(inside: Arrays, settings: Mapping[str, Any], whose: str, file: str) -> Layout:
    block = "blocks.0."
    has_scale = f"{block}ls1.gamma" in inside or f"{block}gamma_1" in inside
    registers = "reg_token" in inside or "register_tokens" in inside
    positions = inside["pos_embed"].shape[1] if "pos_embed" in inside else 0
    tokens = ("cls_token" in inside) + ("dist_token" in inside)
    told: dict[str, Any] = {
        "activation": "gelu_erf",
        "layer_norm_epsilon": 1e-6,
        "position_resize": "torch-antialias" if whose == "timm" else "torch",
        "classifier": "token" if "cls_token" in inside else "gap",
    }
    kind, dropped = "ViT or DeiT", r"^head\.(mlp|last_layer)|^mask_token$"
    problems = {
        "attention pooling beside a class token or registers": "attn_pool.latent" in inside
        and (registers or tokens > 0),
        "registers that have positions": "reg_token" in inside
        and _placed_registers(inside, positions, tokens, settings),
    }
    if found := [name for name, is_so in problems.items() if is_so]:
        raise UserError(f"it has {' and '.join(found)}, which is not computed here")
    if "attn_pool.latent" in inside:
        kind, told["classifier"] = "SigLIP", "map"
        told["activation"] = _siglip_activation(inside, positions)
    elif settings.get("siglip"):
        told["activation"] = _siglip_activation(inside, positions)
    elif "decoder_pos_embed" in inside:
        kind, dropped = "MAE, pre-trained", r"^decoder|^mask_token$"
    elif "dist_token" in inside:
        kind = "DeiT, distilled"
    elif f"{block}gamma_1" in inside:
        kind, whose, told["position_resize"] = "DeiT-III", "fb", "torch"
    elif has_scale and "mask_token" in inside:
        kind, whose = "DINOv2", "fb"
        told["position_resize"] = "torch-antialias" if registers else "dinov2"
    elif has_scale:
        is_deit3 = not registers and not _has_position(inside, positions, tokens, settings)
        kind = "DeiT-III" if is_deit3 else "DINOv2"
    if whose == "fb" and kind == "ViT or DeiT" and re.search(r"dino(?!v[23])", file):
        told["position_resize"] = "dinov2"  # DINO's first version had the 0.1, too.
    if kind == "DeiT-III":
        told["drop_path_mode"] = "constant"
    if registers and kind != "ViT or DeiT":
        kind += " with registers"
    if has_scale:
        told["layer_scale"] = 1e-4 if kind == "DeiT-III" else 1e-5
    if "fc_norm.weight" in inside:
        told["classifier"] = "gap"
        kind = "MAE, fine-tuned, or another that takes the mean" if kind == "ViT or DeiT" else kind
    told["classifier"] = settings.get("classifier") or told["classifier"]
    if told["classifier"] == "token_unpooled" and "cls_token" not in inside:
        told["classifier"] = "unpooled"
        if registers:
            _log.warning("without pooling timm gives the registers too, here only the patches")
    if "cls_token" in inside:
        told["unread_class_token"] = told["classifier"] in ("gap", "map")
        told["cls_has_position"] = _has_position(inside, positions, tokens, settings)
    if "dist_token" in inside:
        told["distilled"] = "heads"
    table = TIMM | _FACEBOOK
    fc1, fc2 = (inside.get(f"{block}mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and fc1.shape[:1] != fc2.shape[1:]:
        table = table | TIMM_SWIGLU
    return Layout(f"{whose} {kind}", table, dropped, told)


def _has_position(inside: Arrays, rows: int, tokens: int, settings: Mapping[str, Any]) -> bool:
    """Whether the class token has a row of the positions. Published grids are square."""
    if size := settings.get("image_size"):
        *_, height, width = inside["patch_embed.proj.weight"].shape
        grid = (size[0] // height) * (size[1] // width)
        if rows in (grid, grid + tokens):
            return rows != grid
    return math.isqrt(rows) ** 2 != rows


def _placed_registers(inside: Arrays, rows: int, tokens: int, settings: Mapping[str, Any]) -> bool:
    """Whether registers have rows of the positions, too."""
    registers = inside["reg_token"].shape[1]
    if size := settings.get("image_size"):
        *_, height, width = inside["patch_embed.proj.weight"].shape
        return rows == (size[0] // height) * (size[1] // width) + tokens + registers
    grids = [rows, rows - tokens, rows - tokens - registers]
    is_square = [n > 0 and math.isqrt(n) ** 2 == n for n in grids]
    return is_square == [False, False, True]


def _siglip_activation(inside: Arrays, positions: int) -> str:
    """What timm computes: erf in the networks of the first SigLIP, though all were trained with
    tanh."""
    width, _, patch, _ = inside["patch_embed.proj.weight"].shape
    second = patch == 32 or width >= 1536 or (width == 1152 and patch == 16)
    return "gelu_tanh" if second or (width == 1024 and positions == 1024) else "gelu_erf"


def _hf_layout(inside: Arrays, with_pooler: bool) -> Layout:
    told: dict[str, Any] = {
        "activation": "gelu_erf",
        "layer_norm_epsilon": 1e-6,
        "position_resize": "torch",
        "classifier": "token",
    }
    dropped = r"mask_token$|position_ids$" + (r"" if with_pooler else r"|^pooler\.")
    if "embeddings.patch_embedding.weight" in inside:
        told |= {"activation": "gelu_tanh", "classifier": "map"}
        dropped = r"^text_model\.|^logit_(scale|bias)$|position_ids$"
        if "classifier.weight" in inside:
            told["classifier"] = "gap"
            dropped += r"|^head\."
        elif "head.probe" not in inside:
            told["classifier"] = "gap"
        return Layout("HF SigLIP", SIGLIP, dropped, told)
    if any(".layer_scale1." in key for key in inside):
        told |= {"layer_scale": 1e-5}
        head = inside.get("classifier.weight")
        if head is not None and head.shape[1:] == (2 * inside[_anchor_of(inside)].shape[0],):
            told["classifier"] = "token_gap"
        table = HF_DINOV2 | HF_SWIGLU | _HF5_SWIGLU
        if "embeddings.register_tokens" in inside:
            told["position_resize"] = "torch-antialias"
            return Layout("HF DINOv2 with registers", table, dropped, told)
        return Layout("HF DINOv2", table, dropped, told)
    told["layer_norm_epsilon"] = 1e-12
    if "embeddings.distillation_token" in inside:
        told["distilled"] = "heads" if "distillation_classifier.weight" in inside else "token"
        return Layout("HF DeiT", HF_DEIT, dropped, told)
    return Layout("HF ViT", HF_VIT, dropped, told)


_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": None,  # Of SwiGLU.
}
_POOLS = {"token": "token", "avg": "gap", "map": "map", "": "token_unpooled"}


# Of timm's networks: whose arrays are named as those of a ViT, but which compute something else.
_OTHER_ARCHITECTURES = (
    r"rpn|rope|relpos|_xp_|samvit|_r\d*_s\d|resnet|clip|beit|eva|cait|dinov3|mci|_\d+x[2-9]_|_d?pwee_"
    r"|_dwee_|_dlittle_|intern|radio|aimv2|_pe_|sapiens|lingbot"
)
_ARCHITECTURES = r"(flexi)?vit_|deit3?_|test_vit"
# What `model_args` may ask for: what the arrays tell, what is read below, and what is of training.
_KNOWN_ARGS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth"),
    *("num_heads", "mlp_ratio", "qkv_bias", "init_values", "class_token", "no_embed_class"),
    *("reg_tokens", "fc_norm", "act_layer", "drop_rate", "pos_drop_rate", "patch_drop_rate"),
    *("proj_drop_rate", "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
)
_USUAL_ARGS = {"proj_bias": True, "final_norm": True, "pos_embed": "learn"}


def _check_timm(architecture: str, args: Mapping[str, Any]) -> None:
    """Raises UserError if a config.json of timm is of a network that isn't computed here."""
    if re.search(_OTHER_ARCHITECTURES, architecture):
        raise UserError(
            f"it is timm's {architecture}, by its config.json, which has no place here: expected a "
            "ViT, DeiT, DeiT-III, DINOv2 or SigLIP"
        )
    for name, value in args.items():
        # None, False, 0 and "" are what it does by default.
        if name not in _KNOWN_ARGS and (value or None) != _USUAL_ARGS.get(name):
            raise UserError(f"config.json asks for {name} {value!r}, which is not known")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of timm or transformers tells; nothing if it is another file.

    Raises UserError for what our networks don't compute, or damage.
    """
    if "architecture" in config:
        args: Mapping[str, Any] = config.get("model_args") or {}
        size = args.get("img_size") or (config.get("pretrained_cfg") or {}).get("input_size")
        found: dict[str, Any] = {
            "num_heads": args.get("num_heads"),
            "activation": args.get("act_layer"),
            "classifier": args.get("global_pool", config.get("global_pool")),
            "image_size": size,
            "width": config.get("num_features"),
            "siglip": "siglip" in str(config["architecture"]),
        }
        _check_timm(str(config["architecture"]), args)
    elif "model_type" in config:
        args = config.get("vision_config") or config
        found = {
            "num_heads": args.get("num_attention_heads"),
            "activation": args.get("hidden_act"),
            "layer_norm_epsilon": args.get("layer_norm_eps"),
            "image_size": args.get("image_size"),
            "width": args.get("hidden_size"),
        }
    else:
        return {}
    found = {field: value for field, value in found.items() if value is not None}
    for field, known in (("activation", _ACTIVATIONS), ("classifier", _POOLS)):
        if field in found:
            if found[field] not in known:
                raise UserError(
                    f"config.json asks for {field} {found[field]!r}, expected one of "
                    f"{', '.join(known)}"
                )
            found[field] = known[found[field]]
    if "layer_norm_epsilon" in found:
        found["layer_norm_epsilon"] = float(found["layer_norm_epsilon"])
    if "image_size" in found:
        size = found["image_size"]
        height, width = size[-2:] if isinstance(size, list | tuple) else (size, size)
        found["image_size"] = (int(height), int(width))
    return found


IMAGENET: dict[str, tuple[float, ...]] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
_HALF: dict[str, tuple[float, ...]] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


def _stated_values(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]] | None:
    """Mean and standard deviation of the values that a network is for, where a file tells them."""
    timm, hf = (config.get(part) or {} for part in ("pretrained_cfg", "preprocessor"))
    mean, std = timm.get("mean") or hf.get("image_mean"), timm.get("std") or hf.get("image_std")
    if not (mean and std):
        return None
    return {"mean": _floats(mean), "std": _floats(std)}


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values if isinstance(values, list) else [values]))


def _values(kind: str, file: str) -> dict[str, tuple[float, ...]]:
    """The same by the kind of network and the name of its file."""
    is_google = "SigLIP" in kind or kind == "HF ViT"
    if kind.endswith("ViT or DeiT") and not re.search(r"deit|dino|mae|moco", file, re.IGNORECASE):
        is_google = not kind.startswith("fb")
        _log.warning(
            "nothing tells whether it is a ViT, of images in [-1, 1], or a DeiT, of ImageNet's "
            "mean and deviation, which differ in no array: taken as the %s",
            "former" if is_google else "latter",
        )
    return _HALF if is_google else IMAGENET


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    names = config.get("label_names") or config.get("id2label")
    if isinstance(names, dict):
        if sorted(names, key=int) != [str(i) for i in range(len(names))]:
            return None
        names = [names[str(i)] for i in range(len(names))]
    if not names or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names):
        return None
    return [str(name) for name in names]


def _usual_heads(inside: Arrays, width: int) -> int:
    """The heads of published networks of that width."""
    heads = {192: 3, 256: 4, 320: 5, 384: 6, 448: 7, 512: 8, 640: 10, 768: 12, 1024: 16}
    heads |= dict.fromkeys((1152, 1280, 1408, 1664), 16) | {4096: 32}
    if any("attn_pool.latent" in key or "head.probe" in key for key in inside):
        heads[1536] = 16
    elif any(".ls1." in key or ".layer_scale1." in key for key in inside):
        heads[1536] = 24
    if width not in heads:
        raise UserError(
            f"no array tells the number of attention heads, nor does the width {width}, and there "
            f"is no config.json beside the file: {_GIVE_HEADS}"
        )
    return heads[width]


def _check_size(size: Any, found: Arrays, fields: Mapping[str, Any]) -> None:
    """Raises UserError if the stored positions are not for the configured size of images."""
    placed = fields.get("cls_has_position", True)
    tokens = ("cls" in found) + ("dist" in found) if placed else 0
    height, width, *_ = found["embedding/kernel"].shape
    expected = (size[0] // height) * (size[1] // width) + tokens
    if expected != (rows := found[POSITIONS].shape[1]):
        raise UserError(
            f"the config.json beside it is for images of {size[0]}x{size[1]}, which need "
            f"{expected} positions, but {rows} are stored: mend its size (img_size, input_size, "
            "image_size)"
        )
