"""The operations of a preprocessing text that cut, resize, convert and normalise; see `preprocess`.

To add an operation, write a function with `@op`, here or in `augment`: its parameters are the
operation's, its annotations say what they may be (`Size`, `Pixels`, `PerChannel`, `Method`, int,
float or bool), and it returns a `Step`.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NewType

import cv2
import numpy as np

from vit_jax.data import images
from vit_jax.data.headers import MAX_BYTES
from vit_jax.data.images import Box
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Size = tuple[int, int]  # (height, width); written 224 or (224, 192)
Pixels = NewType("Pixels", int)
PerChannel = tuple[float, ...]  # One for each channel, or one for all; written 0.5 or (0.5, 0.4)

# Of what an operation makes of an image: as much, in floats, as an image file may decode to.
MAX_AREA = MAX_BYTES // 12
# How to resize: as TensorFlow does, or as Pillow does what it calls so.
Method = Literal["bilinear", "pil_nearest", "pil_bilinear", "pil_bicubic", "pil_lanczos"]

SAME_SIZE: Size = (-1, -1)
NEARLY_ALL = 99.9  # Per cent of the values of images.

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalize:
    """Maps values of 0 to 255, u = (x - 127.5) / 127.5, to u * scale + offset.

    That is what `value_range` and `normalize` are: one operation, used by whoever reads an image
    and inside of a compiled step alike.

    Attributes:
      scale, offset: one number for each channel, or one for all.
    """

    scale: PerChannel
    offset: PerChannel

    def __call__(self, images: Any) -> Any:
        """float32 (..., c) of an array of NumPy or JAX, uint8 or float32 (..., c).

        Raises UserError if it has another number of channels.
        """
        count = max(len(self.scale), len(self.offset))
        if count not in (1, images.shape[-1]):
            raise UserError(
                f"normalize: values for {count} channels and an image of {images.shape[-1]}; put "
                "rgb or gray before it, or give one number for all"
            )
        pixels = images - np.float32(127.5)
        pixels /= np.float32(127.5)  # In place, of NumPy's arrays: the rest costs no memory.
        pixels *= _float32(self.scale)
        pixels += _float32(self.offset)
        return pixels

    @property
    def bounds(self) -> tuple[PerChannel, PerChannel]:
        """What 0 and 255 become."""
        scale, offset = np.broadcast_arrays(self.scale, self.offset)
        return tuple((offset - scale).tolist()), tuple((offset + scale).tolist())

    def undo(self, images: np.ndarray) -> np.ndarray:
        """The uint8 images (..., c) of normalised ones, to be looked at."""
        low, high = self.bounds
        levels = (images - _float32(low)) * _float32(255 / np.subtract(high, low))
        return np.clip(np.rint(levels), 0, 255).astype(np.uint8)

    def __str__(self) -> str:
        """E.g. "-1 to 1"; with a range for each channel, all of them."""
        return ", ".join("{:g} to {:g}".format(*ends) for ends in zip(*self.bounds, strict=True))


class BadValues(UserError):
    """The values of one image can't be taken, whatever others are like."""


def _float32(values: Any) -> Any:
    # A scalar stays one: XLA leaves out multiplying by 1.
    return np.float32(values[0]) if len(values) == 1 else np.array(values, np.float32)


@dataclass(frozen=True)
class Step:
    """One operation, ready to run.

    Attributes:
      apply: (image (h, w, c), rng) -> image, float32 or still uint8.
      crop: ((h, w) of its input, rng) -> the box that `apply` gets; by default that is all of it.
      size: (h, w) of its result; None if that depends on the image; by default that of its input.
      random: whether it draws from `rng`.
      on_uint8: whether it works on whole grey levels, 0 to 255.
      is_geometric: whether it moves pixels, no more.
      can_round: whether `apply` takes rounded=True, for a result of uint8.
      normalize: what it does, if it normalises.
      levels: the values that become 0 and 255, if it is `levels`.
    """

    apply: Callable[..., np.ndarray]
    crop: Callable[[Size, np.random.Generator], Box] | None = None
    size: Size | None = SAME_SIZE
    random: bool = False
    on_uint8: bool = False
    is_geometric: bool = False
    can_round: bool = False
    normalize: Normalize | None = None
    levels: tuple[PerChannel, PerChannel] | None = None


OPS: dict[str, Callable[..., Step]] = {}


def spelled(value: Any) -> str:
    """A number, several, or a word, as they are written in a preprocessing text."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, tuple):
        same = len(set(value)) == 1
        return spelled(value[0]) if same else f"({', '.join(map(spelled, value))})"
    if isinstance(value, bool) or value != int(value):
        return repr(value)
    return str(int(value))


def op(function: Callable[..., Step]) -> Callable[..., Step]:
    """Makes a function an operation of its name."""
    OPS[function.__name__] = function
    return function


@op
def decode() -> Step:
    """Does nothing, for images arrive decoded; may stand first, as other libraries want it."""
    return Step(lambda image, _: image)


@op
def levels(lo: PerChannel, hi: PerChannel) -> Step:
    """Maps lo..hi to 0..255, which all other operations work on, in floats and cut off there.

    For images of other values than 0 to 255: 12 bits are `levels(0, 4095)`. It stands before all
    but `gray` and `rgb`.
    """
    count = max(len(lo), len(hi))
    if len({len(lo), len(hi), 1}) > 2 or not np.less(lo, hi).all():
        raise UserError("expected lo < hi, and as many of both")
    low, high = (np.broadcast_to(np.asarray(ends, np.float64), count) for ends in (lo, hi))

    def apply(image: np.ndarray, _: Any) -> np.ndarray:
        if count not in (1, image.shape[2]):
            raise UserError(f"levels: {count} channels, and the image has {image.shape[2]}")
        if image.dtype.kind in "iu" and high.max() > np.iinfo(image.dtype).max:
            raise BadValues(
                f"levels: the image is of type {image.dtype}, whose values end at "
                f"{np.iinfo(image.dtype).max:,}, expected values of up to {high.max():,g}"
            )
        return _to_levels(image, low, high)

    return Step(apply, levels=(lo, hi))


def _to_levels(image: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float32 (h, w, c), lo..hi as 0..255. Raises BadValues for what is no number."""
    pixels = image.astype(np.float32)
    pixels -= _float32(low)
    pixels *= _float32(255 / (high - low))
    sample = pixels[::8, ::8]
    if (sample > 255).mean() > 0.5:
        _warn_once(
            f"most values of an image lie above {high.max():g}, where levels({low.min():g}, "
            f"{high.max():g}) cuts them off: is it of another range?"
        )
    if image.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadValues("the image holds NaN or infinite values; replace them")
    return np.clip(pixels, 0, 255, out=pixels)


@functools.lru_cache
def _warn_once(text: str) -> None:
    _log.warning("%s", text)


def short_reach(values: np.ndarray) -> float:
    """What nearly all values of 16 bits are below, if that is less than a quarter of their range,
    which then is hardly meant; 0 otherwise."""
    reach = float(np.percentile(values, NEARLY_ALL)) if values.size else 0.0
    return reach if reach < 65535 / 4 else 0.0


def whole_range(image: np.ndarray) -> np.ndarray:
    """The image with values of 0 to 255: uint8 as it is, of 16 bits its whole range as float32.

    Raises BadValues for other types, of which the range isn't told by the type.
    """
    if image.dtype == np.uint8:
        return image
    if image.dtype != np.uint16:
        raise BadValues(
            f"the image is of type {image.dtype}, which doesn't tell what is black and what white: "
            "say it with config.levels, or put levels(lo, hi) first"
        )
    if short_reach(image[::8, ::8]):
        _warn_once(
            "an image of 16 bits has hardly a value above a quarter of 65,535, all of which counts "
            "as its range: if it has fewer bits, say so with levels"
        )
    return _to_levels(image, np.zeros(1), np.full(1, 65535.0))


@op
def inception_crop(
    size: Size,
    area_min: float = 0.05,
    area_max: float = 1.0,
    antialias: bool = False,
    method: Method = "bilinear",
) -> Step:
    """A random part of the image, resized to `size` without keeping its aspect.

    The part covers between `area_min` and `area_max` of the image and is 0.75 to 1.33 times as
    wide as high. As `tf.image.sample_distorted_bounding_box` does: the aspect is uniform, then the
    height among all that fit; after 100 vain attempts the whole image is taken.
    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6.
    """
    if not 0 < area_min <= area_max <= 1:
        raise UserError("expected 0 < area_min <= area_max <= 1")
    crop = functools.partial(random_box, area_min=area_min, area_max=area_max)
    return replace(resize(size, antialias, method), crop=crop, random=True)


def random_box(
    shape: tuple[int, int], rng: np.random.Generator, area_min: float, area_max: float
) -> Box:
    """The part that `inception_crop` takes of an (h, w) image."""
    full_height, full_width = shape
    smallest, largest = (a * full_height * full_width for a in (area_min, area_max))
    for _ in range(100):
        aspect = 0.75 + (1.33 - 0.75) * rng.random()  # `uniform` takes twice as long.
        # 0.49: widths are rounded, so this much more than the full width still fits.
        highest = min(math.sqrt(largest / aspect), full_height, (full_width + 0.49) / aspect)
        high = round(highest)
        low = min(round(math.sqrt(smallest / aspect)), high)
        height = int(rng.integers(low, high + 1))
        width = round(height * aspect)
        if smallest <= height * width <= largest and height <= full_height and width <= full_width:
            top = int(rng.integers(0, full_height - height + 1))
            left = int(rng.integers(0, full_width - width + 1))
            return top, left, height, width
    return 0, 0, full_height, full_width


@op
def flip() -> Step:
    """Mirrors left and right, every second time."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return cv2.flip(image, 1).reshape(image.shape) if rng.random() > 0.5 else image

    return Step(apply, random=True, is_geometric=True)


@op
def resize(size: Size, antialias: bool = False, method: Method = "bilinear") -> Step:
    """The whole image resized to `size`; its aspect isn't kept.

    Bilinear with half-pixel centres, as `tf.image.resize`. With `antialias`, what is made smaller
    is averaged under a triangle as wide as the reduction; without, pixels between are passed over.
    The other methods are Pillow's, on whole grey levels and always antialiased.
    """
    _check_method(method, antialias)
    apply = functools.partial(_resized, size=size, antialias=antialias, method=method)
    return Step(apply, size=size, can_round=True)


@op
def resize_small(size: Size, antialias: bool = False, method: Method = "bilinear") -> Step:
    """The shorter side resized to `size`; the aspect is kept, to the nearest pixel.

    Of a pair (h, w) the image becomes as small as covers both. With a method of Pillow's and one
    number the longer side is cut to a whole pixel below, as torchvision does; timm, whose pairs
    these are, rounds.
    """
    _check_method(method, antialias)

    def apply(image: np.ndarray, rng: np.random.Generator, rounded: bool = False) -> np.ndarray:
        height, width = image.shape[:2]
        scale = max(size[0] / height, size[1] / width)
        result = round(height * scale), round(width * scale)
        if method != "bilinear" and size[0] == size[1]:
            short = min(height, width)
            result = int(size[0] * height / short), int(size[0] * width / short)
        elif method != "bilinear":
            ratio = min(height / size[0], width / size[1])
            result = round(height / ratio), round(width / ratio)
        return _resized(image, rng, result, antialias, rounded, method)

    return Step(apply, size=None, can_round=True)


def _check_method(method: Method, antialias: bool) -> None:
    if antialias and method != "bilinear":
        raise UserError(f"{method} is always antialiased: leave antialias out")


def _resized(
    image: np.ndarray,
    _: Any,
    size: Size,
    antialias: bool,
    rounded: bool = False,
    method: Method = "bilinear",
) -> np.ndarray:
    """float32, or uint8 if `rounded` or by a method of Pillow's."""
    height, width, channels = image.shape
    between = size[0] * width if antialias and width > size[1] else 0
    if max(size[0] * size[1] * channels, between - image.size) > 3 * MAX_AREA:
        raise UserError(
            f"resize: {height} x {width} pixels would become {size[0]:,} x {size[1]:,} of "
            f"{channels} channels, expected {MAX_AREA:,} pixels at most, of 3; remove the image"
        )
    if method != "bilinear":
        return _resized_by_pillow(images.to_uint8(image), size, method)
    if not antialias or (height <= size[0] and width <= size[1]):
        return images.resize(image, size, rounded=rounded)
    # First the rows, then the columns, each a product with a matrix that is nearly all zeros.
    rows = _triangles(height, size[0]) @ image.reshape(height, -1)
    columns = rows.reshape(size[0], width, channels).swapaxes(0, 1).reshape(width, -1)
    result = _triangles(width, size[1]) @ columns
    resized = result.reshape(size[1], size[0], channels).swapaxes(0, 1)
    return images.to_uint8(resized) if rounded else resized


def _resized_by_pillow(image: np.ndarray, size: Size, method: Method) -> np.ndarray:
    from PIL import Image

    resampling = Image.Resampling[method.removeprefix("pil_").upper()]
    # Two channels would be grey and alpha, by which Pillow weighs the other.
    parts = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [np.array(Image.fromarray(part).resize(size[::-1], resampling)) for part in parts]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=2)


def _triangles(before: int, after: int) -> "csr_array":
    """float32 (after, before): how much each pixel weighs in each of the resized ones.

    Weights fall linearly with the distance of the centres to zero at max(before / after, 1) pixels,
    and add up to 1 over the pixels that there are.
    """
    from scipy.sparse import csr_array  # Half of the time in which a worker process starts.

    scale = max(before / after, 1.0)
    centres = (np.arange(after) + 0.5) * (before / after) - 0.5
    first = np.ceil(centres - scale).astype(np.int64)
    pixels = first[:, None] + np.arange(int(2 * scale) + 2)
    weights = np.maximum(1 - np.abs(pixels - centres[:, None]) / scale, 0)
    weights[(pixels < 0) | (pixels >= before)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    starts = np.arange(after + 1) * pixels.shape[1]
    columns = pixels.clip(0, before - 1).ravel()
    return csr_array((weights.astype("f4").ravel(), columns, starts), shape=(after, before))


@op
def central_crop(size: Size, round_even: bool = False) -> Step:
    """The middle of the image, which must be as large as `size` at least.

    Half of an odd margin is rounded down, or with `round_even`, as torchvision does, to an even
    number.
    """

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        margin = _margin("central_crop", image, size)
        top, left = (round(m / 2) if round_even else m // 2 for m in margin)
        return images.cut(image, (top, left, *size))

    return Step(apply, size=size, is_geometric=True)


@op
def random_crop(size: Size) -> Step:
    """A part of `size` from anywhere in the image, which must be as large at least."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left = rng.integers(0, _margin("random_crop", image, size), endpoint=True)
        return images.cut(image, (top, left, *size))

    return Step(apply, size=size, random=True, is_geometric=True)


def _margin(name: str, image: np.ndarray, size: Size) -> Size:
    """How much higher and wider than `size` the image is."""
    margin = image.shape[0] - size[0], image.shape[1] - size[1]
    if min(margin) < 0:
        raise UserError(
            f"{name}: the image is {image.shape[0]} x {image.shape[1]}, expected "
            f"{size[0]} x {size[1]} or larger; put resize_small({spelled(size)}) before it"
        )
    return margin


@op
def random_shift(pixels: Pixels) -> Step:
    """Moves the image by up to `pixels` each way; the gap is 0: black, if before value_range."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left = (int(pixels - x) for x in rng.integers(0, 2 * pixels + 1, 2))
        moved = np.zeros_like(image)
        height, width = (max(n - abs(x), 0) for n, x in zip(image.shape, (top, left), strict=False))
        part = images.cut(image, (max(-top, 0), max(-left, 0), height, width))
        images.cut(moved, (max(top, 0), max(left, 0), height, width))[:] = part
        return moved

    return Step(apply, random=True, is_geometric=True)


@op
def uint8() -> Step:
    """Cuts off what is behind the point, as a cast to uint8 does; LiT's towers were trained so."""
    return Step(lambda image, _: image.astype(np.uint8, copy=False))


@op
def value_range(lo: float, hi: float) -> Step:
    """Maps 0..255 to lo..hi, neither rounded nor clipped; -1, 1 is exactly (x - 127.5) / 127.5."""
    if not lo < hi:
        raise UserError("expected lo < hi")
    return _normalized(Normalize(((hi - lo) / 2,), ((hi + lo) / 2,)))


@op
def normalize(mean: PerChannel, std: PerChannel) -> Step:
    """(x / 255 - mean) / std, the field's convention: of images in [0, 1], for each channel."""
    if not (0 <= min(mean) <= max(mean) <= 1 and 0 < min(std) <= max(std) <= 1):
        raise UserError("expected a mean of 0 to 1 and a std of more than 0 to 1: 255 is 1 here")
    scale, offset = 0.5 / np.array(std), (0.5 - np.array(mean)) / np.array(std)
    return _normalized(Normalize(tuple(scale.tolist()), tuple(offset.tolist())))


def _normalized(normalization: Normalize) -> Step:
    return Step(lambda image, _: normalization(image), normalize=normalization)


@op
def gray() -> Step:
    """Colours become luma (ITU-R BT.601), one channel."""
    weights = np.array([[0.299], [0.587], [0.114]], np.float32)

    def apply(image: np.ndarray, _: Any) -> np.ndarray:
        check_colours("gray", image)
        return image if image.shape[2] == 1 else image.astype("f4") @ weights

    return Step(apply)


@op
def rgb() -> Step:
    """Grey becomes three equal channels."""

    def apply(image: np.ndarray, _: Any) -> np.ndarray:
        check_colours("rgb", image)
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image

    return Step(apply)


def check_colours(name: str, image: np.ndarray) -> None:
    """Raises UserError, naming the operation, for an image that is neither grey nor coloured."""
    if image.shape[2] not in (1, 3):
        raise UserError(f"{name}: an image of {image.shape[2]} channels, expected 1 or 3")
