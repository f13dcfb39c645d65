"""Reading strangers' files without harm, and writing files that are whole or not there."""

import io
import os
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from vit_jax.checkpoints import formats, read_npz, write_npz
from vit_jax.errors import UserError
from vit_jax.files import atomic_write

ARRAYS = {
    "a/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a/bias": np.zeros(0, np.float32),
    "scalar": np.float64(0.5),
}


@pytest.fixture
def good(tmp_path) -> Path:
    np.savez(tmp_path / "good.npz", **ARRAYS)
    return tmp_path / "good.npz"


def refuse(path: Path, message: str | None = None) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_npz(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def npy(header: str, body: bytes = b"", version: int = 1) -> bytes:
    """A .npy file with any header."""
    text = header.encode("latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + body


def write_zip(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


# Reading.


def test_arrays_come_back_as_they_were(good):
    arrays = read_npz(good)

    assert list(arrays) == list(ARRAYS)
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[key], array, strict=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@settings(max_examples=40, deadline=None)
@given(
    array=st_np.arrays(
        st.sampled_from(["<f4", ">f4", "<f2", "<f8", "|u1", ">i8", "?", "<U3", "M8[s]"]),
        st_np.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    fortran=st.booleans(),
)
def test_arrays_of_any_type_shape_and_order_come_back(tmp_path_factory, save, array, fortran):
    path = tmp_path_factory.getbasetemp() / f"any-{save.__name__}.npz"
    save(path, array=np.asfortranarray(array) if fortran and array.ndim else array)

    found = read_npz(path)["array"]

    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array, strict=True)


def test_a_file_of_numpys_second_version_is_read(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
    path = write_zip(tmp_path / "v2.npz", ("x.npy", npy(header, b"\0\0\x80?" * 2, version=2)))

    np.testing.assert_array_equal(read_npz(path)["x"], np.ones(2, np.float32), strict=True)


def test_bfloat16_comes_back_from_the_void_that_numpy_writes(tmp_path):
    values = np.array([[1.5, -2], [0, 3e38]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "b.npz", x=values)
    assert np.load(tmp_path / "b.npz")["x"].dtype == np.dtype("V2")

    np.testing.assert_array_equal(read_npz(tmp_path / "b.npz")["x"], values, strict=True)


# Refusing.


def test_what_is_no_npz_file_is_refused_with_what_was_found(tmp_path, good):
    refuse(tmp_path / "absent.npz", "no such file")
    refuse(tmp_path, "is a folder")
    refuse(good / "below.npz", "can't be read")
    for name, content, message in [
        ("empty.npz", b"", "an empty file"),
        ("text.npz", b"<!DOCTYPE html>\n<html>", "starts with b'<!DO"),
        ("array.npz", npy(""), "starts with"),
        ("none.npz", b"PK\5\6" + bytes(18), "starts with"),
    ]:
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, message)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read anything")
def test_a_file_without_permission_is_refused(good):
    good.chmod(0)
    refuse(good, "Permission denied")


def test_an_archive_of_something_else_is_named(tmp_path):
    refuse(
        write_zip(tmp_path / "model.npz", ("model/data.txt", b"\x80\x02")),
        "zip archive, but no .npz checkpoint: it holds 'model/data.txt'",
    )


def test_python_objects_are_never_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harmed"),))

    np.savez(tmp_path / "p.npz", fine=np.zeros(2), evil=np.array([Harmful()], object))

    refuse(tmp_path / "p.npz", r"'evil.npy' holds pickled Python objects.*never loaded")
    assert not (tmp_path / "harmed").exists()


def test_two_arrays_of_one_name_are_refused(tmp_path):
    data = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }")
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "twice.npz", ("x.npy", data), ("x.npy", data))

    refuse(path, "two arrays are named 'x'")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, save):
    save(tmp_path / "whole.npz", **ARRAYS)
    whole = (tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        refuse(cut)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_refused_or_changes_no_value(tmp_path, save):
    """Checksums guard the values; a damaged directory may list fewer arrays, not other ones."""
    save(tmp_path / "whole.npz", **ARRAYS)
    whole = (tmp_path / "whole.npz").read_bytes()
    changed = tmp_path / "changed.npz"
    refused = 0
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        changed.write_bytes(damaged)
        try:
            arrays = read_npz(changed)
        except UserError:
            refused += 1
        else:
            for key, found in arrays.items():
                np.testing.assert_array_equal(found, ARRAYS[key], strict=True)
    assert refused > len(whole) / 3 / 4


def test_a_wrong_checksum_is_refused(good):
    content = good.read_bytes()
    value = np.float32(7).tobytes()
    assert content.count(value) == 1
    good.write_bytes(content.replace(value, np.float32(8).tobytes()))

    refuse(good, "'a/kernel.npy' can't be read .Bad CRC-32")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 4), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '|V0', 'fortran_order': False, 'shape': (9,), }",
        "{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999), }",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (4,), }",
        "{'descr': '<f4', 'shape': (4,), }",
        "{[]: 1}",
        "{'descr': ",
        "(" * 5000,
        "__import__('os').abort()",
        "\n\n\n",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    path = write_zip(tmp_path / "lie.npz", ("x.npy", npy(header, bytes(16))))
    refuse(path, "'x.npy'")


@settings(max_examples=150, deadline=None)
@given(header=st.text(st.characters(max_codepoint=255), max_size=60), body=st.binary(max_size=20))
def test_any_header_at_all_is_refused(tmp_path_factory, header, body):
    path = tmp_path_factory.getbasetemp() / "header.npz"
    refuse(write_zip(path, ("x.npy", npy(header, body))))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_at_all_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.npz"
    path.write_bytes(b"PK\x03\x04" + data)
    refuse(path)


def test_an_encrypted_archive_is_refused(tmp_path):
    path = write_zip(tmp_path / "e.npz", ("x.npy", npy("{}")))
    content = bytearray(path.read_bytes())
    content[6] |= 1  # The flag in the member's own header
    content[content.index(b"PK\x01\x02") + 8] |= 1  # and in the directory.
    path.write_bytes(content)

    refuse(path, "encrypted")


def test_neither_header_nor_directory_can_claim_memory(tmp_path):
    """Half a terabyte is claimed consistently in both; a process of 2 GB of memory survives."""
    claimed = 1 << 39
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({claimed},), }}"
    data = npy(header, bytes(8))
    packed = zlib.compressobj(wbits=-15)
    stream = packed.compress(data) + packed.flush()
    size = len(npy(header)) + claimed
    extra = struct.pack("<HHQ", 1, 8, size)
    common = struct.pack("<HHHHIII", 0, 8, 0, 33, zlib.crc32(data), len(stream), 0xFFFFFFFF)
    local = b"PK\3\4" + struct.pack("<H", 45) + common + struct.pack("<HH", 5, len(extra))
    local += b"x.npy" + extra + stream
    central = b"PK\1\2" + struct.pack("<HH", 45, 45) + common
    central += struct.pack("<HHHHHII", 5, len(extra), 0, 0, 0, 0, 0) + b"x.npy" + extra
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    path = tmp_path / "huge.npz"
    path.write_bytes(local + central + end)
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[0].file_size == size

    code = (
        "import resource, sys; from vit_jax.checkpoints.formats import read_npz\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_npz(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "'x.npy' claims shape" in output[0]
    assert int(output[1]) < 50_000  # KiB


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_bound_are_refused(tmp_path, method):
    data = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000,), }", bytes(10**7))
    path = write_zip(tmp_path / "bomb.npz", ("x.npy", data), method=method)
    assert path.stat().st_size < 10_000

    tracemalloc.start()
    refuse(path, f"'x.npy' is packed by method {method}, expected stored or deflated")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_what_unpacks_to_many_times_its_size_is_refused(tmp_path, monkeypatch):
    """By all arrays together, so that many small ones don't hide it."""
    monkeypatch.setattr(formats, "_ALWAYS", 1 << 20)
    arrays = {str(i): np.zeros(1 << 16, np.float32) for i in range(8)}
    np.savez_compressed(tmp_path / "zeros.npz", **arrays)
    refuse(tmp_path / "zeros.npz", r"would unpack to 2,097,152, expected at most 20 times its size")

    write_npz(tmp_path / "plain.npz", arrays)
    assert len(read_npz(tmp_path / "plain.npz")) == 8


def test_a_header_can_not_claim_memory_either(tmp_path):
    """It may be 4 GB long, by its own word."""
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1,), }" + " " * (1 << 26) + "\n"
    path = write_zip(
        tmp_path / "h.npz", ("x.npy", npy(text, b"\0", 2)), method=zipfile.ZIP_DEFLATED
    )

    tracemalloc.start()
    refuse(path, r"'x.npy' can't be read .*array header")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    for name in ("pipe.npz", "device.npz"):
        refuse(tmp_path / name, "is no regular file")


# Writing.


def test_what_is_written_is_what_numpy_reads(tmp_path):
    write_npz(tmp_path / "w.npz", ARRAYS)

    with np.load(tmp_path / "w.npz", allow_pickle=False) as arrays:
        assert list(arrays) == list(ARRAYS)
        for key, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[key], array, strict=True)


def test_python_objects_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_npz(tmp_path / "w.npz", {"x": np.array([{}], object)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(good, error):
    content = good.read_bytes()

    def fail():
        with atomic_write(good) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()

    assert good.read_bytes() == content
    assert list(good.parent.iterdir()) == [good]


def test_a_full_disk_is_reported_and_leaves_the_old_file(good, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    content = good.read_bytes()
    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(UserError, match=r"good.npz can't be written \(No space left on device\)"):
        write_npz(good, ARRAYS)

    assert good.read_bytes() == content
    assert list(good.parent.iterdir()) == [good]


def test_the_old_file_stands_until_the_new_one_is_whole(good):
    content = good.read_bytes()

    with atomic_write(good) as file:
        file.write(b"new")
        file.flush()
        assert good.read_bytes() == content

    assert good.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_named(tmp_path, good):
    with pytest.raises(UserError, match=r"there is no folder .*absent: make it first"):
        write_npz(tmp_path / "absent" / "w.npz", ARRAYS)
    with pytest.raises(UserError, match=r"there is no folder .*good.npz"):
        write_npz(good / "w.npz", ARRAYS)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"folder.npz can't be written \(Is a directory\)"):
        write_npz(tmp_path / "folder.npz", ARRAYS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.npz", "good.npz"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        write_npz(tmp_path / "w.npz", ARRAYS)
    finally:
        os.umask(old)

    assert stat.S_IMODE((tmp_path / "w.npz").stat().st_mode) == mode


def test_a_long_name_is_written(tmp_path):
    path = tmp_path / ("é" * 125 + ".npz")
    write_npz(path, ARRAYS)
    assert list(read_npz(path)) == list(ARRAYS)


def test_a_file_object_is_as_good_as_any(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones(2))
    with atomic_write(tmp_path / "b.npz") as file:
        file.write(buffer.getvalue())
    np.testing.assert_array_equal(read_npz(tmp_path / "b.npz")["x"], np.ones(2))
