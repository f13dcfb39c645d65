"""Image files to arrays, and resizing: what needs OpenCV.

Importing this module loads OpenCV and turns its own threads off: images are decoded by many
threads at once, and nested threads only slow each other down.
"""

import os
import zlib
from typing import Literal, NamedTuple

import cv2
import numpy as np

from vit_jax.errors import UserError
from vit_jax.files import open_file

cv2.setNumThreads(0)
# A broken image is reported once, by us.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# What an image may decode to, as in PIL: 0.5 GB. A file of some KB may well announce 50 GB.
MAX_PIXELS = 178_956_970
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
}
_JPEG_END = b"\xff\xd9"

Box = tuple[int, int, int, int]  # (top, left, height, width)


class Header(NamedTuple):
    """What is known of an image file before it is decoded.

    Attributes:
      kind: "JPEG", "PNG", ...
      size: (height, width) as announced, (0, 0) if the file tells none. EXIF may turn it.
      plain: whether it is a JPEG of one baseline scan without restarts and EXIF: its size is that
        of the decoded image, and `decode` can stop at the end of a box.
      complete: whether an end marker follows a JPEG's first scan; thumbnails have their own.
      frame: where the segment of a JPEG starts that holds the size.
    """

    kind: str
    size: tuple[int, int]
    plain: bool = False
    complete: bool = True
    frame: int = 0


def kind_of(start: bytes) -> str | None:
    """ "JPEG", "PNG", ... by the first bytes of a file; None if it is no image that can be read."""
    return next((kind for sign, kind in SIGNATURES.items() if start.startswith(sign)), None)


def read_header(data: bytes, name: str = "image") -> Header:
    """Reads the first bytes of an image file.

    Raises UserError if it is empty, no image, or one of more than MAX_PIXELS.
    """
    if not data:
        raise UserError(f"{name}: empty file, expected an image; replace or remove it")
    kind = kind_of(data)
    if kind is None:  # Nor are others decoded that OpenCV knows: their size can't be told before.
        raise UserError(
            f"{name}: not an image (starts with {data[:8]!r}), expected JPEG, PNG, WebP, BMP or "
            "GIF; replace or remove it"
        )
    header = _jpeg_header(data) if kind == "JPEG" else Header(kind, _announced_size(data, kind))
    height, width = header.size
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{name}: a {kind} image of {width:,} x {height:,} pixels, expected {MAX_PIXELS:,} "
            "at most; make it smaller or remove it"
        )
    return header


def decode(
    data: bytes,
    *,
    channels: int = 3,
    name: str = "image",
    box: Box | None = None,
    header: Header | None = None,
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
      box: (top, left, height, width) of the pixels that are wanted; by default all. A `plain` JPEG
        is decoded no further down.
      header: what `read_header` gave, if it was called already.

    Returns:
      uint8 array (h, w, channels), of a box perhaps a view of more.

    Raises:
      UserError: the data is empty, damaged, truncated, no image, or one of more than MAX_PIXELS,
        which is told from its header.
    """
    header = header or read_header(data, name)
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}[channels]
    if header.kind == "PNG":
        data = _plain_png(data)
    elif not header.complete:  # Zeros in place of the second half are, to a decoder, an image.
        data = b""
    image = None
    if box and header.plain and data:
        image = _imdecode(_upper_rows(data, header, box[0] + box[2]), flag)
    if image is None:
        image = _imdecode(data, flag)
    if image is None:
        raise UserError(f"{name}: truncated or damaged {header.kind} file; replace or remove it")
    if channels == 1:
        image = image[..., None]
    return cut(image, box) if box else image


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """The part of an image (h, w, c) that lies in a box."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _imdecode(data: bytes | bytearray, flag: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    except cv2.error:  # E.g. absurd dimensions in the header.
        return None


def _jpeg_header(data: bytes) -> Header:
    """Reads the segments up to the first scan."""
    position, frame, scan, kind, special = 2, 0, 0, 0, False
    # Between two images nothing of Python is in the processor's cache: few operations count.
    while position + 3 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # Padding.
            position += 1
            continue
        if marker == 0xDA:
            scan = position
            break
        if 0xC0 <= marker <= 0xCF and not kind and marker not in (0xC4, 0xC8, 0xCC):
            kind, frame = marker, position
        elif marker == 0xDD or marker == 0xE1:  # Restarts, EXIF.
            special = True
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    height, width = (
        int.from_bytes(data[frame + 5 : frame + 7]),
        int.from_bytes(data[frame + 7 : frame + 9]),
    )
    size = (height, width) if kind else (0, 0)
    complete = data.rfind(_JPEG_END) >= scan  # Found at once at the end of a whole file.
    # Whether the scan has all of the frame's components.
    whole = data[scan + 4 : scan + 5] == data[frame + 9 : frame + 10]
    plain = kind == 0xC0 and scan > 0 and not special and whole
    return Header("JPEG", size, plain, complete, frame)


def _upper_rows(data: bytes, header: Header, bottom: int) -> bytes | bytearray:
    """A JPEG file whose rows above `bottom` are those of a plain one, with not many below.

    OpenCV can't be told where to stop, but by the height in the header it can. It would then look
    for the end marker and say on stderr what it found on the way; without one it gives up quietly.
    """
    # Colours of half the resolution are interpolated with those of the next row but one.
    height = bottom + 2
    if height >= header.size[0]:
        return data
    rows = bytearray(data)  # The one copy.
    rows[header.frame + 5 : header.frame + 7] = height.to_bytes(2)
    rows[data.rfind(_JPEG_END) :] = bytes(16)  # Some bytes are read ahead.
    return rows


def _announced_size(data: bytes, kind: str) -> tuple[int, int]:
    """(height, width) that the header of a file other than JPEG tells."""

    def number(start: int, count: int = 2, order: Literal["little", "big"] = "little") -> int:
        return int.from_bytes(data[start : start + count], order)

    if kind == "PNG":
        return number(20, 4, "big"), number(16, 4, "big")
    if kind == "GIF":
        return number(8), number(6)
    if kind == "BMP" and number(14, 4) == 12:
        return number(20), number(18)
    if kind == "BMP":  # A negative height counts from the top.
        return min(number(22, 4), 2**32 - number(22, 4)), number(18, 4)
    if data[12:16] == b"VP8X":
        return number(27, 3) + 1, number(24, 3) + 1
    if data[12:16] == b"VP8L":
        return (number(21, 4) >> 14 & 0x3FFF) + 1, (number(21, 4) & 0x3FFF) + 1
    return number(28) & 0x3FFF, number(26) & 0x3FFF


def _plain_png(data: bytes) -> bytes:
    """A PNG file without what says nothing of its pixels; empty if it is damaged.

    About colour profiles, dates and damage libpng complains on stderr, past OpenCV's log level.
    """
    kept, position = [data[:8]], 8
    while position < len(data) and data[12:16] == b"IHDR":  # Which has the announced size.
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
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{os.fspath(path)}: can't be read ({reason}); expected an image file"
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
      rounded: to uint8.

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
    return to_uint8(resized) if rounded else resized


def to_uint8(image: np.ndarray) -> np.ndarray:
    """The image as uint8, contiguous; floats of 0 and more are rounded, and cut off at 255."""
    if image.dtype != np.uint8:
        return cv2.convertScaleAbs(image).reshape(image.shape)
    return np.ascontiguousarray(image)
