"""Files of torch: what is in them comes out, and nothing in them runs."""

import argparse
import collections
import contextlib
import json
import logging
import math
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from vit_jax.checkpoints import open_arrays, pth, read_npz
from vit_jax.checkpoints.formats import container
from vit_jax.errors import UserError

# A small writer of pickles: what torch writes, and what it would never write.


@dataclass
class Raw:
    """Operations as they stand in the file."""

    code: bytes


@dataclass
class Call:
    """The result of a function, "module name", or what has such an object's state."""

    function: str
    args: tuple = ()
    state: Any = None


@dataclass
class Values:
    """A storage: `kind` is the name of its class."""

    array: np.ndarray
    key: str
    kind: str = "torch FloatStorage"
    size: int | None = None

    def note(self):
        size = self.array.size if self.size is None else self.size
        return ("storage", Call(self.kind), self.key, "cpu", size)


def encode(x) -> bytes:
    match x:
        case Raw(code):
            return code
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        case int():
            return b"\x8a\x09" + x.to_bytes(9, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", x)
        case str():
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        case tuple():
            return b"(" + b"".join(map(encode, x)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, x)) + b"e"
        case dict():
            return b"}(" + b"".join(encode(k) + encode(v) for k, v in x.items()) + b"u"
        case Values():
            return encode(x.note()) + b"Q"
        case Call(function, (), None) if function.endswith("Storage"):
            return b"c" + function.replace(" ", "\n").encode() + b"\n"
        case Call(function, args, state):
            code = b"c" + function.replace(" ", "\n").encode() + b"\n" + encode(args) + b"R"
            return code if state is None else code + encode(state) + b"b"
    raise TypeError(x)


def pickled(x) -> bytes:
    return b"\x80\x02" + encode(x) + b"."


def tensor(values: Values, shape=None, strides=None, offset=0, name="_rebuild_tensor_v2"):
    array = values.array
    shape = array.shape if shape is None else shape
    if strides is None:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    hooks = Call("collections OrderedDict")
    return Call(f"torch._utils {name}", (values, offset, shape, strides, False, hooks))


def write_zip(path, content, storages, **parts):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(content))
        archive.writestr("archive/byteorder", "little")
        for values in storages:
            archive.writestr(f"archive/data/{values.key}", values.array.tobytes())
        for name, part in parts.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", part)
    return path


def write_legacy(path, content, storages, **_):
    code = encode(content)
    storages = [values for values in storages if encode(values.note()[2]) in code]
    system = {"protocol_version": 1001, "little_endian": True}
    head = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
    head += b"".join(pickled(x) for x in (1001, system, content, [v.key for v in storages]))
    data = [struct.pack("<q", v.array.size) + v.array.tobytes() for v in storages]
    path.write_bytes(head + b"".join(data))
    return path


both = pytest.mark.parametrize("write", [write_zip, write_legacy])
FLOATS = Values(np.arange(12, dtype=np.float32), "0")
HALVES = Values(np.arange(3).astype(ml_dtypes.bfloat16), "1", "torch BFloat16Storage")
LONGS = Values(np.array([7]), "2", "torch.cuda LongStorage")
STORAGES = [FLOATS, HALVES, LONGS]


@both
def test_tensors_come_as_they_were_saved(tmp_path, write):
    parameter = Call("torch._utils _rebuild_parameter", (tensor(FLOATS, (3, 4)), True, {}))
    content = {
        "plain": tensor(FLOATS),
        "transposed": tensor(FLOATS, (4, 3), (1, 4)),
        "part": tensor(FLOATS, (2,), (3,), offset=5, name="_rebuild_tensor"),
        "parameter": parameter,
        "halves": tensor(HALVES),
        "number": tensor(LONGS, (), ()),
        "none": tensor(FLOATS, (0, 3)),
        "same": tensor(FLOATS, (2, 3), (0, 1)),
    }
    state = Call("collections OrderedDict", (), {"_metadata": {"": {"version": 1}}})
    for key, value in content.items():
        state = Raw(encode(state) + encode(key) + encode(value) + b"s")
    found = read_npz(write(tmp_path / "w.pth", state, STORAGES))

    numbers = FLOATS.array
    expected = {
        "plain": numbers,
        "transposed": numbers.reshape(3, 4).T,
        "part": numbers[[5, 8]],
        "parameter": numbers.reshape(3, 4),
        "halves": HALVES.array,
        "number": np.array(7),
        "none": np.zeros((0, 3), np.float32),
        "same": numbers[[[0, 1, 2], [0, 1, 2]]],
    }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert found["part"].flags.writeable


@both
def test_the_average_is_taken_and_the_log_says_so(tmp_path, write, caplog):
    raw, average = {"module.a": tensor(FLOATS)}, {"module.a": tensor(HALVES), "module.n": 3}
    options = Call("argparse Namespace", (), {"lr": 0.1, "data": ["x"]})
    content = {"epoch": 3, "model": raw, "model_ema": average, "state_dict_ema": None}
    write(tmp_path / "w.pth.tar", content | {"args": options}, STORAGES)

    with caplog.at_level(logging.WARNING):
        found = read_npz(tmp_path / "w.pth.tar")

    assert list(found) == ["module.a"]
    assert found["module.a"].dtype == HALVES.array.dtype
    assert "model_ema is taken; left out: epoch, model, state_dict_ema, args" in caplog.text
    assert "they are no arrays: module.n (int)" in caplog.text


@both
def test_nothing_in_a_file_runs(tmp_path, write):
    calls = [
        ("os system", (f"touch {tmp_path}/ran",)),
        ("builtins exec", (f"open('{tmp_path}/ran', 'w')",)),
        ("vit_jax.checkpoints.pth read_pth", ()),
        ("torch._utils _rebuild_from_nowhere", ({},)),
        ("no_such_module_anywhere thing", ()),
        ("antigravity x", ()),
    ]
    content = {"a": tensor(FLOATS)} | {name: Call(name, args) for name, args in calls}
    content["nested"] = Call("posix system", (Call("os system", (f"touch {tmp_path}/ran",)),), {})
    write(tmp_path / "w.pth", content, STORAGES)

    assert list(read_npz(tmp_path / "w.pth")) == ["a"]
    assert not (tmp_path / "ran").exists()
    assert "antigravity" not in sys.modules


# Each would take gigabytes, or for ever: doubled forty times, a list has 10^12 entries to print, to
# compare or to hash.
NESTED = b")" + 40 * b"2\x86"
BOMBS = {
    "memo": Raw(b"Nr\xff\xff\xff\x7f0"),
    "hash": Raw(b"}" + NESTED + b"Ns"),
    "set": Raw(b"\x8f(" + NESTED + b"\x90"),
    "frozenset": Raw(b"(" + NESTED + b"\x91"),
    "pairs": Raw(b"ccollections\nOrderedDict\n](" + NESTED + b"e\x85R"),
    "shape": Raw(b"ctorch._utils\n_rebuild_tensor_v2\n(" + encode(FLOATS) + 3 * NESTED + b"tR"),
    "copies": Raw(
        b"]("
        + b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(2000))
        + b"e\x85q\x020"
        b"ccollections\nOrderedDict\nq\x010](" + 20_000 * b"h\x01h\x02R" + b"e"
    ),
    "itself": Raw(b"}q\x01(" + b"".join(encode(n) + b"h\x01" for n in pth.WRAPPERS) + b"u"),
    "storage": Raw(NESTED + b"Q"),
    "name": Raw(NESTED + NESTED + b"\x93"),
    "size": Raw(b"\x8e" + struct.pack("<q", 1 << 60)),
    "operations": Raw(b"0".join([b"N"] * 3_000_000)),
    "depth": Raw(1_000_000 * b"]" + 999_999 * b"a"),
}


@pytest.mark.parametrize("bomb", BOMBS)
@both
def test_a_bomb_takes_neither_memory_nor_time(tmp_path, write, bomb):
    write(tmp_path / "w.pth", {"a": tensor(FLOATS), "b": BOMBS[bomb]}, STORAGES)
    code = f"""if True:
        import resource
        from vit_jax.checkpoints import read_npz
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            print(*read_npz({str(tmp_path / "w.pth")!r}))
        except ValueError as e:
            print(e)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) // 1024)
    """
    if bomb in ("operations", "depth"):  # They fill the memory of this process, but not much.
        with contextlib.suppress(UserError):
            read_npz(tmp_path / "w.pth")
        return
    if bomb in ("memo", "copies"):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert int(out.stdout.split()[-1]) < 100, out
        return
    start = time.process_time()
    with contextlib.suppress(UserError):
        assert "a" in read_npz(tmp_path / "w.pth")
    assert time.process_time() - start < 2


WRONG = {
    "a stride out of range": tensor(FLOATS, (4, 3), (4, 1)),
    "an offset out of range": tensor(FLOATS, (3,), (1,), offset=10),
    "a negative stride": tensor(FLOATS, (3,), (-1,), offset=3),
    "a negative offset": tensor(FLOATS, (3,), (1,), offset=-1),
    "strides for fewer axes": tensor(FLOATS, (3, 4), (1,)),
    "a size that overflows": tensor(FLOATS, (1 << 32, 1 << 32, 0, 1 << 63)),
    "one number for many": tensor(FLOATS, (1 << 20, 1 << 20), (0, 0)),
    "more numbers than are stored": tensor(Values(FLOATS.array, "0", size=1 << 40), (12,)),
    "fewer numbers than are stored": tensor(Values(FLOATS.array, "0", size=3), (3,)),
    "a storage that isn't there": tensor(Values(FLOATS.array, "9"), (12,)),
    "a storage outside of the file": tensor(Values(FLOATS.array, "../../0"), (12,)),
    "objects": tensor(Values(FLOATS.array, "0", "torch ObjectStorage"), (12,)),
    "strings": tensor(Values(FLOATS.array, "0", "torch S4"), (12,)),
    "an external reference": Raw(b"Pstorage\n"),
    "an extension": Raw(b"\x82\x01"),
    "the end of the stack": Raw(b"0000000"),
    "a mark that isn't there": Raw(b"tt"),
}


@pytest.mark.parametrize("wrong", WRONG)
@both
def test_what_makes_no_sense_is_refused_in_one_line(tmp_path, write, wrong):
    write(tmp_path / "w.pth", {"a": WRONG[wrong]}, STORAGES)

    with pytest.raises(UserError, match=r"w\.pth"):
        read_npz(tmp_path / "w.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]


def test_odd_archives_are_refused_in_one_line(tmp_path):
    good = {"a": tensor(FLOATS)}
    path = tmp_path / "w.pt"

    def refused(match):
        with pytest.raises(UserError, match=match):
            read_npz(path)

    write_zip(path, good, STORAGES, constants_pkl=b"")
    refused("TorchScript program.*state_dict")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    refused("packed, which torch never does")
    with pytest.warns(UserWarning, match="Duplicate"):
        write_zip(path, good, STORAGES, data_pkl=pickled(good))
    refused("same name")
    write_zip(path, good, STORAGES)
    content = path.read_bytes()
    place = content.index(FLOATS.array.tobytes())
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    refused("array 'a' can't be read.*CRC")
    write_zip(path, good, [])
    refused("can't be read")
    write_zip(path, {"epoch": 3, "args": Call("argparse Namespace")}, [])
    refused("no parameters but a dict of epoch, args: save model.state_dict")
    write_zip(path, Call("timm.models.vit ViT", (), {}), [])
    refused("no parameters but timm.models.vit.ViT")
    write_legacy(path, good, [FLOATS])
    path.write_bytes(path.read_bytes()[:-1])
    refused("cut short")
    path.write_bytes(pickled({"a": 3}))
    refused(r"a pickle that torch.save didn't write")


@given(st.data())
@settings(max_examples=150, deadline=None)
@both
def test_damage_is_one_line_or_harmless(tmp_path_factory, write, data):
    path = tmp_path_factory.getbasetemp() / f"fuzz-{write.__name__}.pth"
    write(path, {"model": {"a": tensor(FLOATS), "b": tensor(HALVES)}}, STORAGES)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(content)

    with contextlib.suppress(UserError):
        for array in read_npz(path).values():
            assert array.nbytes <= 8 * len(content)


def test_sharded_weights_are_opened_by_their_index(tmp_path, caplog):
    a, b = np.arange(3, dtype=np.float32), np.ones((2, 2), np.float32)
    save_file({"a": a}, tmp_path / "model-1.safetensors")
    write_zip(tmp_path / "model-2.bin", {"b": tensor(FLOATS, (2, 2))}, STORAGES)
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "model-1.safetensors", "b": "model-2.bin"}

    def write(places):
        index.write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": places}))

    write(places)
    found = read_npz(index)
    np.testing.assert_array_equal(found["a"], a)
    assert found["b"].shape == b.shape
    with open_arrays(index) as arrays:
        assert list(arrays) == ["a", "b"]
    write({"b": "model-2.bin"} | {"a": "model-1.safetensors"})
    assert "left out" not in caplog.text
    save_file({"a": a, "c": a}, tmp_path / "model-1.safetensors")
    assert read_npz(index).keys() == {"a", "b"}
    assert "left out, for it doesn't name them: c (model-1.safetensors)" in caplog.text
    index.write_text(json.dumps({"weight_map": places}, indent=1))
    assert container(index) == "several files"
    assert container(tmp_path / "model-1.safetensors") == ".safetensors"
    for wrong, text in [
        ({"a": "model-3.safetensors"}, "names model-3.safetensors, which is not beside it"),
        ({"a": "../x"}, "no file beside it"),
        ({"a": index.name}, "no file beside it"),
        ({"b": "model-1.safetensors"}, "of different weights"),
        ({"a": 3}, "can't be read"),
    ]:
        write(wrong)
        with pytest.raises(UserError, match=text):
            read_npz(index)
    other = tmp_path / "other.index.json"
    other.write_text(json.dumps({"weight_map": {"a": index.name}}, indent=1))
    write({"a": other.name})
    with pytest.raises(UserError, match=r"names other\.index\.json, which is an index too"):
        read_npz(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="can't be read"):
        read_npz(index)


@pytest.mark.reference
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("is_zip", [True, False])
def test_files_of_torch_itself(tmp_path, is_zip, protocol):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(3, 4)
    base = torch.randn(10, 6)
    tagged = torch.nn.Parameter(torch.ones(3))
    tagged.tag = "x"
    model = collections.OrderedDict(
        transposed=base.t(),
        part=base[2:4, 1:3],
        tied=layer.weight,
        tied_too=layer.weight,
        tagged=tagged,
        half=torch.ones(2).half(),
        bfloat16=torch.tensor([1.5, -2], dtype=torch.bfloat16),
        flags=torch.tensor([True, False]),
        number=torch.tensor(3),
        none=torch.zeros(0, 3),
        same=torch.ones(1).expand(3, 5),
        complex=torch.ones(2, dtype=torch.complex64),
        unsigned=torch.ones(2, dtype=torch.uint16),
    )
    content = {
        "model": model,
        "optimizer": torch.optim.AdamW(layer.parameters()).state_dict(),
        "args": argparse.Namespace(a={"x": {1, 2}}, device=torch.device("cpu")),
        "rest": [np.float64(3), np.ones(3), 2**100, b"x", torch.float32, torch.Size([1])],
    }
    options = {"_use_new_zipfile_serialization": is_zip, "pickle_protocol": protocol}
    torch.save(content, tmp_path / "w.pth", **options)
    found = read_npz(tmp_path / "w.pth")

    assert found.keys() == model.keys()
    for name, value in model.items():
        expected = value.detach().float().numpy() if name == "bfloat16" else value.detach().numpy()
        assert found[name].dtype == expected.dtype or name == "bfloat16"
        np.testing.assert_array_equal(found[name].astype(expected.dtype), expected, strict=True)
