"""Reading and writing .npz files: strict, never unpickling, never leaving half a file."""

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from vit_jax.checkpoints.lazy import Array, LazyArray
from vit_jax.errors import UserError
from vit_jax.files import atomic_write

_END_OF_DIRECTORY = 22  # Bytes of a zip archive's last record, without its comment.


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every array of a .npz file; see `open_npz`."""
    with open_npz(path) as arrays:
        return {name: array.read() for name, array in arrays.items()}


@contextlib.contextmanager
def open_npz(path: str | os.PathLike) -> Iterator[dict[str, LazyArray]]:
    """The arrays of a .npz file, to be read while it is open, in any order.

    Nothing is ever unpickled. A two-byte void array, which is how NumPy shows a bfloat16 array that
    it wrote, is given back as bfloat16.

    Raises UserError if the file is missing, no .npz, damaged, or holds Python objects; damaged
    values are noticed when they are read.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        archive = _open_zip(path, stack)
        arrays: dict[str, LazyArray] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise UserError(
                    f"{path} is a zip archive, but no .npz checkpoint: it holds {name!r}, expected "
                    "only .npy arrays"
                )
            if name in arrays:
                raise UserError(f"{path}: two arrays are named {name!r}: write the file again")
            arrays[name] = _open_member(archive, member, path)
        yield arrays


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> LazyArray:
    name = member.filename
    with _explained(name, path), archive.open(member) as file:
        shape, fortran_order, dtype = _read_header(file)
        start = file.tell()
        if dtype.hasobject:
            raise UserError(
                f"{path}: array {name!r} holds pickled Python objects, which could run any "
                "code and are never loaded: save plain arrays instead"
            )
        size = math.prod(shape) * dtype.itemsize
        # Checked before anything is allocated: the header can claim any size, and so can the
        # archive, in which deflate makes a byte of at most 1032.
        if (
            size != member.file_size - start
            or size > 1032 * path.stat().st_size
            or min(shape, default=0) < 0
        ):
            raise UserError(
                f"{path}: array {name!r} claims shape {shape} of {dtype}, but its size is "
                "another: the file is damaged, fetch it again"
            )
        np.empty(0, dtype)  # Some types can be written down, but not made.
    is_bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None

    def read() -> np.ndarray:
        with _explained(name, path), archive.open(member) as file:
            file.read(start)
            data = np.empty(size, np.uint8)
            fill(data.data, file)
            file.read(1)  # At the end of the member, which is where its checksum is compared.
            array = data.view(dtype).reshape(shape, order="F" if fortran_order else "C")
        return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

    return LazyArray(shape, ml_dtypes.bfloat16 if is_bfloat16 else dtype, read)


@contextlib.contextmanager
def _explained(name: str, path: Path) -> Iterator[None]:
    """Tells of damage: zipfile, zlib and NumPy meet damaged bytes with a dozen kinds of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"{path}: array {name!r} can't be read ({first_line(e)}): "
            "the file is damaged or cut short, fetch it again"
        ) from e


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def fill(buffer: memoryview, file, size: int = 1 << 18) -> None:
    """Reads exactly len(buffer) bytes, in pieces of a size that stays in the processor's cache."""
    position = 0
    while position < len(buffer):
        piece = file.read(min(len(buffer) - position, size))
        if not piece:
            raise EOFError(f"{len(buffer) - position} bytes are missing")
        buffer[position : position + len(piece)] = piece
        position += len(piece)


def _open_zip(path: Path, stack: contextlib.ExitStack) -> zipfile.ZipFile:
    """The archive, which is closed with the stack."""
    try:
        file = stack.enter_context(path.open("rb"))
        start = file.read(4)
    except OSError as e:
        raise unreadable(path, e) from e
    if start != b"PK\x03\x04":
        found = "an empty file" if not start else f"a file that starts with {start!r}"
        raise UserError(
            f"{path} is no .npz checkpoint: expected a zip archive of arrays, found {found}"
        )
    try:
        archive = stack.enter_context(zipfile.ZipFile(file))
        # A damaged entry of the directory can swallow those after it.
        file.seek(-_END_OF_DIRECTORY - len(archive.comment), os.SEEK_END)
        (count,) = struct.unpack_from("<H", file.read(_END_OF_DIRECTORY), 10)
        if count != len(archive.infolist()) and count != 0xFFFF:
            raise EOFError(f"{count} arrays are listed, {len(archive.infolist())} found")
        return archive
    except Exception as e:  # A damaged directory raises a dozen kinds.
        raise UserError(
            f"{path} is no complete .npz checkpoint ({first_line(e)}): "
            "the file is damaged or cut short, fetch it again"
        ) from e


def unreadable(path: Path, error: OSError) -> UserError:
    """What to say if a file can't be opened."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"no such file: {path}")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path} is a folder, expected a file")
    return UserError(f"{path} can't be read ({error.strerror})")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes arrays to an uncompressed .npz file, in their order and one at a time.

    The file appears under its name only when it is complete and on disk. Equal arrays give equal
    files.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
