"""Operations that change how an image looks: colour jitter, RandAugment, random erasing.

All work on whole grey levels: (h, w, c) in, of floats rounded to uint8, and uint8 of the same shape
out, mostly by tables of 256 values. What they make of an image is a pure function of the image and
of `rng`.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

from vit_jax.data.images import to_uint8
from vit_jax.data.ops import Step, check_colours, op
from vit_jax.errors import UserError

# The settings of "How to train your ViT?" (arXiv:2106.10270), as released with big_vision: the
# operation, and the parameter of the mixup that goes with it.
AUGREG: dict[str, tuple[str, float]] = {
    "none": ("", 0.0),
    "light1": ("randaug(2, 0)", 0.0),
    "light2": ("randaug(2, 10)", 0.2),
    "medium1": ("randaug(2, 15)", 0.2),
    "medium2": ("randaug(2, 15)", 0.5),
    "strong1": ("randaug(2, 20)", 0.5),
    "strong2": ("randaug(2, 20)", 0.8),
}
FILL = 128  # what RandAugment puts where there is no image
_LEVELS = np.arange(256, dtype=np.float32)
# OpenCV rounds to the nearest level. This less cuts off instead; a little more is for whole results
# that come out a rounding error short.
_CUT_OFF = -0.5 + 2**-10


@op
def randaug(layers: int, magnitude: float) -> Step:
    """RandAugment (Cubuk et al. 2019, arXiv:1909.13719): `layers` of the operations of `RANDAUG`.

    Each is drawn anew, all equally likely, and always applied, at strength `magnitude` out of 10;
    more than 10 is allowed. Lengths are in pixels, meant for images of about 224.
    """
    if not 0 <= magnitude <= 30 or not 1 <= layers <= 16:
        raise UserError("expected 1 to 16 layers and a magnitude of 0 to 30")
    distortions, level = tuple(RANDAUG.values()), magnitude / 10

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        check_colours("randaug", image)
        image = to_uint8(image)
        for chosen in rng.integers(len(distortions), size=layers):
            image = distortions[chosen](image, level, rng)
        return image

    return Step(apply, random=True, on_uint8=True)


@op
def color_jitter(brightness: float, contrast: float, saturation: float, hue: float = 0.0) -> Step:
    """Changes colours by factors between 1 - x and 1 + x, in random order.

    x is `brightness`, `contrast` and `saturation`; `hue` is the largest turn of the colour circle,
    either way, 0.5 being half of it. Source: Wu et al. 2018 (arXiv:1805.01978) and many since.
    """
    strengths = (brightness, contrast, saturation)
    if min(*strengths, hue) < 0 or hue > 0.5:
        raise UserError("expected 0 or more, and a hue of at most 0.5")
    changes: list[tuple[Callable, float, float]] = [
        (change, max(1 - x, 0.0), 1 + x)
        for change, x in zip((brighten, change_contrast, saturate), strengths, strict=True)
    ]
    changes.append((turn_hue, -hue, hue))
    changes = [(change, low, high) for change, low, high in changes if low < high]

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        check_colours("color_jitter", image)
        image = to_uint8(image)
        for i in rng.permutation(len(changes)):
            change, low, high = changes[i]
            image = change(image, rng.uniform(low, high))
        return image

    return Step(apply, random=True, on_uint8=True)


@op
def random_erasing(p: float = 0.5, area_min: float = 0.02, area_max: float = 0.4) -> Step:
    """With probability `p`, puts noise over a part of the image.

    The part covers between `area_min` and `area_max` of the image and is 0.3 to 3.33 times as
    wide as high, drawn on a logarithmic scale. After 100 vain attempts nothing is erased.
    Source: Zhong et al. 2017 (arXiv:1708.04896), algorithm 1, with random values (RE-R).
    """
    if not 0 <= p <= 1 or not 0 < area_min <= area_max <= 1:
        raise UserError("expected 0 <= p <= 1 and 0 < area_min <= area_max <= 1")

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = to_uint8(image)
        if rng.random() >= p:
            return image
        full_height, full_width, channels = image.shape
        for _ in range(100):
            area = rng.uniform(area_min, area_max) * full_height * full_width
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 1 <= height <= full_height and 1 <= width <= full_width:
                top = rng.integers(full_height - height, endpoint=True)
                left = rng.integers(full_width - width, endpoint=True)
                noise = rng.integers(0, 256, (height, width, channels), np.uint8)
                image = image.copy()
                image[top : top + height, left : left + width] = noise
                break
        return image

    return Step(apply, random=True, on_uint8=True)


# What they are made of: uint8 (h, w, c), contiguous, to uint8 of the same shape. The colours are
# computed as PIL's ImageOps and ImageEnhance compute them.


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0..255, unless it is all one level."""
    tables, levels = [], np.arange(256)
    for channel in cv2.split(image):
        low, high, _, _ = cv2.minMaxLoc(channel)
        scale = 255 / (high - low) if high > low else 1.0
        tables.append(_table(levels * scale - low * scale if high > low else levels))
    return _look_up(image, *tables)


def equalize(image: np.ndarray) -> np.ndarray:
    """Has all levels of each channel about equally often."""
    tables = []
    for channel in range(image.shape[2]):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        below = np.cumsum(counts) - counts
        tables.append(_table((below + step // 2) // step if step else _LEVELS))
    return _look_up(image, *tables)


def invert(image: np.ndarray) -> np.ndarray:
    """255 - image."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the upper 1 to 8 bits; 0 or less is taken for 1, more than 8 for 8."""
    return image & np.uint8(0xFF00 >> min(max(bits, 1), 8) & 0xFF)


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts what is not below the threshold: nothing, if that is 256 or more."""
    return _look_up(image, _table(np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS)))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds to what is below 128, up to 255."""
    return _look_up(image, _table(np.where(_LEVELS < 128, _LEVELS + addition, _LEVELS)))


def saturate(image: np.ndarray, factor: float) -> np.ndarray:
    """ImageEnhance.Color: 0 is grey, 1 the image itself, more is more colourful."""
    if image.shape[2] == 1:
        return image
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _blend(grey, image, factor)


def change_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """ImageEnhance.Contrast: 0 is the mean grey all over."""
    grey = image if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    mean = int(cv2.mean(grey)[0] + 0.5)
    return _look_up(image, _table(mean + np.float32(factor) * (_LEVELS - mean)))


def brighten(image: np.ndarray, factor: float) -> np.ndarray:
    """ImageEnhance.Brightness: 0 is black."""
    return _look_up(image, _table(np.float32(factor) * _LEVELS))


def sharpen(image: np.ndarray, factor: float) -> np.ndarray:
    """ImageEnhance.Sharpness: 0 is smoothed, more than 1 sharper; the outermost pixels stay."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    smooth = cv2.filter2D(image, -1, kernel).reshape(image.shape)
    smooth[[0, -1]], smooth[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return _blend(smooth, image, factor)


def turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turns the colour circle by so many full turns."""
    if image.shape[2] == 1:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(turn * 256) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turned about the middle."""
    height, width = image.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def affine(
    image: np.ndarray, matrix: tuple[float, float, float, float, float, float]
) -> np.ndarray:
    """The image moved; `FILL` where nothing lies.

    Args:
      matrix: (a, b, c, d, e, f): the result at column x and row y is the pixel nearest to column
        a x + b y + c and row d x + e y + f of the image, to a thousandth of a pixel.
    """
    moved = cv2.warpAffine(
        image,
        np.array(matrix, np.float64).reshape(2, 3),
        image.shape[1::-1],
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL,) * 3,
    )
    return moved.reshape(image.shape)


def cutout(image: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
    """`FILL` in a square of side 2 * half around any pixel, as far as it lies in the image."""
    y, x = rng.integers(image.shape[:2])
    image = image.copy()
    image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = FILL
    return image


def _table(values: np.ndarray) -> np.ndarray:
    """Cut off behind the point, and at 0 and 255."""
    return np.clip(values, 0, 255).astype(np.uint8)


def _look_up(image: np.ndarray, *tables: np.ndarray) -> np.ndarray:
    """One table for all channels, or one a channel."""
    table = tables[0] if len(tables) == 1 else np.stack(tables, axis=-1)[None]
    return cv2.LUT(image, table).reshape(image.shape)


def _blend(start: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """From `start` at factor 0 over `image` at 1 and beyond, cut off."""
    return cv2.addWeighted(image, factor, start, 1 - factor, _CUT_OFF).reshape(image.shape)


def random_sign(rng: np.random.Generator) -> int:
    """1 or -1."""
    return 1 if rng.random() < 0.5 else -1


def enhance_factor(level: float) -> float:
    """What a level of RandAugment means for colour, contrast, brightness and sharpness."""
    return 1.8 * level + 0.1


# The operations of RandAugment: (image, level = magnitude / 10, rng) -> image. Which ones, and what
# they make of a level, is as in AutoAugment's TensorFlow code, which big_vision used too; but
# contrast starts from the mean grey as PIL's, where that code has the number of pixels / 256; and a
# threshold of 256 or more solarizes nothing.
RANDAUG: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "AutoContrast": lambda image, _, rng: autocontrast(image),
    "Equalize": lambda image, _, rng: equalize(image),
    "Invert": lambda image, _, rng: invert(image),
    "Rotate": lambda image, level, rng: rotate(image, random_sign(rng) * 30 * level),
    "Posterize": lambda image, level, rng: posterize(image, int(level * 4)),
    "Solarize": lambda image, level, rng: solarize(image, int(level * 256)),
    "SolarizeAdd": lambda image, level, rng: solarize_add(image, int(level * 110)),
    "Color": lambda image, level, rng: saturate(image, enhance_factor(level)),
    "Contrast": lambda image, level, rng: change_contrast(image, enhance_factor(level)),
    "Brightness": lambda image, level, rng: brighten(image, enhance_factor(level)),
    "Sharpness": lambda image, level, rng: sharpen(image, enhance_factor(level)),
    "ShearX": lambda image, level, rng: affine(
        image, (1, random_sign(rng) * 0.3 * level, 0, 0, 1, 0)
    ),
    "ShearY": lambda image, level, rng: affine(
        image, (1, 0, 0, random_sign(rng) * 0.3 * level, 1, 0)
    ),
    "TranslateX": lambda image, level, rng: affine(
        image, (1, 0, random_sign(rng) * 100 * level, 0, 1, 0)
    ),
    "TranslateY": lambda image, level, rng: affine(
        image, (1, 0, 0, 0, 1, random_sign(rng) * 100 * level)
    ),
    "Cutout": lambda image, level, rng: cutout(image, int(level * 40), rng),
}
