"""Everything that needs OpenCV: image files to arrays, and resizing.

Importing this module loads OpenCV and turns its own threads off: images are decoded by many
threads at once, and nested threads only slow each other down.
"""

import os
import zlib
from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np

from vit_jax.data import jpeg
from vit_jax.errors import UserError

cv2.setNumThreads(0)
# A broken image is reported once, by us.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# What an image may decode to, as in PIL: 0.5 GB. A file of some KB may well announce 50 GB.
MAX_PIXELS = 178_956_970

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
}


Part = tuple[int, int, int, int]  # (top, left, height, width)


def decode(
    data: bytes,
    *,
    channels: int = 3,
    name: str = "image",
    part: Callable[[tuple[int, int]], Part] | None = None,
) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP or GIF file.

    The EXIF orientation is applied. Of an animation, the first frame counts. Alpha is dropped, as
    PIL's `convert("RGB")` and TensorFlow's `decode_image` do (only GIF's transparent pixels take
    the background colour). 16-bit values keep their high byte, CMYK becomes RGB, and with one
    channel colours become luma.

    Args:
      data: the content of the file.
      channels: 3 for RGB, 1 for grey.
      name: what errors call the image, usually its path.
      part: (h, w) of the image -> the part of it that is wanted; by default all of it. Most
        JPEGs are decoded no further down.

    Returns:
      uint8 array (h, w, channels), of a part perhaps a view of more.

    Raises:
      UserError: the data is empty, damaged, truncated, no image, or one of more than MAX_PIXELS,
        which is told from its header.
    """
    return opened(data, channels=channels, name=name, part=part)()


def opened(
    data: bytes,
    *,
    channels: int = 3,
    name: str = "image",
    part: Callable[[tuple[int, int]], Part] | None = None,
) -> Callable[[], np.ndarray]:
    """What is left to do of `decode` when a file's header was read and the part was chosen, if the
    header is enough for that."""
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}[channels]
    if not data:
        raise UserError(f"{name}: empty file, expected an image; replace or remove it")
    kind = next((k for start, k in _SIGNATURES.items() if data.startswith(start)), None)
    if kind is None:  # Nor are others decoded that OpenCV knows: their size can't be told before.
        raise UserError(
            f"{name}: not an image (starts with {data[:8]!r}), expected JPEG, PNG, WebP, BMP or "
            "GIF; replace or remove it"
        )
    header = jpeg.read_header(data) if kind == "JPEG" else None
    if header and not header.ends:  # Zeros in place of the second half are, to a decoder, an image.
        data = b""
    elif kind == "PNG":
        data = _plain_png(data)
    height, width = header.size if header else _announced_size(data, kind)
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{name}: a {kind} image of {width:,} x {height:,} pixels, expected {MAX_PIXELS:,} "
            "at most; make it smaller or remove it"
        )
    window: Part | None = None
    upper: bytes | bytearray = data
    if part and header and header.plain:
        window = part((height, width))
        upper = jpeg.upper_rows(data, header, window[0] + window[2])

    def finish() -> np.ndarray:
        image = _imdecode(upper, flag)
        if image is None and upper is not data:
            image = _imdecode(data, flag)
        if image is None:
            raise UserError(f"{name}: truncated or damaged {kind} file; replace or remove it")
        if channels == 1:
            image = image[..., None]
        if part:
            top, left, high, wide = window or part(image.shape[:2])
            image = image[top : top + high, left : left + wide]
        return image

    return finish


def _imdecode(data: bytes | bytearray, flag: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    except cv2.error:  # e.g. absurd dimensions in the header
        return None


def _announced_size(data: bytes, kind: str) -> tuple[int, int]:
    """(height, width) that a file's header tells, (0, 0) if it tells none."""

    def number(start: int, count: int = 2, order: Literal["little", "big"] = "little") -> int:
        return int.from_bytes(data[start : start + count], order)

    if kind == "PNG":
        return number(20, 4, "big"), number(16, 4, "big")
    if kind == "GIF":
        return number(8), number(6)
    if kind == "BMP" and number(14, 4) == 12:
        return number(20), number(18)
    if kind == "BMP":  # a negative height counts from the top
        return min(number(22, 4), 2**32 - number(22, 4)), number(18, 4)
    if kind == "WebP" and data[12:16] == b"VP8X":
        return number(27, 3) + 1, number(24, 3) + 1
    if kind == "WebP" and data[12:16] == b"VP8L":
        return (number(21, 4) >> 14 & 0x3FFF) + 1, (number(21, 4) & 0x3FFF) + 1
    if kind == "WebP":
        return number(28) & 0x3FFF, number(26) & 0x3FFF
    return 0, 0


def _plain_png(data: bytes) -> bytes:
    """A PNG file without what says nothing of its pixels; empty if it is damaged.

    About colour profiles, dates and damage libpng complains on stderr, past OpenCV's log level.
    """
    kept, position = [data[:8]], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        chunk = data[position:end]
        name, check = chunk[4:8], int.from_bytes(data[end - 4 : end], "big")
        whole = end <= len(data) and zlib.crc32(chunk[4:-4]) == check
        needed = name[:1].isupper()  # As the format has it.
        if needed and not whole:
            break
        if needed or (whole and name in (b"tRNS", b"eXIf")):  # Palette's alpha, orientation.
            kept.append(chunk)
        if name == b"IEND":
            return b"".join(kept)
        position = end
    return b""


def read(path: str | os.PathLike, channels: int = 3) -> np.ndarray:
    """Reads an image file as a uint8 array (h, w, channels); see `decode`.

    Raises:
      UserError: the file can't be read or decoded; the message names it.
    """
    return decode(content(path), channels=channels, name=os.fspath(path))


def content(path: str | os.PathLike) -> bytes:
    """The bytes of an image file. Raises UserError naming it if it can't be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)}: can't be read ({error.strerror}); expected an image file"
        ) from None


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The uint8 image (h, w, c) averaged to `side` pixels on its longer side, to be looked at."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(round(length * scale), 1) for length in image.shape[:2])
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return smaller.reshape(height, width, image.shape[2])


def resize(image: np.ndarray, size: tuple[int, int], *, rounded: bool = False) -> np.ndarray:
    """Bilinear resizing with half-pixel centres and no antialiasing, as `tf.image.resize`.

    Args:
      image: (h, w, c), uint8 or float32, c at most 4.
      size: (height, width) of the result.
      rounded: to whole grey levels.

    Returns:
      array (height, width, c), float32 or, if rounded, uint8.
    """
    height, width = size
    if rounded and image.dtype == np.uint8 and image.shape[0] <= 2 * height:
        # OpenCV computes 16 bits in floats, too, and rounds those; it takes two thirds of the time.
        levels = cv2.resize(image.astype(np.uint16), (width, height))
        return levels.astype(np.uint8).reshape(height, width, image.shape[2])
    if image.shape[0] > 2 * height:
        # Of a large image few rows count: only those become floats, which takes the most time.
        rows = (np.arange(height) + 0.5) * (image.shape[0] / height) - 0.5
        above = rows.astype(int)
        weight = (rows - above).astype(np.float32)[:, None, None]
        image = image[above] * (1 - weight) + image[above + 1] * weight
    # Floats first: OpenCV rounds the result of an integer image to integers.
    pixels = np.ascontiguousarray(image, np.float32)
    resized = cv2.resize(pixels, (width, height)).reshape(height, width, image.shape[2])
    return whole_levels(resized) if rounded else resized


def whole_levels(image: np.ndarray) -> np.ndarray:
    """The image as uint8, contiguous; floats of 0 and more are rounded, and cut off at 255."""
    if image.dtype != np.uint8:
        return cv2.convertScaleAbs(image).reshape(image.shape)
    return np.ascontiguousarray(image)
