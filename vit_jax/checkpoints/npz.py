"""Reading and writing .npz files: strict, never unpickling, never leaving half a file."""

import contextlib
import math
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from vit_jax.errors import UserError


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every array of a .npz file, without the permission to unpickle anything.

    A two-byte void array, which is how NumPy shows a bfloat16 array that it wrote, is given back as
    bfloat16.

    Raises UserError if the file is missing, no .npz, damaged, or holds Python objects.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    with _open_zip(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise UserError(
                    f"{path} is a zip archive, but no .npz checkpoint: it holds {name!r}, expected "
                    "only .npy arrays"
                )
            if name in arrays:
                raise UserError(f"{path}: two arrays are named {name!r}: write the file again")
            arrays[name] = _read_member(archive, member, path)
    return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    name = member.filename
    try:
        with archive.open(member) as file:
            shape, fortran_order, dtype = _read_header(file)
            if dtype.hasobject:
                raise UserError(
                    f"{path}: array {name!r} holds pickled Python objects, which could run any "
                    "code and are never loaded: save plain arrays instead"
                )
            size = math.prod(shape) * dtype.itemsize
            # Checked before anything is allocated: the header can claim any size, and so can the
            # archive, in which deflate makes a byte of at most 1032.
            if (
                size != member.file_size - file.tell()
                or size > 1032 * path.stat().st_size
                or min(shape, default=0) < 0
            ):
                raise UserError(
                    f"{path}: array {name!r} claims shape {shape} of {dtype}, but its size is "
                    "another: the file is damaged, fetch it again"
                )
            data = np.empty(size, np.uint8)
            _fill(data.data, file)
            file.read(1)  # At the end of the member, which is where its checksum is compared.
        array = data.view(dtype).reshape(shape, order="F" if fortran_order else "C")
    except UserError:
        raise
    except Exception as e:  # zipfile, zlib and NumPy meet damaged bytes with a dozen kinds.
        raise UserError(
            f"{path}: array {name!r} can't be read ({_first_line(e)}): "
            "the file is damaged or cut short, fetch it again"
        ) from e
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        array = array.view(ml_dtypes.bfloat16)
    return array


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _fill(buffer: memoryview, file) -> None:
    """Reads exactly len(buffer) bytes, in pieces that keep the decompressor's memory small."""
    position = 0
    while position < len(buffer):
        piece = file.read(min(len(buffer) - position, 1 << 24))
        if not piece:
            raise EOFError(f"{len(buffer) - position} bytes are missing")
        buffer[position : position + len(piece)] = piece
        position += len(piece)


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start != b"PK\x03\x04":
                found = "an empty file" if not start else f"a file that starts with {start!r}"
                raise UserError(
                    f"{path} is no .npz checkpoint: expected a zip archive of arrays, found {found}"
                )
            try:
                archive = zipfile.ZipFile(file)
            except Exception as e:  # A damaged directory raises a dozen kinds.
                raise UserError(
                    f"{path} is no complete .npz checkpoint ({_first_line(e)}): "
                    "the file is damaged or cut short, fetch it again"
                ) from e
            with archive:
                yield archive
    except FileNotFoundError as e:
        raise UserError(f"no such file: {path}") from e
    except IsADirectoryError as e:
        raise UserError(f"{path} is a folder, expected a .npz file") from e
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror})") from e


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_npz(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to an uncompressed .npz file, keys in sorted order.

    The file appears under its name only when it is complete and on disk.
    """
    with atomic_file(path) as file:
        np.savez(file, allow_pickle=False, **{k: np.asarray(arrays[k]) for k in sorted(arrays)})


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends without an error.

    Raises UserError if it can't be written: no such folder, no permission, no space.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}"
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as e:
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}: make it first") from e
        raise UserError(f"{path} can't be written ({e.strerror or e})") from e
