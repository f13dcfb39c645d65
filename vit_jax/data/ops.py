"""The operations of a preprocessing text that cut, resize and convert; see `preprocess`.

To add an operation, write a function with `@op`, here or in `augment`: its parameters are the
operation's, its annotations say what they may be (`Size`, `Pixels`, int, float or bool), and it
returns a `Step`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NewType

import cv2
import numpy as np

from vit_jax.data import images
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Size = tuple[int, int]  # (height, width); written 224 or (224, 192)
Pixels = NewType("Pixels", int)
Apply = Callable[..., np.ndarray]  # (image, rng), and rounded=True where `Step` says so
Choose = Callable[[tuple[int, int], np.random.Generator], images.Part]

KEPT: Size = (-1, -1)


@dataclass(frozen=True)
class Step:
    """One operation, ready to run.

    Attributes:
      apply: (image (h, w, c), rng) -> image, float32 or still uint8.
      part: ((h, w) of its input, rng) -> the part that `apply` gets; by default that is all of it.
      size: (h, w) of its result; None if that depends on the image; by default that of its input.
      random: whether it draws from `rng`.
      levels: whether it works on whole grey levels, 0 to 255.
      moves: whether it moves pixels, no more.
      rounds: whether `apply` takes rounded=True, for whole grey levels.
      value_range: (lo, hi) that it maps 0 and 255 to, if that is what it does.
    """

    apply: Apply
    part: Choose | None = None
    size: Size | None = KEPT
    random: bool = False
    levels: bool = False
    moves: bool = False
    rounds: bool = False
    value_range: tuple[float, float] | None = None


OPS: dict[str, Callable[..., Step]] = {}


def op(function: Callable[..., Step]) -> Callable[..., Step]:
    """Makes a function an operation of its name."""
    OPS[function.__name__] = function
    return function


@op
def decode() -> Step:
    """Does nothing, for images arrive decoded; may stand first, as other libraries want it."""
    return Step(lambda image, _: image)


@op
def inception_crop(
    size: Size, area_min: float = 0.05, area_max: float = 1.0, antialias: bool = False
) -> Step:
    """A random part of the image, resized to `size` without keeping its aspect.

    The part covers between `area_min` and `area_max` of the image and is 0.75 to 1.33 times as
    wide as high. As `tf.image.sample_distorted_bounding_box` does: the aspect is uniform, then the
    height among all that fit; after 100 vain attempts the whole image is taken.
    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6.
    """
    if not 0 < area_min <= area_max <= 1:
        raise UserError("expected 0 < area_min <= area_max <= 1")

    def part(shape: tuple[int, int], rng: np.random.Generator) -> images.Part:
        return random_box(shape, rng, area_min, area_max)

    return replace(resize(size, antialias), part=part, random=True)


def random_box(
    shape: tuple[int, int], rng: np.random.Generator, area_min: float, area_max: float
) -> images.Part:
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

    return Step(apply, random=True, moves=True)


@op
def resize(size: Size, antialias: bool = False) -> Step:
    """The whole image resized to `size`; its aspect isn't kept.

    Bilinear with half-pixel centres, as `tf.image.resize`. With `antialias`, what is made smaller
    is averaged under a triangle as wide as the reduction; without, pixels between are passed over.
    """
    apply = functools.partial(_resized, size=size, antialias=antialias)
    return Step(apply, size=size, rounds=True)


@op
def resize_small(size: Pixels, antialias: bool = False) -> Step:
    """The shorter side resized to `size`; the aspect is kept, to the nearest pixel."""

    def apply(image: np.ndarray, rng: np.random.Generator, rounded: bool = False) -> np.ndarray:
        height, width = image.shape[:2]
        scale = size / min(height, width)
        result = round(height * scale), round(width * scale)
        if result[0] * result[1] > images.MAX_PIXELS:
            raise UserError(
                f"resize_small: {height} x {width} pixels would become {result[0]:,} x "
                f"{result[1]:,}, expected {images.MAX_PIXELS:,} at most; remove the image"
            )
        return _resized(image, rng, result, antialias, rounded)

    return Step(apply, size=None, rounds=True)


def _resized(
    image: np.ndarray,
    _: np.random.Generator,
    size: Size,
    antialias: bool,
    rounded: bool = False,
) -> np.ndarray:
    """float32, or uint8 if `rounded`."""
    height, width, channels = image.shape
    if not antialias or (height <= size[0] and width <= size[1]):
        return images.resize(image, size, rounded=rounded)
    # First the rows, then the columns, each a product with a matrix that is nearly all zeros.
    rows = _triangles(height, size[0]) @ image.reshape(height, -1)
    columns = rows.reshape(size[0], width, channels).swapaxes(0, 1).reshape(width, -1)
    result = _triangles(width, size[1]) @ columns
    resized = result.reshape(size[1], size[0], channels).swapaxes(0, 1)
    return images.whole_levels(resized) if rounded else resized


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
def central_crop(size: Size) -> Step:
    """The middle of the image, which must be as large as `size` at least."""

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        height, width = _room("central_crop", image, size)
        return _cut(image, height // 2, width // 2, size)

    return Step(apply, size=size, moves=True)


@op
def random_crop(size: Size) -> Step:
    """A part of `size` from anywhere in the image, which must be as large at least."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left = rng.integers(0, _room("random_crop", image, size), endpoint=True)
        return _cut(image, top, left, size)

    return Step(apply, size=size, random=True, moves=True)


def _room(name: str, image: np.ndarray, size: Size) -> Size:
    """How much higher and wider than `size` the image is."""
    room = image.shape[0] - size[0], image.shape[1] - size[1]
    if min(room) < 0:
        raise UserError(
            f"{name}: the image is {image.shape[0]} x {image.shape[1]}, expected "
            f"{size[0]} x {size[1]} or larger; put resize_small({max(size)}) before it"
        )
    return room


def _cut(image: np.ndarray, top: int, left: int, size: Size) -> np.ndarray:
    return image[top : top + size[0], left : left + size[1]]


@op
def random_shift(pixels: Pixels) -> Step:
    """Moves the image by up to `pixels` each way; the gap is 0: black, if before value_range."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        padded = np.zeros((height + 2 * pixels, width + 2 * pixels, image.shape[2]), image.dtype)
        padded[pixels : pixels + height, pixels : pixels + width] = image
        top, left = rng.integers(0, 2 * pixels + 1, 2)
        return padded[top : top + height, left : left + width]

    return Step(apply, random=True, moves=True)


@op
def uint8() -> Step:
    """Cuts off what is behind the point, as a cast to uint8 does; LiT's towers were trained so."""
    return Step(lambda image, _: image.astype(np.uint8, copy=False))


@op
def value_range(lo: float, hi: float) -> Step:
    """Maps 0..255 to lo..hi, neither rounded nor clipped; -1, 1 is exactly (x - 127.5) / 127.5."""
    if not lo < hi:
        raise UserError("expected lo < hi")
    half, middle = np.float32((hi - lo) / 2), np.float32((hi + lo) / 2)
    centre = np.float32(127.5)

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        pixels = image - centre  # then in place: the rest costs no memory
        pixels /= centre
        pixels *= half
        pixels += middle
        return pixels

    return Step(apply, value_range=(lo, hi))


@op
def gray() -> Step:
    """Colours become luma (ITU-R BT.601), one channel."""
    weights = np.array([[0.299], [0.587], [0.114]], np.float32)
    return Step(lambda image, _: image if image.shape[2] == 1 else image.astype("f4") @ weights)


@op
def rgb() -> Step:
    """Grey becomes three equal channels."""
    return Step(lambda image, _: np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)
