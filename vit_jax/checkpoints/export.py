"""Folders of weights that timm and Hugging Face's transformers load, and compute the same with."""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.checkpoints import torch, torch_swin
from vit_jax.checkpoints.formats import with_zero_token
from vit_jax.checkpoints.torch import POSITIONS
from vit_jax.errors import UserError
from vit_jax.files import atomic_write
from vit_jax.models import Spec, SwinTransformer, VisionTransformer

LIBRARIES = ("timm", "hf")

Arrays = dict[str, np.ndarray]

_NAMES = {"timm": "timm", "hf": "transformers"}
_TIMM_ACTIVATIONS = {"gelu_tanh": "gelu_tanh", "gelu_erf": "gelu", "quick_gelu": "quick_gelu"}
_HF_ACTIVATIONS = _TIMM_ACTIVATIONS | {"gelu_tanh": "gelu_pytorch_tanh"}

# What these libraries do to images: squeeze them, or cut the middle out, and normalise.
_PREPROCESS = re.compile(
    r"(?:resize\((?P<whole>[\d, ()]+), method='pil_(?P<squeeze>\w+)'\)"
    r"|resize_small\((?P<short>\d+|\(\d+, \d+\)), method='pil_(?P<method>\w+)'\)"
    r"\|central_crop\((?P<crop>\d+|\(\d+, \d+\))(?P<even>, round_even=True)?\))"
    r"\|(?:value_range|normalize)\("
)
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers.

# What `fold` makes another form of.
_FOLDABLE = ("layer_norm_epsilon", "positions of fixed sines")

_log = logging.getLogger(__name__)


def export(
    folder: str | os.PathLike,
    library: str,
    arrays: Mapping[str, np.ndarray],
    spec: Spec,
    *,
    labels: Sequence[str] | None = None,
    preprocess: str = "",
    loss: str = "softmax",
    force: bool = False,
) -> list[Path]:
    """Writes model.safetensors, config.json and for transformers preprocessor_config.json.

    Args:
      folder: where to; it is made if it isn't there.
      library: one of LIBRARIES.
      arrays, spec: a Vision or Swin Transformer, under today's names.
      labels, preprocess, loss: see `pretrained.Pretrained`. Of a preprocessing that the library
        doesn't do, mean and deviation are written and that images are squeezed to the size, and
        said.
      force: whether files that are there may be replaced.

    Returns:
      the files.

    Raises UserError with the field that the library can't compute, or if a file is there already.
    """
    folder = Path(folder)
    names = check_folder(folder, library, force)
    _refuse(library, {f"a {spec.kind}": type(spec.module) not in _WRITERS})
    own = _WRITERS[type(spec.module)][library]
    values, resizing = _values(preprocess, spec.channels), _resizing(library, preprocess, spec)
    written, config, table = own(dict(arrays), spec, labels)
    if loss == "sigmoid" and spec.num_classes is not None:
        if library == "hf":
            config["problem_type"] = "multi_label_classification"
        else:
            _log.warning("timm notes no loss: that classes don't exclude each other is not written")
    tensors = torch.write_torch(written, table, spec.num_layers)
    files = {names[1]: config}
    if library == "hf":
        files[names[2]] = _processor(spec, values, resizing)
    else:
        config["pretrained_cfg"] |= _timm_preprocessing(spec, values, resizing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't make the folder {folder} ({e.strerror}): choose another") from e
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
    from safetensors.numpy import save

    plain = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic_write(folder / names[0]) as file:
        file.write(save(plain, metadata={"format": "pt"}))
    return [folder / name for name in names]


def check_folder(folder: Path, library: str, force: bool) -> list[str]:
    """The names of the files that `export` writes to a folder. Raises UserError if it may not."""
    if library not in LIBRARIES:
        raise UserError(f"unknown library {library!r}, expected one of {', '.join(LIBRARIES)}")
    names = ["model.safetensors", "config.json"]
    names += ["preprocessor_config.json"] * (library == "hf")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is a file, expected a folder to write to: choose another")
    if not force and (there := [name for name in names if (folder / name).exists()]):
        raise UserError(f"{folder} has {' and '.join(there)} already: choose another, or --force")
    if (notes := folder / "model.json").exists():
        raise UserError(
            f"{notes} would be taken for the notes of what is written: choose another folder, or "
            "remove it"
        )
    return names


def _refuse(library: str, problems: Mapping[str, bool]) -> None:
    if found := [name for name, is_one in problems.items() if is_one]:
        foldable = all(name.startswith(_FOLDABLE) for name in found)
        raise UserError(
            f"{_NAMES[library]} doesn't compute {' nor '.join(found)}: "
            + ("say --fold, by which it computes the same" if foldable else "keep them as .npz")
        )


def _values(preprocess: str, channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of values from 0 to 1, of each channel. Raises UserError for
    another range."""
    if match := re.search(r"normalize\((.+)\)$", preprocess):
        text = match[1].replace("(", "[").replace(")", "]").replace(",]", "]")
        mean, std = json.loads(f"[{text}]")
    elif match := re.search(r"value_range\((.+), (.+)\)$", preprocess):
        low, high = float(match[1]), float(match[2])
        mean, std = -low / (high - low), 1 / (high - low)
    else:
        raise UserError(f"no range of values can be told from the preprocessing {preprocess!r}")
    mean, std = (np.broadcast_to(x, channels).tolist() for x in (mean, std))
    return mean, std


class _Resizing(NamedTuple):
    """A squeeze, or with `crop` the fraction that timm cuts out, and transformers' shorter side."""

    method: str
    crop: tuple[float, int] | None = None


def _resizing(library: str, preprocess: str, spec: Spec) -> _Resizing:
    """How images are resized, or how the library comes nearest, which is said."""
    from vit_jax.data.recorded import crop_fraction  # Slow to import.

    height, width = spec.image_size
    size = str(height) if height == width else f"({height}, {width})"
    if found := _PREPROCESS.match(preprocess):
        if found["whole"] == size:
            return _Resizing(found["squeeze"])
        # Of an odd rest each library leaves the odd pixel on the side that it says.
        if found["crop"] == size and bool(found["even"]) == (library == "timm"):
            high, *wide = map(int, re.findall(r"\d+", found["short"]))
            fraction = crop_fraction(spec.image_size, (high, wide[0] if wide else high))
            # Transformers has no pair, timm for images that aren't square nothing else.
            if fraction if library == "timm" else not wide:
                return _Resizing(found["method"], (fraction or 1.0, high))
    nearest = f"resize({size}, method='pil_bilinear')"
    _log.warning(
        "%s doesn't resize images as %s does: %s is written in its place",
        *(_NAMES[library], repr(preprocess), nearest),
    )
    return _Resizing("bilinear")


def _timm_preprocessing(spec: Spec, values: Any, resizing: _Resizing) -> dict[str, Any]:
    return {
        "interpolation": resizing.method,
        "crop_pct": resizing.crop[0] if resizing.crop else 1.0,
        "crop_mode": "center" if resizing.crop else "squash",
        "mean": values[0],
        "std": values[1],
    }


def _not_theirs(spec: Spec) -> dict[str, bool]:
    """What neither library computes of a ViT."""
    return {
        f"classifier {spec.classifier!r}": spec.classifier.endswith(("unpooled", "first")),
        "a ResNet before the patches": spec.resnet is not None,
        "positions of fixed sines": spec.position_embedding != "learned",
    }


def _for_timm(
    arrays: Arrays, spec: Spec, labels: Sequence[str] | None
) -> tuple[Arrays, dict[str, Any], torch.Table]:
    _refuse("timm", _not_theirs(spec))
    swiglu, channels = spec.mlp == "swiglu", spec.channels
    prefix = spec.num_prefix_tokens
    problems = {
        f"classifier {spec.classifier!r}": spec.classifier == "token_gap",
        f"layer_norm_epsilon {spec.layer_norm_epsilon}": spec.layer_norm_epsilon != 1e-6,
        "pre_logits": spec.representation_size is not None,
        "a distillation token without a head": spec.distilled == "token",
        "a distillation token with registers": spec.distilled != "none" and spec.num_registers > 0,
        "attention pooling that sees other tokens than patches": spec.classifier == "map"
        and prefix > 0,
    }
    _refuse("timm", problems)
    placed = spec.cls_has_position
    if spec.num_registers:
        # There positions are for all tokens or for patches only, so the class token takes its own.
        if placed and "cls" in arrays:
            arrays["cls"] = arrays["cls"] + arrays[POSITIONS][:, :1]
            arrays[POSITIONS] = arrays[POSITIONS][:, 1:]
        placed = False
    architecture = "vit_giant_patch14_dinov2" if swiglu else "vit_base_patch16_224"
    if spec.distilled == "heads":
        architecture = "deit_base_distilled_patch16_224"
    hidden = spec.mlp_dim * (2 if swiglu else 1)
    ratio = hidden / spec.hidden_size
    pool = {"token": "token", "gap": "avg", "map": "map"}[spec.classifier]
    args = {
        "img_size": list(spec.image_size),
        "patch_size": list(spec.patch_size),
        "in_chans": channels,
        "num_classes": spec.num_classes or 0,
        "global_pool": pool,
        "embed_dim": spec.hidden_size,
        "depth": spec.num_layers,
        "num_heads": spec.num_heads,
        # It is multiplied and cut to a whole number there.
        "mlp_ratio": ratio if int(spec.hidden_size * ratio) == hidden else ratio + 1e-9,
        "qkv_bias": spec.qkv_bias,
        "init_values": spec.layer_scale,
        "class_token": "cls" in arrays,
        "no_embed_class": not placed,
        "reg_tokens": spec.num_registers,
        "fc_norm": spec.fc_norm,
    }
    if not swiglu:
        args["act_layer"] = _TIMM_ACTIVATIONS[spec.activation]
    heads = ["head", "head_dist"] if spec.distilled == "heads" else "head"
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": spec.num_classes or 0,
        "num_features": spec.hidden_size,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "num_classes": spec.num_classes or 0,
            "input_size": [channels, *spec.image_size],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": heads,
        },
    }
    if labels:
        config["label_names"] = list(labels)
    return arrays, config, torch.TIMM | (torch.TIMM_SWIGLU if swiglu else {})


def _for_transformers(
    arrays: Arrays, spec: Spec, labels: Sequence[str] | None
) -> tuple[Arrays, dict[str, Any], torch.Table]:
    _refuse("hf", _not_theirs(spec))
    is_siglip = spec.classifier == "map"
    is_dinov2 = not is_siglip and (
        spec.layer_scale is not None
        or spec.num_registers > 0
        or spec.mlp == "swiglu"
        or spec.classifier == "token_gap"
    )
    height, width = spec.image_size
    grid = spec.grid_size
    problems = {
        f"classifier {spec.classifier!r}": spec.classifier == "gap",
        "a class token beside attention pooling": spec.unread_class_token,
        "patches that are not square": spec.patch_size[0] != spec.patch_size[1],
        "images that are not square, of SigLIP or DINOv2": (is_siglip or is_dinov2)
        and (height != width or grid[0] != grid[1]),
        "classes behind attention pooling": is_siglip and spec.num_classes is not None,
        "pre_logits but of a network without a head": spec.representation_size is not None
        and (spec.num_classes is not None or is_siglip or is_dinov2 or spec.distilled != "none"),
        "keys, queries and values without bias, of SigLIP": is_siglip and not spec.qkv_bias,
        "registers or LayerScale of SigLIP": is_siglip
        and (spec.num_registers > 0 or spec.layer_scale is not None or spec.mlp == "swiglu"),
        "a distillation token of DINOv2": is_dinov2 and spec.distilled != "none",
    }
    _refuse("hf", problems)
    config: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.mlp_dim,
        "hidden_act": _HF_ACTIVATIONS[spec.activation],
        "layer_norm_eps": spec.layer_norm_epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": spec.patch_size[0],
        "num_channels": spec.channels,
        "qkv_bias": spec.qkv_bias,
        "dtype": "float32",
    }
    if spec.num_classes is not None:
        names = labels or [f"LABEL_{i}" for i in range(spec.num_classes)]
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    if is_siglip:
        config |= {"model_type": "siglip_vision_model", "architectures": ["SiglipVisionModel"]}
        return arrays, config, torch.SIGLIP
    if not spec.cls_has_position:
        for _ in range(spec.num_prefix_tokens - spec.num_registers):
            arrays[POSITIONS] = np.asarray(with_zero_token(arrays[POSITIONS]))
    if is_dinov2:
        return _as_dinov2(arrays, config, spec)
    family = "vit" if spec.distilled == "none" else "deit"
    name = {"vit": "ViT", "deit": "DeiT"}[family]
    has_head = spec.num_classes is not None
    ending = "ForImageClassification" if has_head else "Model"
    with_teacher = "WithTeacher" if has_head and spec.distilled == "heads" else ""
    config |= {"model_type": family, "architectures": [f"{name}{ending}{with_teacher}"]}
    if spec.representation_size is not None:
        config |= {"pooler_output_size": spec.representation_size, "pooler_act": "tanh"}
    table = torch.HF_DEIT if family == "deit" else torch.HF_VIT
    if with_teacher:
        table = {k: v for k, v in table.items() if not k.startswith("classifier.")}
    else:
        table = {k: v for k, v in table.items() if "_classifier" not in k}
    return arrays, config, _prefixed(table, f"{family}." if has_head else "")


def _as_dinov2(
    arrays: Arrays, config: dict[str, Any], spec: Spec
) -> tuple[Arrays, dict[str, Any], torch.Table]:
    width, hidden = spec.hidden_size, spec.mlp_dim
    is_swiglu = spec.mlp == "swiglu"
    # A whole number there, as is what it makes: of SwiGLU two thirds, up to a multiple of eight.
    config["mlp_ratio"] = ratio = round((1.5 if is_swiglu else 1) * hidden / width)
    made = (int(width * ratio * 2 / 3) + 7) // 8 * 8 if is_swiglu else width * ratio
    _refuse("hf", {f"MLPs of {hidden} for a width of {width}, of DINOv2": made != hidden})
    del config["intermediate_size"]
    registers = spec.num_registers
    kind, name = ("dinov2", "Dinov2") if not registers else _WITH_REGISTERS
    for i in range(spec.num_layers if spec.layer_scale is None else 0):
        for n in (0, 1):
            scale = f"Transformer/encoderblock_{i}/LayerScale_{n}/scale"
            arrays[scale] = np.ones(width, np.float32)
    table = torch.HF_DINOV2
    if is_swiglu:
        table = {k: v for k, v in table.items() if ".mlp.fc" not in k} | torch.HF_SWIGLU
    # There all have the token that stands for masked patches, and none uses it outside of training.
    arrays["mask"] = np.zeros((1, width), np.float32)
    table = table | {"embeddings.mask_token": (("mask",), "same")}
    if spec.num_classes is not None and spec.classifier == "token":
        # Their head sees the mean of the patches too, here without any weight.
        kernel = arrays["head/kernel"]
        arrays["head/kernel"] = np.concatenate([kernel, np.zeros_like(kernel)])
    ending = "ForImageClassification" if spec.num_classes is not None else "Model"
    config |= {
        "model_type": kind,
        "architectures": [f"{name}{ending}"],
        "use_swiglu_ffn": is_swiglu,
        "layerscale_value": 1.0 if spec.layer_scale is None else spec.layer_scale,
    }
    if registers:
        config["num_register_tokens"] = registers
    return arrays, config, _prefixed(table, f"{kind}." if spec.num_classes is not None else "")


_WITH_REGISTERS = ("dinov2_with_registers", "Dinov2WithRegisters")


def _swin_for(library: str) -> Callable[..., Any]:
    own = {"timm": torch_swin.for_timm, "hf": torch_swin.for_transformers}[library]

    def write(arrays: Arrays, spec: Spec, labels: Sequence[str] | None) -> Any:
        _refuse(library, torch_swin.problems(library, spec))
        return own(arrays, spec, labels)

    return write


# (arrays, spec, labels) -> (arrays, config.json, table).
_WRITERS: dict[type, dict[str, Callable[..., Any]]] = {
    VisionTransformer: {"timm": _for_timm, "hf": _for_transformers},
    SwinTransformer: {library: _swin_for(library) for library in LIBRARIES},
}


def _prefixed(table: torch.Table, prefix: str) -> torch.Table:
    return {
        name if "classifier" in name else f"{prefix}{name}": rule for name, rule in table.items()
    }


def _processor(spec: Spec, values: Any, resizing: _Resizing) -> dict[str, Any]:
    size = dict(zip(("height", "width"), spec.image_size, strict=True))
    cut = {"do_center_crop": True, "crop_size": size} if resizing.crop else {}
    return {
        # This one cuts, that one doesn't.
        "image_processor_type": "BitImageProcessor" if cut else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resizing.crop[1]} if resizing.crop else size,
        "resample": _RESAMPLE[resizing.method],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": values[0],
        "image_std": values[1],
    } | cut
