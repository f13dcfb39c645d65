"""Five hundred bad files: one clear error each, no crash, no hang, no memory.

Files are made worse in what a stranger or a broken disk can change: bytes, lengths, names, shapes,
types, and headers that lie. A few of them are still good, and then they load.
"""

import json
import random
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import published
from vit_jax.checkpoints import load_weights
from vit_jax.errors import UserError

CASES = 500
FAMILIES = (*published.FAMILIES, "LiT of BERT", "sincos2d")
MESSAGE = 20_000  # Characters.
MEMORY = 64 << 20  # Bytes; the files are smaller than one megabyte.
SECONDS = 20

# (name, type, shape, values): an array as a header tells it, true or not.
Entry = tuple[str, str, list, bytes]

NAMES = [
    *("", "/", "..", "a\nb", "\x00", "é", "x" * 70_000, "head", "head/kernel/more", "cls/x"),
    *("params/head/kernel", "opt/target/x", "img/x", "txt/x", "probe", "pos_embedding", "t"),
    *("Transformer/encoderblock/x", "Transformer/encoderblock_999999999/LayerNorm_0/scale"),
    *("Transformer/encoderblock_٣/LayerNorm_0/scale", "Transformer/encoderblock_-1/x"),
    *("MixerBlock_9999/token_mixing/Dense_0/kernel", "block99/unit999/conv1/kernel"),
    *("block1/unit999/x", "txt/Embed_0/embedding", "txt/pos_embedding", "img/embedding/kernel"),
    *("img/conv_root/kernel", "txt/Encoder_0/encoderblock_9999/x", "MAPHead_0/probe"),
    *("conv_root/kernel", "stem/kernel", "gn_root/scale", "embedding/kernel", "file", "self"),
]
SIZES = [0, 1, 2, 3, 7, 17, 10**3, 10**6, 2**31, 2**32 + 1, 2**63 - 1, 2**64, 10**30, -1, -4]


def entries(rng: random.Random) -> list[Entry]:
    arrays = published.arrays(rng.choice(FAMILIES), rng.choice([1, 3]))
    return [(name, "<f4", list(a.shape), a.tobytes()) for name, a in arrays.items()]


def spoil(found: list[Entry], rng: random.Random) -> list[Entry]:
    """Changes a name, a shape, a type or the values of one array, or drops or doubles it."""
    found = list(found)
    i = rng.randrange(len(found))
    name, dtype, shape, values = found[i]
    kind = rng.choice(
        ["name", "drop", "twice", "axis", "shape", "dtype", "values", "stack", "swap"]
    )
    if kind == "drop":
        del found[i]
        return found
    if kind == "twice":
        return [*found, found[i]]
    if kind == "name":
        name = rng.choice([rng.choice(NAMES), rng.choice(found)[0], name + rng.choice(NAMES)])
    elif kind == "axis" and shape:
        shape = list(shape)
        shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    elif kind == "shape":
        shape = [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 2, 3, 5, 70]))]
    elif kind == "dtype":
        dtype = rng.choice(["<f8", ">f4", "<f2", "<i4", "<c8", "|O", "<U1", "|V4", "M8[s]", "|V2"])
    elif kind == "values":
        values = values[: rng.randrange(len(values) + 1)] + bytes(rng.choice([0, 0, 1, 4, 4096]))
    elif kind == "stack":
        name, shape, values = "Transformer/encoderblock/x", [rng.choice(SIZES), 0], b""
    elif kind == "swap":  # A consistent array of another shape.
        shape = [rng.choice([1, 2, 3, 16]) for _ in range(rng.choice([1, 2, 3, 4]))]
        values = bytes(4 * int(np.prod(shape)))
    found[i] = name, dtype, shape, values
    return found


def write_npz(path: Path, found: list[Entry], method: int = zipfile.ZIP_STORED) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # Of names that are there twice.
        for name, dtype, shape, values in found:
            text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {tuple(shape)}, }}\n"
            header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
            # A zip archive has room for so much, and the module for no names that begin with \0.
            member = f"{name[:60_000]}.npy".replace("\x00", "")
            archive.writestr(member, header + values)


def write_safetensors(path: Path, found: list[Entry]) -> None:
    types = {"<f4": "F32", "<f8": "F64", "<f2": "F16", "<i4": "I32", "|V2": "BF16"}
    lines, position = [], 0
    for name, dtype, shape, values in found:
        entry = {"dtype": types.get(dtype, dtype), "shape": shape}
        entry["data_offsets"] = [position, position + len(values)]
        lines.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        position += len(values)
    header = f"{{{','.join(lines)}}}".encode()
    path.write_bytes(
        struct.pack("<Q", len(header)) + header + b"".join(values for *_, values in found)
    )


def bad_names_and_shapes(path: Path, rng: random.Random) -> None:
    found = entries(rng)
    for _ in range(rng.choice([1, 1, 2, 5])):
        found = spoil(found, rng)
    kind = rng.choice(["stored", "packed", "safetensors"])
    if kind == "safetensors":
        write_safetensors(path, found)
    else:
        write_npz(path, found, zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)


def good_file(path: Path, rng: random.Random) -> bytearray:
    {
        "stored": lambda: write_npz(path, entries(rng)),
        "packed": lambda: write_npz(path, entries(rng), zipfile.ZIP_DEFLATED),
        "safetensors": lambda: write_safetensors(path, entries(rng)),
    }[rng.choice(["stored", "packed", "safetensors"])]()
    return bytearray(path.read_bytes())


def bad_bytes(path: Path, rng: random.Random) -> None:
    """Bytes at the start and at the end, where the headers are, and anywhere."""
    content = good_file(path, rng)
    for _ in range(rng.choice([1, 2, 8, 64])):
        near = rng.choice([200, 4000, len(content)])
        place = rng.choice([rng.randrange(near), -1 - rng.randrange(near)]) % len(content)
        content[place] = rng.choice([0, 1, 0x7F, 0xFF, rng.randrange(256)])
    path.write_bytes(content)


def bad_lengths(path: Path, rng: random.Random) -> None:
    """Cut short, cut in the middle, or longer than it should be."""
    content = good_file(path, rng)
    first, last = sorted(rng.randrange(len(content)) for _ in range(2))
    path.write_bytes(
        rng.choice(
            [
                content[:first],
                content[last:],
                content[:first] + content[last:],
                content[:first] + content[first:last] * 2 + content[last:],
                content + bytes(rng.choice([1, 100, 100_000])),
            ]
        )
    )


def bad_json(path: Path, rng: random.Random) -> None:
    """A header of which one piece of text is another."""
    write_safetensors(path, entries(rng))
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode()
    old = rng.choice(["16", "[", "]", "{", "}", ",", ":", '"F32"', '"shape"', '"', "0"])
    more = ["-1", "1e9", "1e999", "null", "NaN", "true", '"x"', "[[]]", "9" * 5000, "[" * 9000, ""]
    header = header.replace(old, rng.choice(more), rng.choice([1, 2, -1]))
    claimed = rng.choice([len(header.encode())] * 4 + [0, 1, 2**40, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", claimed) + header.encode() + content[8 + length :])


@pytest.mark.parametrize("part", range(10))
def test_a_bad_file_is_one_clear_error_or_still_good(part, tmp_path):
    makers: list[Callable] = [bad_names_and_shapes, bad_names_and_shapes, bad_bytes, bad_lengths]
    makers.append(bad_json)
    refused = 0
    for case in range(part * CASES // 10, (part + 1) * CASES // 10):
        rng = random.Random(case)
        path = tmp_path / f"case-{case}"
        makers[case % len(makers)](path, rng)
        tracemalloc.start()
        start = time.monotonic()
        try:
            load_weights(path)
        except UserError as error:
            refused += 1
            message = str(error)
            assert path.name in message
            assert message.isprintable()
            assert len(message) < MESSAGE, case
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY, case
        assert time.monotonic() - start < SECONDS, case
        path.unlink()
    assert refused > 0.7 * CASES / 10


def test_the_unspoilt_files_are_good(tmp_path):
    for write in (write_npz, write_safetensors):
        found = [(n, "<f4", list(a.shape), a.tobytes()) for n, a in published.arrays("ViT").items()]
        write(tmp_path / "good", found)
        assert published.same(load_weights(tmp_path / "good")[0], published.arrays("ViT"))
