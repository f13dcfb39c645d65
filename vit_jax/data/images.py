"""Image files to arrays, and resizing: what needs OpenCV.

Importing this module loads OpenCV and turns its own threads off: images are decoded by many
threads at once, and nested threads only slow each other down.
"""

import io
import os
import re

import cv2
import numpy as np
import simplejpeg

from vit_jax.data.headers import (
    MAX_BYTES,
    Header,
    damaged,
    left_out,
    plain_png,
    read_header,
    tiff_page,
)
from vit_jax.errors import UserError
from vit_jax.files import open_file

cv2.setNumThreads(0)
# A broken image is reported once, by us.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_LARGEST_FILE = 2 << 30  # Bytes: four times those of the largest image that is decoded.

Box = tuple[int, int, int, int]  # (top, left, height, width)


def decode(
    data: bytes,
    *,
    channels: int = 3,
    name: str = "image",
    box: Box | None = None,
    header: Header | None = None,
    remarks: list[str] | None = None,
) -> np.ndarray:
    """Decodes the content of an image file, of one of `headers.KINDS`.

    The EXIF orientation is applied. Of an animation or of several pages, the first counts. Alpha is
    dropped, as PIL's `convert("RGB")` and TensorFlow's `decode_image` do (only GIF's transparent
    pixels take the background colour). CMYK becomes RGB, and with one channel colours become luma.

    Args:
      data: the content of the file.
      channels: 3 for RGB, 1 for grey; of a TIFF or an array also the number that it has.
      name: what errors call the image, usually its path.
      box: (top, left, height, width) of the pixels that are wanted; by default all. A `plain` JPEG
        is decoded no further down.
      header: what `read_header` gave, if it was called already.
      remarks: to which what was left out, or is odd, is added in words for a person.

    Returns:
      array (h, w, channels), of a box perhaps a view of more. uint8, but for PNG, TIFF and arrays
      of other types, which keep theirs.

    Raises:
      UserError: the data is empty, damaged, truncated, no image, one of other channels, or one of
        more than MAX_PIXELS, which is told from its header.
    """
    header = header or read_header(data, name)
    if header.channels != channels and not {header.channels, channels} <= {1, 3}:
        raise UserError(
            f"{name}: {header.channels} channels, expected {channels} as in the other images; "
            "convert or remove it"
        )
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB}.get(channels, cv2.IMREAD_UNCHANGED)
    if header.kind == "JPEG":
        image = _decode_jpeg(data, header, channels, flag, box, remarks)
    elif header.kind == "HEIC":
        image = _decode_heic(data, name)
    elif header.kind == "NumPy":
        image = _load_array(data)
    elif header.kind == "TIFF":
        image = _decode_tiff(data, header, flag, name)
    else:
        data = plain_png(data) if header.kind == "PNG" else data
        image = _imdecode(data, flag | (cv2.IMREAD_ANYDEPTH if header.dtype != "uint8" else 0))
    if image is None:
        raise damaged(name, header.kind)
    if remarks is not None:
        remarks += left_out(data, header)
    image = _with_channels(image, header.channels, channels)
    return cut(image, box) if box else image


def _with_channels(image: np.ndarray, stored: int, channels: int) -> np.ndarray:
    """(h, w, channels) of what a decoder gave, with or without alpha, perhaps in grey."""
    image = image[..., None] if image.ndim == 2 else image
    if image.shape[2] == channels:
        return image
    image = image[..., : min(stored, image.shape[2] - (image.shape[2] in (2, 4)))]
    if image.shape[2] == channels:
        return np.ascontiguousarray(image)
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    luma = image @ np.array([[0.299], [0.587], [0.114]], np.float32)
    return (np.rint(luma) if image.dtype.kind in "iu" else luma).astype(image.dtype)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """The part of an image (h, w, c) that lies in a box."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _imdecode(data: bytes | bytearray, flag: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag) if data else None
    except cv2.error:  # E.g. absurd dimensions in the header.
        return None


def _decode_jpeg(
    data: bytes,
    header: Header,
    channels: int,
    flag: int,
    box: Box | None,
    remarks: list[str] | None,
) -> np.ndarray | None:
    """The image, its rows down to the end of a box at least; None if libjpeg warns of damage."""
    if not header.complete:  # Zeros in place of the second half are, to a decoder, an image.
        return None
    if box and header.plain:
        image = _imdecode(_upper_rows(data, header, box[0] + box[2]), flag)
        # Where the data ends too early, what follows is this grey.
        if image is not None and not (image[-1, -1] == 128).all():
            return image
    is_cmyk = data[header.frame + 9] == 4
    colours = "CMYK" if is_cmyk else "GRAY" if channels == 1 else "RGB"
    try:
        image = simplejpeg.decode_jpeg(data, colours)
    except ValueError as warning:
        if "extraneous bytes" not in str(warning):
            return None
        # The whole image was decoded, and something was left.
        if remarks is not None:
            text = re.sub(r"\d+ ", "... ", str(warning)[:80])  # One remark, however many they are.
            remarks.append(f"of which libjpeg says: {text}")
        return _imdecode(data, flag)
    if is_cmyk:
        return _imdecode(data, flag)
    if header.plain:
        return image
    exif = data.find(b"Exif\0\0", 0, header.frame)
    return image if exif < 0 else _turned(image, _orientation(data[exif + 6 : header.frame]))


def _orientation(exif: bytes) -> int:
    """1 to 8; 1 if it isn't told."""

    def number(at: int, size: int = 2) -> int:
        return int.from_bytes(exif[at : at + size], "little" if exif[:2] == b"II" else "big")

    first = number(4, 4)
    for at in range(first + 2, min(first + 2 + 12 * number(first), len(exif)), 12):
        if number(at) == 0x112:
            return number(at + 8)
    return 1


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """The image as its EXIF orientation says that it is to be seen."""
    if not 2 <= orientation <= 8:
        return image
    image = image if orientation < 5 else image.swapaxes(0, 1)
    rows, columns = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return np.ascontiguousarray(image[::rows, ::columns])


def _decode_heic(data: bytes, name: str) -> np.ndarray | None:
    try:
        import pillow_heif
    except ImportError:
        raise UserError(
            f"{name}: a HEIC image; to read it run pip install 'vit_jax[heic]', or convert it"
        ) from None
    try:
        return np.asarray(pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True))
    except Exception:  # Its library raises some kinds.
        return None


def _load_array(data: bytes) -> np.ndarray | None:
    try:
        image = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError:
        return None
    return image.astype(image.dtype.newbyteorder("="), copy=False)


def _decode_tiff(data: bytes, header: Header, flag: int, name: str) -> np.ndarray | None:
    """The samples as they are stored; of those of 8 bits, as colours.

    OpenCV reads no more than 4 channels, and mixes up planes of more than 8 bits that lie behind
    each other; tifffile lacks codecs.
    """
    try:
        page = tiff_page(data)
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        packed = int(page.compression) != 1
        if not all(size > 0 and start + size <= len(data) for start, size in parts):
            return None
        if header.dtype == "uint8" and header.channels in (1, 3):
            image = _imdecode(data, flag)
            if image is not None or int(page.photometric) > 2:  # Of some tiles it reads none.
                return image
        # A packed part may become a thousand times as large.
        if any(packed and size > MAX_BYTES // 1032 for _, size in parts):
            raise UserError(f"{name}: a TIFF of packed parts of MBs; write it in strips of some KB")
        if not packed and sum(size for _, size in parts) < page.nbytes:
            return None
        image = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and image.ndim == 3:
            image = np.moveaxis(image, 0, -1)
    except UserError:
        raise
    except Exception as error:
        codec = "imagecodecs" in str(error)
        if not codec:
            return None
        if page.planarconfig == 2 or page.samplesperpixel not in (1, 3, 4):
            raise UserError(
                f"{name}: {page.samplesperpixel} channels packed by {page.compression.name}, which "
                "isn't read; pip install imagecodecs, or write it unpacked or by deflate"
            ) from None
        image = _imdecode(data, cv2.IMREAD_UNCHANGED)
        if image is None or image.dtype.name != header.dtype:
            return None
        image = image[..., [2, 1, 0, 3][: image.shape[2]]] if image.ndim == 3 else image
    if image.shape[:2] != header.size or image.ndim > 3:  # As damage may have it.
        return None
    if int(page.photometric or 0) == 0 and image.dtype.kind == "u":  # White is zero.
        image = np.iinfo(image.dtype).max - image
    return _turned(image.astype(header.dtype, copy=False), int(page.tags.valueof(274, 1)))


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
    rows[data.rfind(b"\xff\xd9") :] = bytes(16)  # Some bytes are read ahead.
    return rows


def read(path: str | os.PathLike, channels: int = 3) -> np.ndarray:
    """Reads an image file as a uint8 array (h, w, channels); see `decode`.

    Raises:
      UserError: the file can't be read or decoded; the message names it.
    """
    return decode(content(path), channels=channels, name=os.fspath(path))


def content(path: str | os.PathLike) -> bytes:
    """The bytes of an image file. Raises UserError naming it if it can't be read, or is larger than
    any image."""
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            if size > _LARGEST_FILE:
                raise UserError(
                    f"{os.fspath(path)}: {size:,} bytes, expected an image file of "
                    f"{_LARGEST_FILE:,} at most; replace or remove it"
                )
            file.seek(0)
            return file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(
            f"{os.fspath(path)}: can't be read ({reason}); expected an image file"
        ) from None


def visible(image: np.ndarray) -> np.ndarray:
    """An image (h, w, c) to be looked at, uint8 of 1 or 3 channels: of more the first three, and of
    other types what lies between its 1st and 99th percentile."""
    image = image if image.shape[2] in (1, 3) else image[..., : 3 if image.shape[2] > 3 else 1]
    if image.dtype == np.uint8:
        return image
    low, high = np.nanpercentile(image[::4, ::4].astype(np.float32), (1, 99))
    levels = (image - np.float32(low)) * np.float32(255 / max(high - low, 1e-30))
    return np.clip(np.nan_to_num(levels), 0, 255).astype(np.uint8)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """The image (h, w, c) made `visible` and averaged to `side` pixels on its longer side."""
    image = visible(image)
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(round(length * scale), 1) for length in image.shape[:2])
    smaller = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return smaller.reshape(height, width, image.shape[2])


def resize(image: np.ndarray, size: tuple[int, int], *, rounded: bool = False) -> np.ndarray:
    """Bilinear resizing with half-pixel centres and no antialiasing, as `tf.image.resize`.

    Args:
      image: (h, w, c), uint8 or float32, of at most 128 channels.
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
