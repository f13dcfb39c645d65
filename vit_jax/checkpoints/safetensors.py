"""Reading and writing .safetensors files: strict, one array at a time.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's
length, the header in JSON, {name: {"dtype", "shape", "data_offsets"}}, then the values,
little-endian and in C order, without gaps.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vit_jax.checkpoints.lazy import Array, LazyArray
from vit_jax.checkpoints.npz import first_line, unreadable
from vit_jax.errors import UserError
from vit_jax.files import atomic_write

MAX_HEADER = 100_000_000  # Bytes, as in the format's own library.

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike) -> Iterator[dict[str, LazyArray]]:
    """The arrays of a .safetensors file, to be read while it is open, in any order.

    Raises UserError if the file is missing or damaged.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, size)
            entries = [_Entry.parse(name, entry) for name, entry in header.items()]
            _check_places(entries, size - file.tell())
        except OSError as e:
            raise unreadable(path, e) from e
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise UserError(
                f"{path} is no sound .safetensors file ({_why(e)}): "
                "the file is damaged or cut short, fetch it again"
            ) from e
        start = file.tell()
        yield {entry.name: entry.open(file, start, path) for entry in entries}


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header without its metadata; the file then stands at the first value."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"it has {size} bytes, not even a length")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


class _Entry:
    """One array's line of the header."""

    def __init__(self, name: str, dtype: np.dtype, shape: tuple[int, ...], begin: int, end: int):
        self.name, self.dtype, self.shape = name, dtype, shape
        self.begin, self.end = begin, end

    @classmethod
    def parse(cls, name: str, entry: Any) -> "_Entry":
        """Raises ValueError, KeyError or TypeError if it makes no sense."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the array {name!r} has not dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"the array {name!r} has {numbers!r}, expected whole numbers")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"the array {name!r} is of type {entry['dtype']!r}, known are {', '.join(_DTYPES)}"
            )
        if len(offsets) != 2 or len(shape) > 64:  # As many axes as NumPy has.
            raise ValueError(f"the array {name!r} has {len(offsets)} offsets, {len(shape)} axes")
        begin, end = offsets
        dtype = _DTYPES[entry["dtype"]]
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(
                f"the array {name!r} claims shape {tuple(shape)} of {dtype}, but has "
                f"{end - begin} bytes"
            )
        return cls(name, dtype, tuple(shape), begin, end)

    def open(self, file: BinaryIO, start: int, path: Path) -> LazyArray:
        def read() -> np.ndarray:
            data = np.empty(self.end - self.begin, np.uint8)
            try:
                file.seek(start + self.begin)
                _fill(data.data, file)
            except (OSError, EOFError) as e:
                raise UserError(
                    f"{path}: array {self.name!r} can't be read ({first_line(e)}): fetch it again"
                ) from e
            return data.view(self.dtype).reshape(self.shape)

        return LazyArray(self.shape, self.dtype, read)


def _check_places(entries: list[_Entry], size: int) -> None:
    """Raises ValueError unless the arrays lie one after the other and fill the file.

    What that leaves is bounded by the file's size, so that nothing can claim more memory.
    """
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            raise ValueError(
                f"the array {entry.name!r} begins at byte {entry.begin}, expected {position}"
            )
        position = entry.end
    if position != size:
        raise ValueError(f"its arrays take {position} bytes, but it holds {size}")


def _fill(buffer: memoryview, file: BinaryIO) -> None:
    position = 0
    while position < len(buffer):  # The system gives at most two gigabytes at once.
        count = file.readinto(buffer[position:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{len(buffer) - position} bytes are missing")
        position += count


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"its header is no JSON: {first_line(error)}"
    return first_line(error)[:300]


def write_safetensors(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes arrays to a .safetensors file, one at a time.

    They stand in their order, but those of wide types first, so that all are aligned. The file
    appears under its name only when it is complete and on disk. Equal arrays give equal files.

    Raises UserError for types that the format has not.
    """
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {}
    position = 0
    for name, array in ordered:
        dtype = array.dtype.newbyteorder("<")
        if dtype not in _NAMES:
            raise UserError(
                f"{path}: array {name!r} is of type {array.dtype}, which .safetensors files have "
                f"not: expected one of {', '.join(map(str, _NAMES))}"
            )
        end = position + array.size * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            values = np.asarray(arrays[name])
            little = values.astype(values.dtype.newbyteorder("<"), copy=False)
            file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)
