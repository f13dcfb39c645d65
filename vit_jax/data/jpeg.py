"""JPEG files as bytes: what their headers tell, and leaving out rows that nobody wants."""

from typing import NamedTuple

_END = b"\xff\xd9"


class Header(NamedTuple):
    """What is known of a JPEG file without decoding it.

    Attributes:
      size: (height, width), (0, 0) if it tells none.
      ends: whether an end marker follows the first scan; thumbnails in the header have their own.
      frame: where the frame's segment starts, which holds the size.
      plain: whether it is one baseline scan without restarts, and without EXIF, which may turn it.
    """

    size: tuple[int, int]
    ends: bool
    frame: int
    plain: bool


def read_header(data: bytes) -> Header:
    """Reads the segments up to the first scan."""
    position, frame, scan, kind, special = 2, 0, 0, 0, False
    # Between two images nothing of Python is in the processor's cache: few operations count.
    while position + 3 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == 0xDA:
            scan = position
            break
        if 0xC0 <= marker <= 0xCF and not kind and marker not in (0xC4, 0xC8, 0xCC):
            kind, frame = marker, position
        elif marker == 0xDD or marker == 0xE1:  # restarts, EXIF
            special = True
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    size = (_number(data, frame + 5), _number(data, frame + 7)) if kind else (0, 0)
    ends = data.rfind(_END) >= scan  # Found at once at the end of a whole file.
    # The scan has all of the frame's components.
    whole = data[scan + 4 : scan + 5] == data[frame + 9 : frame + 10]
    return Header(size, ends, frame, plain=kind == 0xC0 and scan > 0 and not special and whole)


def upper_rows(data: bytes, header: Header, bottom: int) -> bytes | bytearray:
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
    rows[data.rfind(_END) :] = bytes(16)  # Some bytes are read ahead.
    return rows


def _number(data: bytes, start: int) -> int:
    return int.from_bytes(data[start : start + 2])
