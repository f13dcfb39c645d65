"""One door to every kind of file, whatever its name."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from tests import published
from vit_jax.checkpoints import ENDINGS, load_weights, open_arrays, to_tree, write_arrays
from vit_jax.checkpoints.formats import split_tower
from vit_jax.errors import UserError

ARRAYS = {
    "b/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b/half": np.array([1.5, -2, 3e38], ml_dtypes.bfloat16),
    "a/bias": np.array([0.1, -np.inf, np.nan], np.float16),
    "c/deep/er": np.array([[1e300]]),
}


def read(path) -> dict[str, np.ndarray]:
    with open_arrays(path) as arrays:
        return {key: np.asarray(array) for key, array in arrays.items()}


def refuse(path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


@pytest.fixture(params=ENDINGS)
def written(request, tmp_path):
    write_arrays(tmp_path / f"w{request.param}", ARRAYS)
    return tmp_path / f"w{request.param}"


# All kinds.


def test_arrays_come_back_bit_for_bit(written):
    assert published.same(read(written), ARRAYS)


def test_the_kind_is_seen_from_the_content(written):
    other = written.rename(written.parent / "weights.bin")

    assert published.same(read(other), ARRAYS)


def test_shapes_are_known_before_anything_is_read(written):
    with open_arrays(written) as arrays:
        for key, array in ARRAYS.items():
            assert arrays[key].shape == array.shape
            assert arrays[key].dtype == array.dtype
            assert arrays[key].nbytes == array.nbytes


def test_equal_arrays_give_equal_files(written, tmp_path):
    if written.is_dir():
        pytest.skip("Orbax notes the time")
    write_arrays(tmp_path / f"again{written.suffix}", ARRAYS)

    assert (tmp_path / f"again{written.suffix}").read_bytes() == written.read_bytes()


def test_what_was_there_is_replaced_and_nothing_else_is_left(written):
    write_arrays(written, {"x": np.ones(3)})

    assert published.same(read(written), {"x": np.ones(3)})
    assert list(written.parent.iterdir()) == [written]


def test_another_ending_is_refused(tmp_path):
    for name in ("weights.pt", "weights", "ViT-B_16.npz.txt"):
        with pytest.raises(UserError, match=r"ends in .npz or .safetensors or .orbax"):
            write_arrays(tmp_path / name, ARRAYS)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_that_is_not_there_is_named(ending, tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*absent: make it first"):
        write_arrays(tmp_path / "absent" / f"w{ending}", ARRAYS)


def test_what_holds_no_weights_is_refused(tmp_path):
    refuse(tmp_path / "absent", "no such file")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "a folder, but none that Orbax wrote")
    for content, found in [
        (b"", "an empty file"),
        (b"<!DOCTYPE html>", "starts with b'<!DOCTYPE'"),
    ]:
        (tmp_path / "other").write_bytes(content)
        refuse(tmp_path / "other", f"holds no weights: .* found .*{found}")


def test_a_tower_is_named_behind_the_file(tmp_path):
    assert split_tower("siglip.npz:img") == ("siglip.npz", "img")
    assert split_tower("gs://big_vision/siglip.npz:img") == ("gs://big_vision/siglip.npz", "img")
    assert split_tower("https://host/w.npz") == ("https://host/w.npz", None)
    assert split_tower(tmp_path) == (tmp_path, None)
    (tmp_path / "w.npz:img").touch()
    assert split_tower(tmp_path / "w.npz:img") == (tmp_path / "w.npz:img", None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
def test_no_value_is_read_before_the_arrays_are_known_to_fit(tmp_path):
    """Half a megabyte that claims to be 512 costs nothing."""
    bomb = np.broadcast_to(np.float32(0), ((1 << 27) - 100_000,))
    arrays = published.arrays("ViT") | {"bomb": bomb}
    np.savez_compressed(tmp_path / "w.npz", **arrays)
    code = (
        "import sys; from vit_jax.checkpoints import load_weights\n"
        "try: load_weights(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "w.npz"], check=True, capture_output=True, text=True
    ).stdout.splitlines()

    assert "unexpected (1): bomb" in output[0]
    assert int(output[1]) < 500_000  # KiB, with all the libraries.


# Safetensors, compared with the format's own library.


@settings(max_examples=60, deadline=None)
@given(
    arrays=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st_np.arrays(
            st.sampled_from(["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "|u1", "?"]),
            st_np.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=5,
    )
)
def test_the_formats_own_library_reads_and_writes_the_same(tmp_path_factory, arrays):
    ours, theirs = (tmp_path_factory.getbasetemp() / f"{n}.safetensors" for n in ("ours", "theirs"))
    write_arrays(ours, arrays)
    safetensors.numpy.save_file(arrays, theirs, metadata={"format": "np"})

    assert published.same(safetensors.numpy.load_file(ours), arrays)
    assert published.same(read(theirs), arrays)


def test_bfloat16_is_that_of_the_format(tmp_path):
    path = tmp_path / "b.safetensors"
    write_arrays(path, ARRAYS)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    del header["__metadata__"]

    assert {key: entry["dtype"] for key, entry in header.items()} == {
        "b/kernel": "F32",
        "b/half": "BF16",
        "a/bias": "F16",
        "c/deep/er": "F64",
    }
    assert published.same(
        {"h": safetensors.numpy.load_file(path)["b/half"]}, {"h": ARRAYS["b/half"]}
    )


def test_other_byte_orders_keep_their_values(tmp_path):
    write_arrays(tmp_path / "w.safetensors", {"x": np.array([1, 2.5], ">f4")})

    assert published.same(read(tmp_path / "w.safetensors"), {"x": np.array([1, 2.5], "<f4")})


def test_types_that_the_format_has_not_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'x' is of type complex64, which .safetensors files"):
        write_arrays(tmp_path / "w.safetensors", {"x": np.zeros(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "invalid JSON"),
        ("{} {}", "invalid JSON"),
        ('{"\xff": 1}'.encode("latin1"), "invalid UTF-8"),
        ("{" * 10, "invalid JSON"),
        ('{"x":' * 100_000, "recursion limit"),
        ('{"x": 1}', "invalid JSON"),
        ({"x": ENTRY | {"shape": [3]}}, "invalid shape"),
        ({"x": ENTRY | {"shape": [-2]}}, "invalid value: integer `-2`"),
        ({"x": ENTRY | {"shape": [2.0]}}, "invalid type"),
        ({"x": ENTRY | {"shape": [True, 2]}}, "invalid type"),
        ({"x": ENTRY | {"shape": 2}}, "invalid type"),
        ({"x": ENTRY | {"shape": [1] * 99 + [2]}}, "'x' can't be read .*found 100"),
        ({"x": ENTRY | {"data_offsets": [8, 0]}}, "invalid offset for tensor `x`"),
        ({"x": ENTRY | {"data_offsets": [0, 8, 8]}}, "invalid length 3"),
        ({"x": ENTRY | {"data_offsets": [4, 12]}}, "invalid offset for tensor `x`"),
        ({"x": ENTRY, "y": ENTRY}, "invalid offset for tensor"),
        ({"x": ENTRY | {"shape": [1], "data_offsets": [0, 4]}}, "not fully covered"),
        ({"x": ENTRY | {"shape": [1 << 60], "data_offsets": [0, 1 << 62]}}, "overflow"),
        ({"x": ENTRY | {"shape": [1 << 50], "data_offsets": [0, 1 << 52]}}, "not fully covered"),
        ({"x": ENTRY | {"dtype": "C99"}}, "unknown variant `C99`"),
        ({"x": ENTRY | {"dtype": "C64", "shape": [1]}}, "of type C64, known are F64, F32"),
        ({"x": ENTRY | {"dtype": "F8_E4M3", "shape": [8]}}, "of type F8_E4M3, known are F64"),
        ({"x": ENTRY | {"dtype": ["F32"]}}, "invalid type"),
        ('{"x": {"shape": [' + "9" * 5000 + "]}}", "number out of range"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(header, message, tmp_path):
    text = json.dumps(header) if isinstance(header, dict) else header
    data = text if isinstance(text, bytes) else text.encode()
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(8))

    refuse(path, message)


def test_a_safetensors_file_cut_short_anywhere_is_refused(tmp_path):
    write_arrays(tmp_path / "whole.safetensors", ARRAYS)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(9, len(whole), 5):
        (tmp_path / "cut").write_bytes(whole[:length])
        refuse(tmp_path / "cut", "cut short")


def test_a_file_that_shrinks_while_it_is_open_is_told(tmp_path):
    path = tmp_path / "w.safetensors"
    write_arrays(path, {"x": np.zeros(1 << 20)})
    with open_arrays(path) as arrays:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(UserError, match=r"'x' can't be read \(the file ends within it"):
            arrays["x"].read()


# Orbax.


def test_folders_of_other_programs_and_of_training_runs_are_read(tmp_path):
    import orbax.checkpoint as v0
    from orbax.checkpoint import v1

    expected = published.arrays("ViT gap")
    tree = to_tree(expected)
    state = {"params": jax.tree.map(jnp.asarray, tree), "opt_state": optax.adamw(1e-3).init(tree)}
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", tree)
    v0.PyTreeCheckpointer().save(tmp_path / "pytree", tree)
    v1.save(tmp_path / "state", state | {"step": 3})

    for name in ("standard", "pytree", "state"):
        assert published.same(load_weights(tmp_path / name)[0], expected), name


def test_damaged_orbax_folders_are_refused(tmp_path):
    write_arrays(tmp_path / "w.orbax", ARRAYS)
    paths = [p.relative_to(tmp_path / "w.orbax") for p in (tmp_path / "w.orbax").rglob("*")]
    refused = []
    for path in (p for p in paths if (tmp_path / "w.orbax" / p).is_file()):
        for content in (None, b"", b"{}", b"\x00" * 64):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "w.orbax", copy)
            (copy / path).unlink() if content is None else (copy / path).write_bytes(content)
            try:
                found = read(copy)
            except UserError as error:
                refused.append(str(error))
            else:  # Not every file matters.
                assert published.same(found, ARRAYS), path
            shutil.rmtree(copy)
    assert len(refused) > 10
    assert all("copy" in message and "\n" not in message for message in refused)


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "mine.orbax").mkdir()
    (tmp_path / "mine.orbax" / "diary.txt").write_text("dear diary")

    with pytest.raises(UserError, match="is there and no Orbax folder"):
        write_arrays(tmp_path / "mine.orbax", ARRAYS)

    assert (tmp_path / "mine.orbax" / "diary.txt").read_text() == "dear diary"


def test_a_folder_that_could_not_be_replaced_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "w.orbax"
    write_arrays(path, ARRAYS)
    rename = Path.rename

    def fails_for_the_new(self, target):
        if target == path and rename_count:
            rename_count.pop()
            raise OSError(28, "No space left on device")
        return rename(self, target)

    rename_count = [1]
    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(UserError, match=r"w.orbax can't be written .*No space left"):
        write_arrays(path, {"x": np.ones(3)})

    assert published.same(read(path), ARRAYS)
    assert list(tmp_path.iterdir()) == [path]
