"""Which values of images are black and white, where they aren't 8-bit: `config.levels`."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vit_jax.data.headers import read_header
from vit_jax.data.ops import NEARLY_ALL, PerChannel, short_reach, spelled
from vit_jax.data.source import Source
from vit_jax.data.workers import own_cores
from vit_jax.errors import UserError

EXPECTED = (
    "full (the whole range of the type), the number of bits that are used as 12 bit, percentile "
    "(found in the images to train on), or the values lo, hi"
)
_SEEN = 16  # Images whose type is looked at before training.
_SAMPLED = 256  # Images of whose values percentiles are taken.
_PIXELS = 4096  # Of each of them.
_PERCENTILES = (0.1, NEARLY_ALL)


def find_levels(source: Source, wish: str) -> tuple[str, list[str]]:
    """The operation `levels` for images to train on, and what a person should know about it.

    Depends on the images alone, so that all processes of a run find the same.

    Args:
      source: the images.
      wish: "full", "12 bit", "percentile" or "0, 4095"; empty for "full", with a look at the values
        where a type has more than 8 bits.

    Returns:
      e.g. ("levels(0, 4095)", ["values 0 to 4095 become 0 to 255"]); "" where nothing is to be
      done: 8 bits that nothing was said about, or images of both 8 and 16 bits.

    Raises UserError for another wish, a type without a whole range among those that were found, or
    images of one value only.
    """
    if bits := re.fullmatch(r"(\d{1,2})[ -]?bits?", wish.strip()):
        return _told((0.0,), (2.0 ** int(bits[1]) - 1,), "")
    if "," in wish:
        try:
            lo, hi = map(float, wish.strip(" ()").split(","))
        except ValueError:
            raise UserError(f"config.levels is {wish!r}, expected {EXPECTED}") from None
        return _told((lo,), (hi,), "")
    if wish not in ("", "full", "percentile"):
        raise UserError(f"config.levels is {wish!r}, expected {EXPECTED}")
    types = _types(source)
    if wish == "percentile":
        return _percentiles(source)
    if set(types) <= {"uint8"}:
        return "", []
    seen = "of the images looked at " + " and ".join(
        f"{count} are of {name}" for name, count in sorted(types.items())
    )
    if set(types) - {"uint8", "uint16"}:
        values = np.concatenate([v.ravel() for v in _sampled(source, _SEEN)])
        ends = f", of values from {values.min():.6g} to {values.max():.6g}" if len(values) else ""
        raise UserError(
            f"{source.name}: {seen}{ends}: config.levels has to say what "
            "is black and what white: percentile, or lo, hi"
        )
    if len(types) > 1:
        return "", [f"{seen}: each counts by the range of its type"]
    seen += "; one of 8 bits would be refused"
    if wish:
        return _told((0.0,), (65535.0,), seen)
    doubt = sliver(np.concatenate([v.ravel() for v in _sampled(source, _SEEN)]), "uint16")
    return _told((0.0,), (65535.0,), "; ".join(filter(None, [seen, doubt])))


def sliver(values: np.ndarray, dtype: str) -> str:
    """A warning if nearly all values are among the lowest of 16 bits; "" otherwise. Of 8 bits they
    may be: a dark photograph."""
    if dtype != "uint16" or not (reach := short_reach(values)):
        return ""
    bits = max(math.ceil(math.log2(reach + 1)), 1)
    bits += bits % 2 if bits > 8 else 0  # Cameras have 10, 12 or 14.
    return (
        f"{NEARLY_ALL} % of the values are at most {reach:,.0f} of 65,535: "
        f"set --config.levels='{bits} bit' if they have no more bits, or percentile"
    )


def sample(image: np.ndarray, pixels: int = _PIXELS) -> np.ndarray:
    """The values of some pixels from all over an image (h, w, c), float64 (about `pixels`, c)."""
    step = max(math.isqrt(image.shape[0] * image.shape[1] // pixels), 1)
    return image[step // 2 :: step, step // 2 :: step].reshape(-1, image.shape[2]).astype(float)


def _told(lo: PerChannel, hi: PerChannel, note: str) -> tuple[str, list[str]]:
    text = f"levels({spelled(lo)}, {spelled(hi)})"
    return text, [f"{text} makes of them 0 to 255{f' ({note})' if note else ''}"]


def _some(source: Source, count: int) -> Sequence[int]:
    """The places of so many images at most, from all over a source."""
    return np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist()


def _types(source: Source) -> Counter[str]:
    """How many of some images have which type; those that can't be read are told elsewhere."""
    types: Counter[str] = Counter()
    for index in _some(source, _SEEN):
        try:
            stored, _ = source.stored(index)
            types[
                read_header(stored).dtype if isinstance(stored, bytes) else stored.dtype.name
            ] += 1
        except UserError:
            continue
    return types


def _sampled(source: Source, count: int) -> list[np.ndarray]:
    """The finite values of some images, (n, c) each."""

    def read(index: int) -> np.ndarray:
        try:
            values = sample(source[index]["image"])
        except UserError:
            values = np.empty((0, source.channels))
        return values[np.isfinite(values).all(axis=1)]

    with ThreadPoolExecutor(own_cores()) as pool:
        return list(pool.map(read, _some(source, count)))


def _percentiles(source: Source) -> tuple[str, list[str]]:
    """Of all values, where channels are colours; of other channels each by itself."""
    found = _sampled(source, _SAMPLED)
    values = np.concatenate(found) if found else np.empty((0, source.channels))
    if source.channels in (1, 3):
        values = values.reshape(-1, 1)
    if not len(values):
        raise UserError(f"{source.name}: no image can be read to find its levels")
    ends = [tuple(float(f"{v:.6g}") for v in row) for row in np.percentile(values, _PERCENTILES, 0)]
    if any(low >= high for low, high in zip(*ends, strict=True)):
        raise UserError(
            f"{source.name}: a channel of one value only, {min(ends[0]):g}: give its levels as "
            "lo, hi"
        )
    places = "the {}th and {}th percentiles".format(*_PERCENTILES)
    return _told(ends[0], ends[1], f"{places} of {len(found)} images to train on")
