"""Reading and writing .npz files: strict, never unpickling, never leaving half a file."""

import contextlib
import math
import os
import tempfile
import zipfile
import zlib
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
            count = math.prod(shape)
            # Checked before anything is allocated: a header can claim any size.
            if count * dtype.itemsize != member.file_size - file.tell():
                raise UserError(
                    f"{path}: array {name!r} claims shape {shape} of {dtype}, but has "
                    f"{member.file_size} bytes: the file is damaged, fetch it again"
                )
            array = np.empty(count, dtype)
            _fill(array.view(np.uint8).data, file)
            file.read(1)  # At the end of the member, which is where its checksum is compared.
    except UserError:
        raise
    except (
        ValueError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as e:
        raise UserError(
            f"{path}: array {name!r} can't be read ({_first_line(e)}): "
            "the file is damaged or cut short, fetch it again"
        ) from e
    array = array.reshape(shape, order="F" if fortran_order else "C")
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
            except zipfile.BadZipFile as e:
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
    except PermissionError as e:
        raise UserError(f"{path}: no permission to read it") from e


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
    """A file to write that takes its name only when the block ends without an error."""
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except FileNotFoundError as e:
        raise UserError(f"{path}: the folder {path.parent} does not exist") from e
    except PermissionError as e:
        raise UserError(f"{path}: no permission to write in {path.parent}") from e
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's own mode is for secrets.
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
