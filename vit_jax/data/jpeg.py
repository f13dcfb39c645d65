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
    starts: dict[int, int] = {}
    position = 2
    while position + 3 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        starts.setdefault(marker, position)
        if marker == 0xDA:
            break
        position += 2 + (data[position + 2] << 8 | data[position + 3])
    frames = (m for m in starts if 0xC0 <= m <= 0xCF and m not in (0xC4, 0xC8, 0xCC))
    kind = next(frames, 0)
    frame, scan = starts.get(kind, 0), starts.get(0xDA, 0)
    size = (_number(data, frame + 5), _number(data, frame + 7)) if kind else (0, 0)
    ends = data.rfind(_END) >= scan  # Found at once at the end of a whole file.
    # The scan has all of the frame's components; 0xDD sets restarts, 0xE1 is EXIF.
    plain = kind == 0xC0 and 0xDA in starts and not {0xDD, 0xE1} & starts.keys()
    return Header(size, ends, frame, plain and data[scan + 4] == data[frame + 9])


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
