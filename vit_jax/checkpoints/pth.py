"""Files that torch.save wrote (.pth, .pt, .bin, .pth.tar), read without torch and without running
anything.

Such a file is a pickle, a program for a small stack machine, that names functions to be called. The
machine here calls none and imports none: tensors become a note of where their values lie, which are
plain bytes elsewhere in the file, and every other object one that does nothing (`Inert`).
"""

import functools
import io
import logging
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes  # noqa: F401 (with it NumPy knows bfloat16)
import numpy as np

from vit_jax.errors import UserError

# What the pickle may have; that of a network of 40 layers with its optimizer has 0.5 MB, and
# 100,000 operations. An operation makes an object of 100 bytes at most, but for texts.
_LARGEST, _OPERATIONS = 64 << 20, 4_000_000
_COPIED = 8  # Operations that an item counts for which is copied and not in the pickle again.
_SPREAD = 4096  # Numbers that a tensor may have of fewer that are stored, one for all for instance.

# The first number of what torch wrote before 1.6, and still does if it is asked to.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# The types of storages by the names of their classes; others have the name of a dtype.
_STORAGES = dict(Float="f4", Double="f8", Half="f2", BFloat16="bfloat16", Bool="?", Untyped="u1")
_STORAGES |= dict(Long="i8", Int="i4", Short="i2", Char="i1", Byte="u1", ComplexFloat="c8")

# Operations that take what stands above the mark; and those that do nothing, here or at all.
_FROM_MARK = ("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS", "POP_MARK")
_NOTHING = ("PROTO", "FRAME", "APPEND", "SETITEM")

# Under which training scripts keep the parameters, the average of them first.
WRAPPERS = (
    *("state_dict_ema", "model_ema", "ema", "teacher"),
    *("model", "state_dict", "net", "student"),
)

_log = logging.getLogger(__name__)


# Shape, dtype and the function that reads such an array.
Stored = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]


class Inert(NamedTuple):
    """What stands for an object of any class but a few: it has a name and does nothing."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int  # In numbers of its dtype.


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_pth(file: BinaryIO) -> bool:
    """Whether an opened file is one that torch wrote. Files of .npz are zip archives, too."""
    file.seek(0)
    start = file.read(32)
    if start[:4] != b"PK\x03\x04":
        return start[:1] == b"\x80" and _LEGACY in start
    try:
        names = zipfile.ZipFile(file).namelist()
    except Exception:  # Damage of any kind, of which the reader of .npz files tells.
        return False
    return any(name.rpartition("/")[2] == "data.pkl" for name in names)


def read_pth(file: BinaryIO, where: str) -> dict[str, Stored]:
    """The parameters in an opened file of torch; their values can be read while it is open.

    Of a training checkpoint the parameters are taken, or their average if there is one; the log
    says what was left out.

    Args:
      file: see `is_pth`.
      where: its name, for the log and errors.

    Raises UserError, or any other exception, if it is damaged or of another kind.
    """
    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    content, opener = (_read_zip if is_zip else _read_legacy)(file)
    # Tensors may share a storage, and then are often read one after the other.
    values = functools.lru_cache(maxsize=1)(lambda storage: opener(storage)())
    found: dict[str, Stored] = {}
    for name, view in _unwrap(content, where).items():
        last = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        size, stored = math.prod(view.shape), view.storage.size
        # Rows that lie on each other are many bytes made of few.
        if size and (view.offset + last >= stored or size > max(stored, _SPREAD)):
            raise UserError(
                f"array {name!r} of shape {view.shape} needs more than the {stored:,} "
                "numbers that are stored for it: the file is damaged"
            )
        opener(view.storage)  # Whether it is there is known before anything is read.
        read = functools.partial(_values, values, view)
        found[name] = (view.shape, view.storage.dtype, read)
    return found


def _values(values: Callable[[_Storage], np.ndarray], view: _View) -> np.ndarray:
    numbers = values(view.storage)
    strides = [step * numbers.itemsize for step in view.strides]
    array = np.lib.stride_tricks.as_strided(numbers[view.offset :], view.shape, strides)
    return array if array.size == numbers.size and array.flags.c_contiguous else array.copy("C")


# The two kinds of file.


_Opener = Callable[[_Storage], Callable[[], np.ndarray]]


def _read_zip(file: BinaryIO) -> tuple[Any, _Opener]:
    archive = zipfile.ZipFile(file)
    members = {member.filename: member for member in archive.infolist()}
    root = next(n for n in members if n.rpartition("/")[2] == "data.pkl").removesuffix("data.pkl")
    if len(members) < len(archive.infolist()):
        raise UserError("two of its parts have the same name: the file is damaged")
    if f"{root}constants.pkl" in members:
        raise UserError(
            "it is a TorchScript program, whose weights can't be told from its code: save the "
            "model's state_dict() with torch.save"
        )

    def member(name: str) -> zipfile.ZipInfo:
        found = members[root + name]
        if found.compress_type != zipfile.ZIP_STORED or found.file_size != found.compress_size:
            raise UserError(f"its part {name!r} is packed, which torch never does: save it again")
        return found

    pickle = member("data.pkl")
    if pickle.file_size > _LARGEST:
        raise UserError(f"its pickle has {pickle.file_size:,} bytes, expected {_LARGEST:,} at most")
    if f"{root}byteorder" in members:
        _check_order(archive.read(member("byteorder")) == b"little")

    def open_storage(storage: _Storage) -> Callable[[], np.ndarray]:
        part = member(f"data/{storage.key}")
        if part.file_size != storage.size * storage.dtype.itemsize:
            raise UserError(
                f"its part {storage.key!r} has {part.file_size:,} bytes, expected {storage.size:,} "
                f"numbers of {storage.dtype}: the file is damaged"
            )

        def read() -> np.ndarray:
            with archive.open(part) as stored:  # Compares the checksum at the end.
                return _fill(stored, storage)

        return read

    return _run(io.BytesIO(archive.read(pickle))), open_storage


def _read_legacy(file: BinaryIO) -> tuple[Any, _Opener]:
    file.seek(0)
    head = io.BytesIO(file.read(_LARGEST))
    storages: dict[str, _Storage] = {}
    _, version, system, content, keys = (_run(head, storages) for _ in range(5))
    _check_order(isinstance(system, dict) and system.get("little_endian") is True)
    if version != 1001 or not isinstance(keys, list):
        raise UserError("it is not of torch's format 1001: save it again")
    places, position, end = {}, head.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        if not isinstance(key, str) or key not in storages or key in places:
            raise UserError("a storage is unknown or there twice: the file is damaged")
        file.seek(position)
        (size,) = struct.unpack("<q", file.read(8))
        if size != storages[key].size:
            raise UserError(f"its storage {key!r} has {size:,} numbers, not those it is said to")
        places[key] = position + 8
        position += 8 + size * storages[key].dtype.itemsize
    if position > end or places.keys() != storages.keys():
        raise UserError(f"it has {end:,} bytes, expected {position:,}: the file is cut short")

    def open_storage(storage: _Storage) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            file.seek(places[storage.key])
            return _fill(file, storage)

        return read

    return content, open_storage


def _check_order(is_little: bool) -> None:
    if not is_little:
        raise UserError("it was written by a machine that stores numbers the other way round")


def _fill(file: Any, storage: _Storage) -> np.ndarray:
    numbers = np.empty(storage.size, storage.dtype)
    rest = numbers.view(np.uint8).data
    while len(rest) and (count := file.readinto(rest[: 1 << 20])):
        rest = rest[count:]
    if len(rest):
        raise UserError("the file is cut short")
    return numbers


# The machine.


def _run(file: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    """The object that a pickle makes of texts, numbers, lists, tuples, dicts, views of storages and
    inert objects. Storages are noted in `storages`.

    Raises UserError, or what Python does with a pickle that makes no sense.
    """
    storages = {} if storages is None else storages
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    items: list[Any] = []
    operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(file)
    copied = 0
    for count, (opcode, arg, position) in enumerate(operations):
        if count + _COPIED * copied > _OPERATIONS or (position or 0) > _LARGEST:
            raise UserError(f"its pickle has more than {_OPERATIONS:,} operations")
        name = opcode.name
        if name in ("REDUCE", "NEWOBJ", "STACK_GLOBAL"):
            copied += _length(stack[-2:])
        if name in _FROM_MARK:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
        elif name in ("APPEND", "SETITEM"):
            items = [stack.pop()] if name == "APPEND" else [stack.pop(-2), stack.pop()]
        match name:
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "POP" if marks and marks[-1] == len(stack):
                marks.pop()
            case "POP" | "BUILD":  # What is built in would be for an object that does something.
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
            case "TUPLE" | "LIST":
                stack.append(tuple(items) if name == "TUPLE" else items)
            case "DICT":
                stack.append(_as_dict(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "APPEND" | "APPENDS" if isinstance(stack[-1], list):
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS" if isinstance(stack[-1], dict):
                stack[-1].update(_as_dict(items))
            case "EMPTY_SET" | "FROZENSET":
                stack.append(Inert("set"))
            case "GLOBAL":
                stack.append(Inert(arg.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack[-2:] = [Inert(".".join(stack[-2:]))]
            case "REDUCE" | "NEWOBJ":
                stack[-2:] = [_call(*stack[-2:])]
            case "NEWOBJ_EX":
                del stack[-2:]  # Its class stands for what it would make.
            case "BINPERSID":
                storage = stack[-1] = _storage(stack[-1])
                storages[storage.key] = storage
            case _ if opcode.arg and opcode.stack_after[:1] not in ([], [pickletools.anyobject]):
                stack.append(arg)  # A number or a text.
            case _ if name not in (*_FROM_MARK, *_NOTHING):
                raise UserError(f"its pickle uses {name}, which torch never does")
    raise UserError("its pickle has no end")


def _length(value: Any, depth: int = 3) -> int:
    """How much a call copies or walks of what it is given, which may be long and given often."""
    if not isinstance(value, str | list | tuple | dict):
        return 0
    inner = value if depth > 1 and isinstance(value, tuple | list) else ()
    copied = len(value) if isinstance(value, list | dict) and depth < 3 else len(value) // 16
    return copied + sum(_length(item, depth - 1) for item in inner)


def _as_dict(items: list[Any]) -> dict[Any, Any]:
    pairs = zip(items[::2], items[1::2], strict=True)
    # A nested tuple takes for ever to be hashed.
    return {key: value for key, value in pairs if isinstance(key, str | int)}


def _call(function: Any, args: Any) -> Any:
    """What stands for the result of a function, which isn't called."""
    name = function.name if isinstance(function, Inert) else "?"
    match name.removeprefix("torch._utils."), args:
        case "collections.OrderedDict", (list(pairs),):
            return _as_dict([part for key, value in pairs for part in (key, value)])
        case "collections.OrderedDict", ():
            return {}
        case "_rebuild_tensor" | "_rebuild_tensor_v2", (_Storage() as storage, *place):
            return _view(storage, *place[:3])
        case "_rebuild_tensor_v3", (_Storage() as stored, *place, _, _, Inert(dtype_name)):
            dtype = _dtype(dtype_name)
            size = stored.size * stored.dtype.itemsize // dtype.itemsize
            return _view(_Storage(stored.key, dtype, size), *place)
        case "_rebuild_parameter" | "_rebuild_parameter_with_state", (tensor, *_):
            return tensor
        case "torch._tensor._rebuild_from_type_v2", (Inert() as inner, _, tuple(rest), _):
            # Once: what is within is a tensor.
            return Inert(inner.name) if inner == function else _call(inner, rest)
    return Inert(name)


def _view(storage: _Storage, offset: Any, shape: Any, strides: Any) -> _View:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 32 or not all(map(_is_count, numbers)):
        raise UserError(
            "a tensor's shape, strides and place are not whole numbers of 0 to 2**62: the file is "
            "damaged"
        )
    return _View(storage, offset, shape, strides)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _storage(noted: Any) -> _Storage:
    match noted:
        case ("storage", Inert(name), str(key), _, int(size), *views) if views in ([], [None]):
            if _is_count(size):
                return _Storage(key, _dtype(name.removesuffix("Storage")), size)
    raise UserError("it notes values in a way that torch never does")


def _dtype(name: str) -> np.dtype:
    short = name.rpartition(".")[2]
    if short not in _STORAGES and not re.fullmatch(r"(bfloat|float|u?int|complex)\d+|bool", short):
        raise UserError(f"it holds values of type {name}, which NumPy has not")
    return np.dtype(_STORAGES.get(short, short))


# What of it are the parameters.


def _unwrap(content: Any, where: str) -> dict[str, _View]:
    """The parameters in what a file holds. Raises UserError if there are none."""
    found = _find_parameters(content, [], set())
    if found is None:
        what = _named(content)
        if isinstance(content, dict):
            what = f"a dict of {', '.join(map(str, list(content)[:8])) or 'nothing'}"
        raise UserError(
            f"it holds no parameters but {what[:300]}: save model.state_dict() with torch.save"
        )
    path, parameters, others = found
    if others:
        _log.warning("%s: %s is taken; left out: %s", where, path, ", ".join(others)[:500])
    views = {name: view for name, view in parameters.items() if isinstance(view, _View)}
    if rest := [f"{k} ({_named(v)})" for k, v in parameters.items() if k not in views]:
        _log.warning("%s: left out, for they are no arrays: %s", where, ", ".join(rest)[:500])
    return views


def _named(value: Any) -> str:
    return value.name if isinstance(value, Inert) else type(value).__name__


def _find_parameters(
    content: Any, path: list[str], seen: set[int]
) -> tuple[str, dict[str, Any], list[str]] | None:
    """(path to them, the parameters, what is beside them); None if there are none. `seen` are the
    dicts that hold none, by id."""
    if not isinstance(content, dict) or len(path) > 4 or id(content) in seen:
        return None
    seen.add(id(content))
    for name in WRAPPERS:
        if found := _find_parameters(content.get(name), [*path, name], seen):
            return found[0], found[1], found[2] + [str(n) for n in content if n != name]
    if any(isinstance(value, _View) for value in content.values()):
        return ".".join(path), {str(name): value for name, value in content.items()}, []
    return None
