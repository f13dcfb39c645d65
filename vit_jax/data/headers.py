"""What an image file tells of itself before it is decoded: its kind, size, channels and type.

A file's kind follows from its first bytes, whatever it is called. Nothing here loads OpenCV.
"""

import io
import logging
import re
import zlib
from typing import Any, Literal, NamedTuple

import numpy as np

from vit_jax.errors import UserError

# What an image may decode to, as in PIL: 0.5 GB. A file of some KB may well announce 50 GB.
MAX_PIXELS = 178_956_970
MAX_BYTES = 3 * MAX_PIXELS
MAX_CHANNELS = 128  # That OpenCV resizes; more are rather axes in another order.
# So many scans of the largest image take some seconds; of a smaller one there may be more.
_MAX_LARGE_SCANS = 50
_MOST_PIXELS_A_BYTE = 512  # Of a JPEG: a block of 8 x 8 takes a bit.
_JPEG_END = b"\xff\xd9"
# Of the first 64 bytes. AVIF comes first: it may name HEIC's brands, too.
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8",
    "WebP": rb"RIFF....WEBP",
    "BMP": rb"BM",
    "TIFF": rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]",
    "AVIF": rb"....ftyp(?:.{4})*?avi[fs]",
    "HEIC": rb"....ftyp(?:.{4})*?(?:hei[cxms]|hev[cxms]|mif1|msf1)",
    "NumPy": rb"\x93NUMPY",
}
KINDS = tuple(_SIGNATURES)
_KNOWN = re.compile(b"|".join(b"(%s)" % s for s in _SIGNATURES.values()), re.DOTALL)
# What is no image for us, but known by its name.
_OTHERS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "Photoshop",
    b"%PDF": "PDF",
}


class Header(NamedTuple):
    """What is known of an image file before it is decoded.

    Attributes:
      kind: one of KINDS.
      size: (height, width) as announced. EXIF may turn it.
      plain: whether it is a JPEG of one baseline scan without restarts and EXIF: its size is that
        of the decoded image, and `decode` can stop at the end of a box.
      complete: whether an end marker follows a JPEG's first scan; thumbnails have their own.
      frame: where the segment of a JPEG starts that holds the size.
      channels: values of a pixel without those of alpha; 3 also of kinds that have 1 or 3.
      dtype: their type.
    """

    kind: str
    size: tuple[int, int]
    plain: bool = False
    complete: bool = True
    frame: int = 0
    channels: int = 3
    dtype: str = "uint8"


def kind_of(start: bytes) -> str | None:
    """The kind of image that a file is, by its first 64 bytes; None if it is none that is read."""
    match = _KNOWN.match(start[:64])
    return KINDS[match.lastindex - 1] if match and match.lastindex else None


def read_header(data: bytes, name: str = "image") -> Header:
    """Reads what a whole image file says of itself.

    Raises UserError if it is empty, no image, or announces more than may be decoded.
    """
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg_header(data)
    elif not data:
        raise UserError(f"{name}: empty file, expected an image; replace or remove it")
    else:
        header = _other_header(data, name)
    height, width = header.size
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{name}: a {header.kind} image of {width:,} x {height:,} pixels, expected "
            f"{MAX_PIXELS:,} at most; make it smaller or remove it"
        )
    if not header.plain and header.complete:
        _check_work(data, header, name)
    return header


def _check_work(data: bytes, header: Header, name: str) -> None:
    """Raises UserError where more than pixels of 8 bits and one scan is to be decoded, and is too
    much."""
    height, width = header.size
    needed = height * width * header.channels * np.dtype(header.dtype).itemsize
    if needed > MAX_BYTES or header.channels > MAX_CHANNELS:
        raise UserError(
            f"{name}: a {header.kind} image of {width:,} x {height:,} pixels and {header.channels} "
            f"channels of {header.dtype}, expected {MAX_BYTES:,} bytes and {MAX_CHANNELS} channels "
            "at most; make it smaller or remove it"
        )
    if header.kind == "JPEG":
        scans = data.count(b"\xff\xda", header.frame)
        if scans * height * width > _MAX_LARGE_SCANS * MAX_PIXELS:
            raise UserError(
                f"{name}: a JPEG image of {width:,} x {height:,} pixels in {scans:,} scans, which "
                "would take minutes to decode; save it anew or remove it"
            )


def _jpeg_header(data: bytes) -> Header:
    """Reads the segments up to the first scan, as libjpeg finds them."""
    position, frame, scan, kind, special = 2, 0, 0, 0, False
    # Between two images nothing of Python is in the processor's cache: few operations count.
    while position + 3 < len(data):
        if data[position] != 0xFF:  # Junk is passed over.
            position = data.find(b"\xff", position)
            if position < 0:
                break
            continue
        marker = data[position + 1]
        if marker == 0xFF:  # Padding.
            position += 1
            continue
        if marker == 0xDA:
            scan = position
            break
        if marker < 2 or 0xD0 <= marker <= 0xD7:  # These have no length.
            position += 2
            continue
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
    # Found at once at the end of a whole file. What is smaller than its pixels can be lacks some.
    complete = scan > 0 and kind > 0 and data.rfind(_JPEG_END) >= scan
    complete = complete and height * width <= _MOST_PIXELS_A_BYTE * len(data)
    # Whether the scan has all of the frame's components.
    whole = data[scan + 4 : scan + 5] == data[frame + 9 : frame + 10]
    plain = kind == 0xC0 and scan > 0 and not special and whole
    return Header("JPEG", size, plain, complete, frame)


def _other_header(data: bytes, name: str) -> Header:
    kind = kind_of(data)
    if kind is None:  # Nor are others decoded that OpenCV knows: their size can't be told before.
        known = next((k for start, k in _OTHERS.items() if data.startswith(start)), None)
        what = (
            f"{known}, which is not read" if known else f"not an image (starts with {data[:8]!r})"
        )
        raise UserError(
            f"{name}: {what}, expected {', '.join(KINDS[:-1])} or an array (.npy); convert, "
            "replace or remove it"
        )
    if kind in ("TIFF", "NumPy"):
        try:
            return _tiff_header(data) if kind == "TIFF" else _array_header(data)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception:  # Whatever damage makes of a file, and its reader of that.
            raise damaged(name, kind) from None
    deep = kind == "PNG" and data[24:25] == b"\x10"
    return Header(kind, _announced_size(data, kind), dtype="uint16" if deep else "uint8")


def damaged(name: str, kind: str, reason: str = "") -> UserError:
    """That a file is an image of this kind, but not a whole one."""
    told = f" ({reason})" if reason else ""
    return UserError(f"{name}: truncated or damaged {kind} file{told}; replace or remove it")


def _announced_size(data: bytes, kind: str) -> tuple[int, int]:
    """(height, width) that the header of a PNG, GIF, WebP, BMP, AVIF or HEIC file tells."""

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
    if kind in ("AVIF", "HEIC"):  # Tiles and thumbnails announce theirs, too.
        found = [m.end() + 4 for m in re.finditer(b"ispe", data)]
        sizes = [(number(at + 4, 4, "big"), number(at, 4, "big")) for at in found]
        return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    if data[12:16] == b"VP8X":
        return number(27, 3) + 1, number(24, 3) + 1
    if data[12:16] == b"VP8L":
        return (number(21, 4) >> 14 & 0x3FFF) + 1, (number(21, 4) & 0x3FFF) + 1
    return number(28) & 0x3FFF, number(26) & 0x3FFF


def plain_png(data: bytes) -> bytes:
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


def tiff_page(data: bytes) -> Any:
    """The first page of a TIFF file, of tifffile; its errors may be of any kind."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # We report ourselves.
    return tifffile.TiffFile(io.BytesIO(data)).pages[0]


def _tiff_header(data: bytes) -> Header:
    page = tiff_page(data)
    if page.is_reduced:
        raise UserError("a camera's raw file, of which only the preview could be read; convert it")
    if page.imagedepth > 1:
        raise UserError("a TIFF file of volumes, expected one image; write it as an image")
    photometric, bits = int(page.photometric or 0), page.bitspersample
    bits = max(bits) if isinstance(bits, tuple) else bits
    if bits <= 8 and photometric in (3, 5, 6):  # A palette, CMYK and YCbCr become RGB.
        channels = 3
    elif photometric > 2:
        raise UserError(
            f"a TIFF file of {bits} bits whose colours are {page.photometric!s:.20}, expected RGB "
            "or single channels, or a palette, CMYK or YCbCr of 8 bits; convert it"
        )
    else:  # Of the further samples, 1 and 2 are alpha.
        channels = int(page.samplesperpixel) - sum(
            int(kind) in (1, 2) for kind in page.extrasamples
        )
    dtype = np.dtype(np.uint8 if bits <= 8 and page.sampleformat == 1 else page.dtype or object)
    if dtype.kind not in "iuf" or channels < 1:
        raise UserError(f"a TIFF file of {channels} channels of {dtype}, expected numbers")
    size = (int(page.imagelength), int(page.imagewidth))  # Damage makes lists of them.
    return Header("TIFF", size, channels=channels, dtype=dtype.newbyteorder("=").name)


def _array_header(data: bytes) -> Header:
    """Of a .npy file."""
    file = io.BytesIO(data)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(file)[0]](file)
    if not is_image(shape, dtype):
        raise UserError(
            f"an array of shape {shape} and type {dtype}, expected numbers (height, width) or "
            "(height, width, channels)"
        )
    channels = shape[2] if len(shape) == 3 else 1
    return Header(
        "NumPy", (shape[0], shape[1]), channels=channels, dtype=dtype.newbyteorder("=").name
    )


def is_image(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether an array is (h, w) or (h, w, channels) of numbers, and not (channels, h, w)."""
    if len(shape) not in (2, 3) or 0 in shape or dtype.kind not in "iuf":
        return False
    return len(shape) == 2 or (shape[2] <= MAX_CHANNELS and not shape[0] <= 16 < min(shape[1:]))


def left_out(data: bytes, header: Header) -> list[str]:
    """What `images.decode` leaves out of a file, or rounds, in words for a person."""
    kind, found = header.kind, []
    if kind == "TIFF":
        page = tiff_page(data)
        alpha = any(int(one) in (1, 2) for one in page.extrasamples)
        try:
            several = len(page.parent.pages) > 1
        except Exception:  # Of any kind, where what follows the first page is damaged.
            several = True
    else:
        several = (
            (kind == "GIF" and _gif_frames(data) > 1)
            or (kind == "PNG" and b"acTL" in data[33:4096])
            or (kind == "WebP" and data[12:16] == b"VP8X" and bool(data[20] & 2))
            or data[8:12] in (b"avis", b"hevc", b"hevx", b"msf1")
        )
        alpha = (
            (kind == "PNG" and (data[25] & 4 > 0 or b"tRNS" in data[33:4096]))
            or (kind == "WebP" and data[12:16] == b"VP8X" and bool(data[20] & 16))
            or (kind == "WebP" and data[12:16] == b"VP8L" and bool(data[24] & 16))
            or (kind in ("AVIF", "HEIC") and b"auxid:1" in data[:4096])
        )
    if several:
        found.append("of several pages or frames, of which the first is read")
    if alpha:
        found.append("with transparency, which is dropped")
    bits = re.search(rb"pixi.{4}[\x01-\x04](.)", data[:4096], re.DOTALL)
    if kind in ("AVIF", "HEIC") and bits and bits[1][0] > 8:
        found.append("of more than 8 bits, rounded to 8")
    return found


def _gif_frames(data: bytes) -> int:
    """How many images a GIF file has."""
    frames, position = 0, 13 + _color_table(data[10])
    while position + 10 < len(data) and data[position] in (0x21, 0x2C):
        if data[position] == 0x21:
            position += 2
        else:
            frames, position = frames + 1, position + 11 + _color_table(data[position + 9])
        while position < len(data) and data[position]:  # Blocks, each with its length before it.
            position += 1 + data[position]
        position += 1
    return frames


def _color_table(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 6 << (flags & 7) if flags & 0x80 else 0
