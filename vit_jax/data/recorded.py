"""The preprocessing that goes with weights, as a text of `preprocess`: for another size of images,
and from the files of timm and transformers."""

import math
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.data.ops import Size
from vit_jax.data.preprocess import parse
from vit_jax.errors import UserError

_SIZED = re.compile(r"\b(resize|resize_small|central_crop)\((?:(\d+)|\((\d+), (\d+)\))")
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers.


def at_size(text: str, old: Size, new: Size) -> str | None:
    """The preprocessing for images of another size: with the same method, crop and values.

    Args:
      text: preprocessing that gives images of `old`, (h, w).
      new: (h, w) of the images that are wanted.

    Returns:
      the text; None if it isn't by a resize, `resize_small` and `central_crop` that the images got
      their size.
    """

    def resized(match: re.Match) -> str:
        sides = int(match[2] or match[3]), int(match[2] or match[4])
        if fraction := crop_fraction(old, sides):
            return f"{match[1]}({_size(_whole(new, fraction))}"
        scaled = [round(n * side / o) for n, side, o in zip(new, sides, old, strict=True)]
        return f"{match[1]}({_size(scaled)}"

    preprocess = parse(_SIZED.sub(resized, parse(text).spec))
    fits = "resize" in text and preprocess.output_size == new
    return preprocess.spec if fits else None


def crop_fraction(size: Size, resized: Size) -> float | None:
    """The `crop_pct` by which timm resizes to `resized`, to cut `size` out of it: of 248 pixels 224
    are 0.9, the shortest fraction that gives them. None if no fraction gives both sides."""
    most = min(n / side for n, side in zip(size, resized, strict=True))
    fractions = (math.floor(most * 10**digits) / 10**digits for digits in range(1, 17))
    return next((f for f in fractions if f and _whole(size, f) == resized), None)


def _whole(size: Size, fraction: float) -> Size:
    return math.floor(size[0] / fraction), math.floor(size[1] / fraction)


def _size(sizes: Any) -> str:
    height, width = sizes
    return str(height) if height == width else f"({height}, {width})"


def from_config(config: Mapping[str, Any], image_size: Size) -> str | None:
    """What timm's or transformers' own evaluation does to images.

    Args:
      config: a config.json with `pretrained_cfg`, or with what preprocessor_config.json says as
        "preprocessor".
      image_size: (h, w) that the network is for.

    Returns:
      the text; None if they don't say.

    Raises UserError if that is nothing that the operations here do.
    """
    try:
        if config.get("pretrained_cfg"):
            return parse(_of_timm(config["pretrained_cfg"], image_size)).spec
        if config.get("preprocessor"):
            text, own = _of_transformers(config["preprocessor"])
            return at_size(text, own, image_size)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(
            f"its configuration asks for preprocessing that isn't understood ({e!r}): mend it, or "
            "remove it and give your own"
        ) from e
    return None


def _of_timm(asked: Mapping[str, Any], size: Size) -> str:
    """timm.data.transforms_factory.transforms_imagenet_eval, whose defaults these are."""
    crop, mode = asked.get("crop_pct") or 0.875, asked.get("crop_mode") or "center"
    method = f"method='pil_{asked.get('interpolation') or 'bicubic'}'"
    scaled = _whole(size, crop)
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r}")
    first = f"{'resize' if mode == 'squash' else 'resize_small'}({_size(scaled)}"
    cut = f"central_crop({_size(size)}, round_even=True)|"
    if mode == "squash" and scaled == size:
        cut = ""
    mean, std = (
        asked.get("mean") or (0.485, 0.456, 0.406),
        asked.get("std") or (0.229, 0.224, 0.225),
    )
    return f"{first}, {method})|{cut}{_values(mean, std)}"


def _of_transformers(asked: Mapping[str, Any]) -> tuple[str, Size]:
    """The text, and the (h, w) that its images have."""
    if not asked.get("do_resize", True):
        raise ValueError("do_resize is false")
    kind = str(asked.get("image_processor_type") or asked.get("feature_extractor_type"))
    resample = asked.get("resample", 2 if kind.startswith("ViT") else 3)
    method = f"method='pil_{_RESAMPLE[resample]}'"
    size, crop = asked["size"], asked.get("crop_size")
    if isinstance(size, int):
        # One number is a square, but for those that always cut.
        is_short = kind.startswith(("Bit", "CLIP"))
        size = {"shortest_edge": size} if is_short else {"height": size, "width": size}
    if "shortest_edge" in size:
        own: Size = (int(size["shortest_edge"]),) * 2
        text = f"resize_small({own[0]}, {method})"
    else:
        own = int(size["height"]), int(size["width"])
        text = f"resize({_size(own)}, {method})"
    if crop and asked.get("do_center_crop", True):
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        own = int(crop["height"]), int(crop["width"])
        text += f"|central_crop({_size(own)})"
    if abs(asked.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3 or not asked.get(
        "do_rescale", True
    ):
        raise ValueError(f"rescale_factor {asked.get('rescale_factor')}")
    mean, std = asked.get("image_mean") or 0.5, asked.get("image_std") or 0.5
    if not asked.get("do_normalize", True):
        mean, std = 0, 1
    return f"{text}|{_values(mean, std)}", own


def _values(mean: Any, std: Any) -> str:
    mean, std = (tuple(map(float, v)) if isinstance(v, list | tuple) else v for v in (mean, std))
    if {mean, std} <= {0.5, (0.5, 0.5, 0.5)}:
        return "value_range(-1, 1)"
    return f"normalize({mean}, {std})"
