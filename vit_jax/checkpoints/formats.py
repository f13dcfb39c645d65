"""Files of weights: .npz, .safetensors, torch's .pth, Flax's .msgpack and Orbax folders behind one
door.

Arrays stay in their file until they are read. No code in a file is ever run, and what it claims is
compared with its size before memory is taken. What is read is what was written: zip archives have
checksums of their own, .safetensors files and Orbax folders get some here (`digests`), beside what
others expect in them.
"""

import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoints import pth
from vit_jax.checkpoints.digests import crc32c, digest
from vit_jax.errors import UserError, first_line
from vit_jax.files import atomic_write

# Packed arrays may take so many times the bytes of their file, and so many bytes in any case.
_UNPACKED, _ALWAYS = 20, 512 << 20
_LARGEST_INDEX = 16 << 20  # Bytes of the .json that names the files of sharded weights.
_HEADER = 1 << 14  # Bytes of an .npy header that are read; NumPy takes less.
_BATCH = 1 << 25  # Bytes of the arrays that Orbax writes together.
_TUPLE = b"\x83\xa10"  # A .msgpack of three values, as the original's training writes them.
_MAPS = {bytes([code]) for code in (*range(0x81, 0x90), 0xDE, 0xDF)}  # As a .msgpack begins.
_CRC = "crc32c"  # Under which the checksums stand among what a file holds beside its arrays.

# The types that .safetensors files have, and NumPy too.
_NAMES = ["F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"]
_SAFETENSORS = {name: np.dtype(f"<{name[0].lower()}{int(name[1:]) // 8}") for name in _NAMES}
_SAFETENSORS |= {"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool)}

_log = logging.getLogger(__name__)


class LazyArray:
    """An array of known shape and type, whose values are read when they are asked for.

    NumPy takes it for an array, `np.asarray(lazy)`.

    Attributes:
      shape, dtype: as of the array that `read` gives.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.read = read

    @property
    def nbytes(self) -> int:
        """How much memory its values take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def reshape(self, shape: tuple[int, ...]) -> "LazyArray":
        """Another shape of as many numbers."""
        return LazyArray(shape, self.dtype, lambda: self.read().reshape(shape))

    def astype(self, dtype: Any) -> "LazyArray":
        """Another type, rounded to the nearest number that it has."""
        return LazyArray(self.shape, dtype, lambda: self.read().astype(dtype, copy=False))


# The values may be NumPy's or still in their file.
Array = np.ndarray | LazyArray


def rows(array: Array) -> list[Array]:
    """The parts of an array along its first axis.

    Those of a lazy array share one read of the whole, which is let go when the last part is read:
    read in order, no more than one such array is in memory.
    """
    if not isinstance(array, LazyArray):
        return list(array)
    whole: list[np.ndarray] = []
    last = array.shape[0] - 1

    def read(i: int) -> np.ndarray:
        if not whole:
            whole.append(array.read())
        row = whole[0][i]
        if i == last:
            whole.clear()
        return row

    shape = array.shape[1:]
    return [LazyArray(shape, array.dtype, functools.partial(read, i)) for i in range(last + 1)]


def with_zero_token(array: Array) -> Array:
    """(1, n, d) -> (1, n + 1, d), zeros before the others."""
    one, n, d = array.shape

    def padded() -> np.ndarray:
        return np.concatenate([np.zeros((one, 1, d), array.dtype), np.asarray(array)], axis=1)

    lazy = LazyArray((one, n + 1, d), array.dtype, padded)
    return lazy if isinstance(array, LazyArray) else lazy.read()


# The door.


@contextlib.contextmanager
def open_arrays(path: str | os.PathLike) -> Iterator[dict[str, LazyArray]]:
    """Opens a file of weights of any kind, which is seen from its content.

    Returns:
      a context manager of {name: array}; the arrays can be read while it is open, in any order.

    Raises UserError if there is no such file, it is of no known kind, or damaged; damaged values
    are noticed when they are read.
    """
    path = Path(path)
    if os.path.isdir(path):
        size, opener = _size_of_folder(path), _open_orbax
    else:
        size, opener = os.path.getsize(path) if os.path.isfile(path) else 0, _opener_of_file(path)
    with opener(path) as arrays:
        unpacked = sum(array.nbytes for array in arrays.values())
        # Of an index each of its files is looked at.
        if opener is not _open_shards and unpacked > max(_UNPACKED * size, _ALWAYS):
            raise UserError(
                f"{path} has {size:,} bytes and would unpack to {unpacked:,}, expected at most "
                f"{_UNPACKED} times its size: if it is to be trusted, write it again unpacked"
            )
        yield arrays


def _size_of_folder(path: Path) -> int:
    """Bytes of the files in an Orbax folder. Raises UserError if it is none, or holds links."""
    if not is_orbax(path):
        raise UserError(
            f"{path} is a folder, but none that Orbax wrote: expected a file of weights"
        )
    entries = list(path.rglob("*"))
    for entry in entries:
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise UserError(
                f"{path} holds {entry.name!r}, which is a link or no regular file: copy the folder "
                "with what its links lead to, if you trust it"
            )
    return sum(entry.stat().st_size for entry in entries if entry.is_file())


def _opener_of_file(path: Path) -> Callable:
    if os.path.exists(path) and not os.path.isfile(path):  # A pipe would let us wait for ever.
        raise UserError(f"{path} is no regular file: expected a file of weights")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            is_pth = pth.is_pth(file)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as e:
        raise UserError(f"{path} can't be read ({e.strerror})") from e
    if is_pth:
        return _open_pth
    if start[:4] == b"PK\x03\x04":
        return _open_npz
    if start[8:] == b"{":
        return _open_safetensors
    if start[:1] == b"{" and path.name.endswith(".index.json"):
        return _open_shards
    if start[:3] == _TUPLE or (start[:1] in _MAPS and path.suffix == ".msgpack"):
        return _open_msgpack
    found = f"a file that starts with {start!r}" if start else "an empty file"
    if start[:1] == b"\x80":
        found = "a pickle that torch.save didn't write, or wrote before 2018"
    raise UserError(
        f"{path} holds no weights: expected an .npz, .safetensors, .pth or .msgpack file or an "
        f"Orbax folder, found {found}"
    )


def container(path: str | os.PathLike) -> str:
    """What kind of file `open_arrays` opens, in words."""
    if os.path.isdir(path):
        return "Orbax"
    with open(path, "rb") as file:
        start, is_pth = file.read(9), pth.is_pth(file)
    if is_pth:
        return "torch's zip archive" if start[:2] == b"PK" else "torch's pickle before 1.6"
    if start[:2] == b"PK":
        return ".npz"
    if start[8:] == b"{":
        return ".safetensors"
    return "several files" if start[:1] == b"{" else "Flax's .msgpack"


def notes_beside(weights: Path, ending: str = ".json") -> Path | None:
    """The file of the same name that tells of weights; None if there is none. The index of several
    files is none of its own."""
    file = weights.with_suffix(ending)
    return file if file != weights and file.is_file() else None


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes arrays in their order to the kind of file that the name's ending says.

    One array is in memory at a time; for ".orbax", a folder, small ones together. What was there
    under that name is replaced when the new one is complete and on disk. Equal arrays give equal
    files, but for Orbax, which notes the time.

    Raises UserError for another ending, or if it can't be written.
    """
    check_ending(path)
    _WRITERS[Path(path).suffix](path, arrays)


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Every array of a .npz file, or of another kind that `open_arrays` opens."""
    with open_arrays(path) as arrays:
        return {name: array.read() for name, array in arrays.items()}


def check_ending(path: str | os.PathLike) -> None:
    """Raises UserError unless `write_arrays` knows what to write under this name."""
    if Path(path).suffix not in _WRITERS:
        raise UserError(
            f"can't tell what to write as {Path(path).name!r}: expected a name that ends in "
            f"{' or '.join(ENDINGS)}"
        )


def split_tower(source: str | os.PathLike) -> tuple[str | os.PathLike, str | None]:
    """Takes a tower's name off a file's: "siglip.npz:img" -> ("siglip.npz", "img").

    A file that really has that name is left alone, and so is a name without a tower.
    """
    match = re.fullmatch(r"(.+):([A-Za-z]\w*)", os.fspath(source))
    if match is None or os.path.exists(source):
        return source, None
    return match[1], match[2]


@contextlib.contextmanager
def _explained(
    what: object,
    advice: str = "the file is damaged or cut short, fetch it again",
    done: str = "read",
) -> Iterator[None]:
    """Makes one line of what the libraries raise: they meet damage with dozens of errors."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what} can't be {done} ({first_line(e)[:300]}): {advice}") from e


def _undamaged(array: np.ndarray, crc: Any) -> np.ndarray:
    """The array. Raises ValueError if it hasn't the checksum that was noted, if one was."""
    if crc is not None and crc32c(array) != crc:
        raise ValueError("its values are not those that were saved")
    return array


# .npz


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[dict[str, LazyArray]]:
    with contextlib.ExitStack() as stack:
        with _explained(path):
            archive = stack.enter_context(np.load(path, allow_pickle=False)).zip
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
            arrays[name] = _npz_array(archive, member, path)
        yield arrays


def _npz_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> LazyArray:
    where = f"{path}: array {member.filename!r}"
    # The other methods unpack a few bytes to gigabytes at once.
    expands = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}.get(member.compress_type)
    if expands is None:
        raise UserError(
            f"{where} is packed by method {member.compress_type}, expected stored or deflated, as "
            "NumPy writes: save it again with numpy.savez"
        )
    with _explained(where), archive.open(member) as packed:
        file = io.BytesIO(packed.read(_HEADER))  # A header can claim to be 4 GB long.
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        if dtype.hasobject:
            raise UserError(
                f"{where} holds pickled Python objects, which could run any code and are never "
                "loaded: save plain arrays instead"
            )
        size = math.prod(shape) * dtype.itemsize
        # Checked before anything is allocated: the header can claim any size, and so can the
        # archive.
        if (
            size != member.file_size - file.tell()
            or size > expands * member.compress_size
            or min(shape, default=0) < 0
        ):
            raise UserError(
                f"{where} claims shape {shape} of {dtype}, but its size is another: the file is "
                "damaged, fetch it again"
            )
        np.empty(0, dtype)  # Some types can be written down, but not made.
    # NumPy writes bfloat16 as a type that has no name.
    is_bfloat16 = dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None

    def read() -> np.ndarray:
        with _explained(where), archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # At the end of the member, which is where its checksum is compared.
        return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array

    return LazyArray(shape, ml_dtypes.bfloat16 if is_bfloat16 else dtype, read)


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    """Writes an uncompressed .npz file, see `write_arrays`."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                # Row by row, whatever the order in memory: equal arrays give equal files.
                np.lib.format.write_array(member, np.asarray(array, order="C"), allow_pickle=False)


# .safetensors


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[dict[str, LazyArray]]:
    from safetensors import safe_open

    def read(name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
        with _explained(f"{path}: array {name!r}"):
            array = np.empty(shape, dtype)
            # Straight to its place, in half the library's time. And no map of the file into memory:
            # one that shrinks meanwhile would end the process.
            file.seek(offset)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise ValueError("the file ends within it")
            return _undamaged(array, notes.get(f"{_CRC} {name}"))

    with open(path, "rb") as file:
        arrays = {}
        with _explained(path), safe_open(path, framework="numpy", backend="pread") as checked:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            notes = header.pop("__metadata__", {})
            for name in checked.offset_keys():
                facts = header[name]
                code, shape = facts["dtype"], tuple(facts["shape"])
                if code not in _SAFETENSORS:
                    raise UserError(
                        f"{path}: array {name!r} is of type {code}, known are "
                        f"{', '.join(_SAFETENSORS)}: write it with another"
                    )
                place = (shape, _SAFETENSORS[code], 8 + size + facts["data_offsets"][0])
                arrays[name] = LazyArray(*place[:2], functools.partial(read, name, *place))
        yield arrays


def _write_safetensors(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    # The library's writer wants all arrays in memory at once. The format is: eight bytes with the
    # header's length, the header in JSON, the values; those of wide types first, so that all are
    # aligned. https://github.com/huggingface/safetensors#format
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    codes = {dtype: code for code, dtype in _SAFETENSORS.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, array in ordered:
        if (dtype := array.dtype.newbyteorder("<")) not in codes:
            raise UserError(
                f"{path}: array {name!r} is of type {array.dtype}, which .safetensors files have "
                f"not: expected one of {', '.join(map(str, codes))}"
            )
        begin, end = end, end + array.nbytes
        header[name] = dict(dtype=codes[dtype], shape=array.shape, data_offsets=(begin, end))
    notes = header["__metadata__"] = {f"{_CRC} {name}": "0" * 8 for name, _ in ordered}

    def head() -> bytes:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    with atomic_write(path) as file:
        file.write(head())
        for name, array in ordered:
            values = np.asarray(array)
            notes[f"{_CRC} {name}"] = crc32c(values)
            little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
            file.write(little.reshape(-1).view(np.uint8).data)
        file.seek(0)
        file.write(head())  # As long as before.


@contextlib.contextmanager
def _open_shards(path: Path) -> Iterator[dict[str, LazyArray]]:
    """Of an index, {"weight_map": {array: file beside it}}, all of its files."""
    with contextlib.ExitStack() as stack:
        with _explained(path):
            if path.stat().st_size > _LARGEST_INDEX:
                raise ValueError(f"expected an index of {_LARGEST_INDEX:,} bytes at most")
            files = json.loads(path.read_bytes())["weight_map"]
            shards: dict[str, dict[str, LazyArray]] = {}
            names = sorted(set(files.values()))
            for name in names:
                if os.path.basename(name) != name or name == path.name:
                    raise ValueError(f"{name!r} is no file beside it")
        for name in names:
            if not (path.parent / name).is_file():
                raise UserError(f"{path} names {name}, which is not beside it: fetch it, too")
            if _opener_of_file(path.parent / name) is _open_shards:
                raise UserError(f"{path} names {name}, which is an index too: expected weights")
            shards[name] = stack.enter_context(open_arrays(path.parent / name))
        with _explained(path, "it and its files are of different weights, fetch them again"):
            arrays = {name: shards[file][name] for name, file in files.items()}
        others = [f"{a} ({file})" for file in names for a in shards[file] if files.get(a) != file]
        if others:
            left_out = ", ".join(others)[:500]
            _log.warning("%s: left out, for it doesn't name them: %s", path, left_out)
        yield arrays


# .pth


@contextlib.contextmanager
def _open_pth(path: Path) -> Iterator[dict[str, LazyArray]]:
    def read(name: str) -> np.ndarray:
        with _explained(f"{path}: array {name!r}"):
            return tensors[name][2]()

    with open(path, "rb") as file:
        with _explained(path):
            try:
                tensors = pth.read_pth(file, str(path))
            except UserError as e:
                raise UserError(f"{path}: {e}") from e
        yield {
            name: LazyArray(shape, dtype, functools.partial(read, name))
            for name, (shape, dtype, _) in tensors.items()
        }


# .msgpack


@contextlib.contextmanager
def _open_msgpack(path: Path) -> Iterator[dict[str, LazyArray]]:
    """What Flax's `msgpack_serialize` wrote; it is read whole. Leaves that are no arrays are left
    out."""
    from flax.serialization import msgpack_restore

    with _explained(path):
        tree = flatten_dict(msgpack_restore(path.read_bytes()), sep="/")
        arrays = {name: array for name, array in tree.items() if isinstance(array, np.ndarray)}
    # What it gives can't be written to.
    yield {name: LazyArray(a.shape, a.dtype, a.copy) for name, a in arrays.items()}


# Orbax


def is_orbax(path: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint that Orbax wrote."""
    return any((Path(path) / name).is_file() for name in ("_CHECKPOINT_METADATA", "_METADATA"))


@contextlib.contextmanager
def _open_orbax(path: Path) -> Iterator[dict[str, LazyArray]]:
    """Names along the way to a leaf are joined with "/"; leaves that are no arrays are left out.

    Orbax says what is there. The values come from TensorStore, on which it is built, for an array
    then costs a millisecond in place of thirty, and a damaged one leaves no others under way.
    """
    import tensorstore

    path = path.resolve()
    explained = functools.partial(_explained, path, "the folder is damaged or incomplete")
    with explained():
        metadata = _orbax().metadata(path)
        leaves = jax.tree_util.tree_leaves_with_path(metadata.metadata)
        folders = dict.fromkeys((path, path / "state", *sorted(path.iterdir())))
        folder, *others = (f for f in folders if (f / "_METADATA").is_file())
        is_zarr3 = json.loads((folder / "_METADATA").read_bytes()).get("use_zarr3")
        crcs = (metadata.custom_metadata or {}).get(_CRC, {})

    def open_store(folder: Path, name: str) -> Any:
        files: Any = {"driver": "file", "path": f"{folder}/{name}/"}
        if (folder / "manifest.ocdbt").is_file():
            base = {"driver": "file", "path": f"{folder}/"}
            files = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr3" if is_zarr3 else "zarr", "kvstore": files}
        # A missing piece is an error and not zeros.
        return tensorstore.open(spec | {"fill_missing_data_reads": False}).result()

    def read(name: str, stored: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        with explained():
            store = open_store(folder, stored)
            # Before memory is taken: the pieces can claim to be larger than the whole.
            piece = math.prod(store.chunk_layout.read_chunk.shape or ())
            same = (store.shape, store.dtype.numpy_dtype) == (shape, dtype)
            if not same or piece > math.prod(max(n, 1) for n in shape):
                raise ValueError(f"{name} is {store.shape} of {store.dtype.name} in {piece:,}")
            np.empty(shape, dtype)  # If there is no room, Python can tell.
            array = _undamaged(store.read().result(), crcs.get(name))
            if name in places and int(digest([array])[0]) != sums[places[name]]:
                raise ValueError("its values are not those that were saved")
            return array

    arrays: dict[str, LazyArray] = {}
    for keys, leaf in leaves:
        if not isinstance(getattr(leaf, "dtype", None), np.dtype):
            continue
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if name in arrays:
            raise UserError(f"{path}: two arrays are named {name!r}: write the folder again")
        stored = jax.tree_util.keystr(keys, simple=True, separator=".")
        values = functools.partial(read, name, stored, tuple(leaf.shape), leaf.dtype)
        arrays[name] = LazyArray(leaf.shape, leaf.dtype, values)
    if not arrays:  # What Orbax says of an empty tree, and of one that it can't read.
        raise UserError(f"{path}: Orbax finds no array in it: the folder is damaged or incomplete")

    # Beside the state of a training run lies the `digest` of its leaves: the step, the parameters,
    # the optimizer and more, and their average at the end.
    places: dict[str, int] = {}
    if folder.name == "state" and [f.name for f in others] == ["digest"] and "step" in arrays:
        with explained():
            sums = open_store(path / "digest", "").read().result()
            ema = [name for name in arrays if name.startswith("ema/")]
            params = [name for name in arrays if name.startswith("params/")]
            places = {name: i for i, name in enumerate(["step", *params])}
            places |= {name: len(sums) - len(ema) + i for i, name in enumerate(ema)}
    elif others:
        left_out = ", ".join(f.name for f in others)
        _log.warning("%s: of its trees %s is read; left out: %s", path, folder.name, left_out)
    yield arrays


def _write_orbax(path: str | os.PathLike, arrays: Mapping[str, Array]) -> None:
    ocp = _orbax()
    path = Path(path).resolve()
    if path.exists() and not is_orbax(path):
        raise UserError(f"{path} is there and no Orbax folder: remove it, or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}: make it first")
    # In a hidden folder, not hidden itself: Orbax overlooks its own parts if their names begin with
    # a point.
    work = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}"
    new, old = work / "new", work / "old"
    context = ocp.Context()
    # Weights hardly shrink when compressed, and that takes another copy of them in memory.
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    try:
        with _explained(path, "make room or mend the cause, then do it again", "written"), context:
            part: dict[str, np.ndarray] = {}
            crcs: dict[str, str] = {}
            for name, array in arrays.items():
                if part and sum(a.nbytes for a in part.values()) + array.nbytes > _BATCH:
                    ocp.partial.save(new, unflatten_dict(part, sep="/"))
                    part.clear()  # Before the next is read.
                part[name] = np.asarray(array)
                crcs[name] = crc32c(part[name])
            ocp.partial.save(new, unflatten_dict(part, sep="/"), custom_metadata={_CRC: crcs})
            ocp.partial.finalize(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work, ignore_errors=True)


def _orbax() -> Any:
    # Slow to import, and it reports each of its doings through absl, and each failure of one array
    # through asyncio too.
    from orbax.checkpoint import v1 as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return ocp


_WRITERS = {".npz": write_npz, ".safetensors": _write_safetensors, ".orbax": _write_orbax}

# The endings by which `write_arrays` knows what to write.
ENDINGS = tuple(_WRITERS)
