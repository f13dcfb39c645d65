"""Swin Transformers of both versions (arXiv:2103.14030, arXiv:2111.09883) as Microsoft, timm and
Hugging Face have them: what `torch.read_torch` and `export` have to know."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.checkpoints.torch import (
    FAMILIES,
    Arrays,
    Known,
    Layout,
    Table,
    _dense,
    _heads,
    _norm,
    _plain,
)
from vit_jax.errors import UserError
from vit_jax.models import Spec
from vit_jax.models.swin import window_and_shift

_BUFFERS = r"relative_position_index$|relative_coords_table$|attn_mask$"
# In the names of timm's and of the published files, "window12to16_192to256".
_NAME = re.compile(r"window(?P<trained>\d+)(?:to(?P<window>\d+))?_(?:\d+to)?(?P<size>\d+)")
# What the settings of both libraries may ask for beside what the arrays tell and what is read here.
_FIXED: dict[str, Any] = {
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_absolute_embeddings": False,
    "always_partition": False,
    "patch_norm": True,
    "ape": False,
    "global_pool": "avg",
}

_log = logging.getLogger(__name__)


def swin_table(library: str, version: int, depths: Sequence[int]) -> Table:
    """The names of every array of a network of so many blocks in each stage.

    Args:
      library: "ms", "timm" or "hf".
    """
    if library == "hf":
        table = {
            **_dense("embeddings.patch_embeddings.projection", "embedding", op="convolution"),
            **_norm("embeddings.norm", "embedding_norm"),
            **_norm("layernorm", "encoder_norm"),
            **_dense("classifier", "head"),
        }
    else:
        table = {
            **_dense("patch_embed.proj", "embedding", op="convolution"),
            **_norm("patch_embed.norm", "embedding_norm"),
            **_norm("norm", "encoder_norm"),
            **_dense("head" if library == "ms" else "head.fc", "head"),
        }
    stages = "encoder.layers" if library == "hf" else "layers"
    of_block = _hf_block if library == "hf" else _block
    for i, depth in enumerate(depths):
        for j in range(depth):
            table |= of_block(f"{stages}.{i}.blocks.{j}", f"stage_{i}/encoderblock_{j}", version)
        # timm puts it at the start of the next stage.
        theirs = f"{stages}.{i + (library == 'timm')}.downsample"
        ours = f"stage_{i}/PatchMerging_0"
        table |= _norm(f"{theirs}.norm", f"{ours}/LayerNorm_0")
        table[f"{theirs}.reduction.weight"] = ((f"{ours}/Dense_0/kernel",), "matrix")
    return table


def _block(theirs: str, ours: str, version: int) -> Table:
    attention = f"{ours}/WindowAttention_0"
    qkv = [f"{attention}/{part}" for part in ("query", "key", "value")]
    if version == 1:
        own = _heads(f"{theirs}.attn.qkv", *qkv)
        own |= _plain({f"{theirs}.attn.relative_position_bias_table": f"{attention}/{_TABLE}"})
    else:
        own = {
            f"{theirs}.attn.qkv.weight": (tuple(f"{name}/kernel" for name in qkv), "heads"),
            f"{theirs}.attn.q_bias": ((f"{qkv[0]}/bias",), "head bias"),
            f"{theirs}.attn.v_bias": ((f"{qkv[2]}/bias",), "head bias"),
            **_positions(f"{theirs}.attn", "cpb_mlp", attention),
        }
    return {
        **_norm(f"{theirs}.norm1", f"{ours}/LayerNorm_0"),
        **own,
        **_dense(f"{theirs}.attn.proj", f"{attention}/out", op="merge heads"),
        **_norm(f"{theirs}.norm2", f"{ours}/LayerNorm_1"),
        **_dense(f"{theirs}.mlp.fc1", f"{ours}/MlpBlock_0/Dense_0"),
        **_dense(f"{theirs}.mlp.fc2", f"{ours}/MlpBlock_0/Dense_1"),
    }


def _hf_block(theirs: str, ours: str, version: int) -> Table:
    attention, inner = f"{ours}/WindowAttention_0", f"{theirs}.attention.self"
    own = {
        **_heads(f"{inner}.query", f"{attention}/query"),
        **_heads(f"{inner}.key", f"{attention}/key"),
        **_heads(f"{inner}.value", f"{attention}/value"),
    }
    if version == 1:
        own |= _plain({f"{inner}.relative_position_bias_table": f"{attention}/{_TABLE}"})
    else:
        own |= _positions(inner, "continuous_position_bias_mlp", attention)
    return {
        **_norm(f"{theirs}.layernorm_before", f"{ours}/LayerNorm_0"),
        **own,
        **_dense(f"{theirs}.attention.output.dense", f"{attention}/out", op="merge heads"),
        **_norm(f"{theirs}.layernorm_after", f"{ours}/LayerNorm_1"),
        **_dense(f"{theirs}.intermediate.dense", f"{ours}/MlpBlock_0/Dense_0"),
        **_dense(f"{theirs}.output.dense", f"{ours}/MlpBlock_0/Dense_1"),
    }


_TABLE = "relative_position_bias"


def _positions(theirs: str, mlp: str, attention: str) -> Table:
    return {
        **_plain({f"{theirs}.logit_scale": f"{attention}/logit_scale"}),
        **_dense(f"{theirs}.{mlp}.0", f"{attention}/position_mlp/Dense_0"),
        f"{theirs}.{mlp}.2.weight": ((f"{attention}/position_mlp/Dense_1/kernel",), "matrix"),
    }


def swin_layout(inside: Arrays, known: Known) -> Layout | None:
    """The layout of a Swin Transformer's arrays; None if they are another network's."""
    blocks: dict[tuple[int, int], str] = {}
    for key in inside:
        if match := re.match(r"((?:encoder\.)?layers\.(\d{1,3})\.blocks\.(\d{1,4}))\.", key):
            blocks[int(match[2]), int(match[3])] = match[1]
    if (0, 0) not in blocks:
        return None
    stages = range(1 + max(stage for stage, _ in blocks))
    depths = [1 + max((j for i, j in blocks if i == stage), default=0) for stage in stages]
    is_hf = blocks[0, 0].startswith("encoder.")
    attention = "attention.self" if is_hf else "attn"
    version = 2 if f"{blocks[0, 0]}.{attention}.logit_scale" in inside else 1
    library = "hf"
    if not is_hf:
        # Without a head and with one stage nothing tells, and nothing has to.
        is_timm = "head.fc.weight" in inside or (
            any(key.startswith("layers.1.downsample.") for key in inside)
            and not any(key.startswith("layers.0.downsample.") for key in inside)
        )
        library = "timm" if is_timm else "ms"
    evidence = "logit_scale" if version == 2 else "relative_position_bias_table"
    heads = []
    for stage in stages:
        array = inside.get(f"{blocks.get((stage, 0))}.{attention}.{evidence}")
        if array is None or len(array.shape) != (3 if version == 2 else 2):
            raise UserError(f"{evidence} of stage {stage} is not there, or of no known shape")
        heads.append(array.shape[0 if version == 2 else 1])
    if known.heads is not None:
        raise UserError(
            f"{known.heads} attention heads are given, but its arrays tell those of each stage "
            f"({', '.join(map(str, heads))}): leave heads out"
        )
    told, places = _told(inside, blocks, attention, version, known)
    if is_hf and _is_padded(inside, told, len(depths)):
        _log.warning(
            "it has maps that no whole number of windows fills: Hugging Face pads them before it "
            "shifts them, here it is the other way round, as in timm, which gives other logits"
        )
    whose = {"hf": "HF", "timm": "timm", "ms": "Microsoft's"}[library]
    stage_of = re.compile(r"stage_(\d+)/")

    def heads_of(name: str) -> int:
        match = stage_of.match(name)
        return heads[int(match[1])] if match else 1

    size = told.get("image_size", (0, 0))
    squash = {"crop_mode": "squash", "crop_pct": 1.0} if max(size) > 256 else {"crop_pct": 0.875}
    usual = {"ms": squash, "timm": {"crop_pct": 1.0 if max(size) > 256 else 0.9}}.get(library)
    return Layout(
        f"{whose} Swin{'V2' if version == 2 else ''}",
        swin_table(library, version, depths),
        _BUFFERS,
        told,
        {"pretrained_cfg": {**usual, "interpolation": "bicubic"}} if usual else {},
        heads_of,
        {"heads": f"the shapes of {evidence}", **places},
    )


def _is_padded(inside: Arrays, told: Mapping[str, Any], stages: int) -> bool:
    """Whether there are maps that windows, where they are smaller, don't fill."""
    *_, height, width = inside["embeddings.patch_embeddings.projection.weight"].shape
    sides = [n // p for n, p in zip(told.get("image_size", (0, 0)), (height, width), strict=True)]
    maps = [-(-side // 2**i) for side in sides for i in range(stages)]
    return any(side > told["window"] and side % told["window"] for side in maps)


def _told(
    inside: Arrays,
    blocks: Mapping[tuple[int, int], str],
    attention: str,
    version: int,
    known: Known,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Window, pretrained windows and size of the images, and what told them."""
    stages = 1 + max(stage for stage, _ in blocks)
    told: dict[str, Any] = {}
    places: dict[str, str] = {}

    def tell(place: str, **found: Any) -> None:
        for field, value in found.items():
            if value is not None and field not in told:
                told[field], places[field] = value, place

    tell("config.json", **_of_config(known.config))
    tell("its buffers", **_of_buffers(inside, blocks, attention, version))
    named = _NAME.search(str(known.config.get("architecture", ""))) or _NAME.search(known.file)
    if named:
        side, trained = int(named["size"]), int(named["trained"])
        tell("its name", window=int(named["window"] or trained), image_size=(side, side))
        if named["window"]:
            # They were trained on images of 16 pixels for each token of the window.
            windows = tuple(min(trained, 4 * trained // 2**i) for i in range(stages))
            tell("its name", pretrained_windows=windows)
    if version == 1:  # Its tables tell.
        rows = inside[f"{blocks[0, 0]}.{attention}.relative_position_bias_table"].shape[0]
        side = (math.isqrt(rows) + 1) // 2
        # A map may be smaller than the window that the network was made with.
        if "image_size" not in told or told.get("window", 0) <= side:
            told["window"], places["window"] = side, "the shapes of its tables"
        told.pop("pretrained_windows", None)
        return told, places
    tell("what was given", window=known.window)
    if "window" not in told:
        raise UserError(
            "no array tells the windows of a Swin Transformer of version 2: put its config.json "
            "beside it, or give them, --window N, --config.model.window=N or load(..., window=N)"
        )
    if places["window"] == "what was given" and "pretrained_windows" not in told:
        _log.warning(
            "nothing tells for which windows its positions were trained: taken as those that are "
            "given. If it was fine-tuned from others, tell: load(..., pretrained_windows=...)"
        )
    return told, places


def _of_buffers(
    inside: Arrays, blocks: Mapping[tuple[int, int], str], attention: str, version: int
) -> dict[str, Any]:
    """What arrays tell that Microsoft's files have, and whose values no network needs.

    Raises UserError if they contradict the others.
    """
    found: dict[str, Any] = {}
    trained = []
    for (stage, block), prefix in sorted(blocks.items()):
        index = inside.get(f"{prefix}.{attention}.relative_position_index")
        table = inside.get(f"{prefix}.{attention}.relative_position_bias_table")
        coordinates = inside.get(f"{prefix}.{attention}.relative_coords_table")
        window = math.isqrt(index.shape[0]) if index is not None and len(index.shape) == 2 else 0
        if window and table is not None and table.shape[:1] != ((2 * window - 1) ** 2,):
            raise UserError(
                f"{prefix}: relative_position_index is of windows of {window}, but its table has "
                f"{table.shape[0]} rows: the file is damaged"
            )
        if block == 0 and coordinates is not None and len(coordinates.shape) == 4:
            side = (coordinates.shape[1] + 1) // 2
            largest = float(np.max(coordinates)) if coordinates.shape[1] < 200 else 0.0
            # The largest is log(8 (window - 1) / (trained - 1) + 1) / log(8).
            own = 1 + round(8 * (side - 1) / (8**largest - 1)) if largest > 0 else side
            trained.append(0 if own == side else own)
            window = side
        if (stage, block) == (0, 0) and window:
            found["window"] = window
        mask = inside.get(f"{prefix}.attn_mask")
        if (stage, block) == (0, 1) and mask is not None and window:
            *_, height, width = inside[_PATCHES].shape if _PATCHES in inside else (0, 0)
            side = math.isqrt(mask.shape[0]) * window
            found["image_size"] = (side * height, side * width) if height else None
    if version == 2 and trained and any(trained):
        found["pretrained_windows"] = tuple(trained)
    return found


_PATCHES = "patch_embed.proj.weight"


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of timm or transformers tells. Raises UserError for what isn't computed
    here."""
    is_timm = "architecture" in config
    if not is_timm and "model_type" not in config:
        return {}
    args = (config.get("model_args") or {}) if is_timm else config
    if is_timm and re.search(r"_cr_|_s3_", str(config["architecture"])):
        raise UserError(f"it is timm's {config['architecture']}, which has no place here")
    for name, usual in _FIXED.items():
        if name in args and args[name] not in (usual, None):
            raise UserError(f"config.json asks for {name} {args[name]!r}, which is not known")
    cfg = config.get("pretrained_cfg") or {}
    size = args.get("img_size", args.get("image_size")) or cfg.get("input_size")
    window, trained = args.get("window_size"), args.get("pretrained_window_sizes")
    if isinstance(window, list):
        if len(set(window)) > 1:
            raise UserError(f"config.json asks for windows of {window}, expected one size")
        window = window[0]
    if isinstance(trained, int):
        trained = [trained] * 4
    pair = size[-2:] if isinstance(size, list | tuple) else (size, size)
    return {
        "window": None if window is None else int(window),
        "pretrained_windows": tuple(map(int, trained)) if trained and any(trained) else None,
        "image_size": (int(pair[0]), int(pair[1])) if size else None,
    }


FAMILIES.append(swin_layout)


# Outwards.


def for_timm(
    arrays: dict[str, np.ndarray], spec: Spec, labels: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], Table]:
    """(arrays, config.json, table) of what timm loads."""
    version = spec.version
    ratio, trained = spec.mlp_ratio, list(spec.pretrained_windows)
    args: dict[str, Any] = {
        "img_size": list(spec.image_size),
        "patch_size": spec.patch_size[0],
        "in_chans": spec.channels,
        "num_classes": spec.num_classes or 0,
        "embed_dim": spec.hidden_size,
        "depths": list(spec.depths),
        "num_heads": list(spec.heads),
        "window_size": spec.window,
        "mlp_ratio": ratio if int(spec.hidden_size * ratio) == round(spec.hidden_size * ratio)
        else ratio + 1e-9,
    }  # fmt: skip
    if version == 2:
        args["pretrained_window_sizes"] = trained
    name = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": spec.num_classes or 0,
        "num_features": spec.num_features,
        "global_pool": "avg",
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": spec.num_classes or 0,
            "input_size": [spec.channels, *spec.image_size],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }
    if labels:
        config["label_names"] = list(labels)
    return arrays, config, swin_table("timm", version, spec.depths)


def for_transformers(
    arrays: dict[str, np.ndarray], spec: Spec, labels: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any], Table]:
    """(arrays, config.json, table) of what transformers loads."""
    kind, name = ("swin", "Swin") if spec.version == 1 else ("swinv2", "Swinv2")
    config: dict[str, Any] = {
        "model_type": kind,
        "image_size": spec.image_size[0],
        "patch_size": spec.patch_size[0],
        "num_channels": spec.channels,
        "embed_dim": spec.hidden_size,
        "depths": list(spec.depths),
        "num_heads": list(spec.heads),
        "window_size": spec.window,
        "mlp_ratio": spec.mlp_ratio,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "dtype": "float32",
    }
    if spec.version == 2:
        config["pretrained_window_sizes"] = list(spec.pretrained_windows)
    has_head = spec.num_classes is not None
    if has_head:
        names = labels or [f"LABEL_{i}" for i in range(spec.num_classes)]
        config["id2label"] = {str(i): label for i, label in enumerate(names)}
        config["label2id"] = {label: i for i, label in enumerate(names)}
    config["architectures"] = [f"{name}{'ForImageClassification' if has_head else 'Model'}"]
    table = swin_table("hf", spec.version, spec.depths)
    prefix = f"{kind}." if has_head else ""
    return arrays, config, {
        key if key.startswith("classifier.") else f"{prefix}{key}": rule
        for key, rule in table.items()
    }  # fmt: skip


def problems(library: str, spec: Spec) -> dict[str, bool]:
    """What a library doesn't compute as it is computed here, and whether this network has it."""
    grids = spec.stage_grids(spec.image_size)
    windows = [window_and_shift(grid, spec.window)[0] for grid in grids]
    found = {"patches that are not square": spec.patch_size[0] != spec.patch_size[1]}
    if library == "timm":
        return found
    return found | {
        "images that are not square": spec.image_size[0] != spec.image_size[1],
        "maps that no whole number of windows fills as it is done here (it pads before it rolls)": (
            any(size % w for grid, window in zip(grids, windows, strict=True)
                for size, w in zip(grid, window, strict=True))
        ),
        "maps smaller than a window": spec.version == 1
        and any(min(window) < spec.window for window in windows),
        "images that no whole number of patches fills": any(
            size % patch for size, patch in zip(spec.image_size, spec.patch_size, strict=True)
        ),
        "odd maps": any(size % 2 for grid in grids[:-1] for size in grid),
    }  # fmt: skip
