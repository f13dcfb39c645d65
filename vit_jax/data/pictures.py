"""Everything that needs OpenCV: picture files to arrays, and resizing.

Importing this module loads OpenCV and turns its own threads off: pictures are decoded by many
threads at once, and nested threads only slow each other down.
"""

import os
import zlib

import cv2
import numpy as np

from vit_jax.errors import UserError

cv2.setNumThreads(0)
# A broken picture is reported once, by us.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
}


def decode(data: bytes, *, channels: int = 3, name: str = "picture") -> np.ndarray:
    """Decodes a JPEG, PNG, WebP, BMP or GIF file.

    The EXIF orientation is applied. Of an animation, the first frame counts. Alpha is dropped, as
    PIL's `convert("RGB")` and TensorFlow's `decode_image` do (only GIF's transparent pixels take
    the background colour). 16-bit values keep their high byte, CMYK becomes RGB, and with one
    channel colours become luma.

    Args:
      data: the content of the file.
      channels: 3 for RGB, 1 for grey.
      name: what errors call the picture, usually its path.

    Returns:
      uint8 array (h, w, channels).

    Raises:
      UserError: the data is empty, damaged, truncated, or no picture.
    """
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}[channels]
    if not data:
        raise UserError(f"{name}: empty file, expected a picture; replace or remove it")
    kind = next((k for start, k in _SIGNATURES.items() if data.startswith(start)), None)
    image = None
    # Zeros in place of a JPEG's second half are, to a decoder, a picture.
    if kind == "JPEG" and not _jpeg_ends(data):
        data = b""
    elif kind == "PNG":
        data = _plain_png(data)
    if data:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
        except cv2.error:  # e.g. absurd dimensions in the header
            image = None
    if image is None and kind is None:
        raise UserError(
            f"{name}: not a picture (starts with {data[:8]!r}), expected JPEG, PNG, WebP, BMP or "
            "GIF; replace or remove it"
        )
    if image is None:
        raise UserError(f"{name}: truncated or damaged {kind} file; replace or remove it")
    return image.reshape(*image.shape[:2], channels)


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end marker follows the first scan; thumbnails in the header have their own."""
    position = 2
    while data[position : position + 1] == b"\xff" and data[position + 1 : position + 2] != b"\xda":
        padding = data[position + 1 : position + 2] == b"\xff"
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        position += 1 if padding else 2 + length
    scan = data[position : position + 2] == b"\xff\xda"
    return data.find(b"\xff\xd9", position if scan else 0) >= 0


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
    """Reads a picture file as a uint8 array (h, w, channels); see `decode`.

    Raises:
      UserError: the file can't be read or decoded; the message names it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(
            f"{os.fspath(path)}: can't be read ({error.strerror}); expected a picture file"
        ) from None
    return decode(data, channels=channels, name=os.fspath(path))


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resizing with half-pixel centres and no antialiasing, as `tf.image.resize`.

    Args:
      image: (h, w, c), uint8 or float32, c at most 4.
      size: (height, width) of the result.

    Returns:
      float32 array (height, width, c), not rounded.
    """
    height, width = size
    if image.shape[0] > 2 * height:
        # Of a large picture few rows count: only those become floats, which takes the most time.
        rows = (np.arange(height) + 0.5) * (image.shape[0] / height) - 0.5
        above = rows.astype(int)
        weight = (rows - above).astype(np.float32)[:, None, None]
        image = image[above] * (1 - weight) + image[above + 1] * weight
    # Floats first: OpenCV rounds the result of an integer image to integers.
    pixels = np.ascontiguousarray(image, np.float32)
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[2])
