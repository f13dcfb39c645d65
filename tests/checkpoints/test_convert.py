"""The same weights as another kind of file: bit for bit, one array at a time, never half."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests import published
from vit_jax.checkpoints import ENDINGS, STYLES, open_arrays, to_style, write_arrays
from vit_jax.checkpoints.convert import convert
from vit_jax.errors import UserError

NOTES = {"image_size": [32, 32], "labels": ["a", "é"]}


def read(path) -> dict[str, np.ndarray]:
    with open_arrays(path) as arrays:
        return {key: np.asarray(array) for key, array in arrays.items()}


@pytest.fixture
def source(tmp_path):
    write_arrays(tmp_path / "a.npz", published.arrays("ViT"))
    return tmp_path / "a.npz"


@pytest.mark.parametrize("first", ENDINGS)
@pytest.mark.parametrize("second", ENDINGS)
def test_any_two_kinds_lead_there_and_back(first, second, tmp_path):
    arrays = {k: a.astype(ml_dtypes.bfloat16) for k, a in published.arrays("hybrid").items()}
    arrays["head/bias"] = arrays["head/bias"].astype(np.float32)
    write_arrays(tmp_path / f"a{first}", arrays)

    convert(tmp_path / f"a{first}", tmp_path / f"b{second}", style="2020")
    assert published.same(read(tmp_path / f"b{second}"), to_style(arrays, "2020"))

    convert(tmp_path / f"b{second}", tmp_path / f"c{first}")
    assert published.same(read(tmp_path / f"c{first}"), arrays)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", published.FAMILIES)
def test_every_family_is_written_in_every_style(family, style, tmp_path):
    arrays = published.arrays(family)
    write_arrays(tmp_path / "a.safetensors", arrays)

    done = convert(tmp_path / "a.safetensors", tmp_path / "b.npz", style=style)

    assert published.same(read(tmp_path / "b.npz"), to_style(arrays, style))
    assert done.files == (tmp_path / "b.npz",)
    assert done.arrays == len(arrays)
    assert done.spec.num_parameters == published.count(published.shapes(family))


def test_only_the_network_of_a_larger_file_is_taken(tmp_path):
    stored, expected = published.siglip(published.arrays("ViT MAP"))
    np.savez_compressed(tmp_path / "a.npz", **stored)

    convert(tmp_path / "a.npz", tmp_path / "b.npz")

    assert published.same(read(tmp_path / "b.npz"), expected)


def test_a_tower_is_taken_by_its_name(tmp_path):
    lit = published.arrays("LiT")
    write_arrays(tmp_path / "lit.npz", lit)
    (tmp_path / "lit.json").write_text(json.dumps(NOTES | {"classifier": "lit"}))

    convert(f"{tmp_path}/lit.npz:img", tmp_path / "b.npz")

    assert not (tmp_path / "b.json").exists()  # What is noted of the bundle is not of the tower.
    assert set(read(tmp_path / "b.npz")) == {k[4:] for k in lit if k.startswith("img/")}


def test_a_tower_is_not_put_beside_the_notes_of_the_whole(tmp_path):
    write_arrays(tmp_path / "w.npz", published.arrays("LiT"))
    (tmp_path / "w.json").write_text(json.dumps(NOTES | {"classifier": "lit"}))

    with pytest.raises(UserError, match=r"would share .*w\.json, which is about all of"):
        convert(f"{tmp_path}/w.npz:img", tmp_path / "w.safetensors", force=True)

    assert not (tmp_path / "w.safetensors").exists()


def test_numbers_are_rounded_to_the_nearest_if_asked(source, tmp_path):
    convert(source, tmp_path / "half.npz", dtype="bfloat16")
    convert(tmp_path / "half.npz", tmp_path / "whole.npz", dtype="float32")

    found = read(tmp_path / "whole.npz")
    for key, array in read(source).items():
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], array, rtol=2**-8)
    assert (tmp_path / "half.npz").stat().st_size < 0.8 * source.stat().st_size


def test_notes_come_along(source, tmp_path):
    source.with_suffix(".json").write_text(json.dumps(NOTES))

    done = convert(source, tmp_path / "b.safetensors")

    assert json.loads((tmp_path / "b.json").read_text()) == NOTES
    assert done.files == (tmp_path / "b.safetensors", tmp_path / "b.json")


def test_the_index_of_several_files_is_no_note(tmp_path):
    arrays = published.arrays("ViT")
    write_arrays(tmp_path / "model-1.safetensors", arrays)
    index = tmp_path / "model.safetensors.index.json"
    places = json.dumps({"weight_map": dict.fromkeys(arrays, "model-1.safetensors")})
    index.write_text(places)
    assert convert(index, tmp_path / "mine.npz").files == (tmp_path / "mine.npz",)
    assert not (tmp_path / "mine.json").exists()
    with pytest.raises(UserError, match=r"would replace .*index\.json: choose another name"):
        convert(index, tmp_path / "model.safetensors.index.npz", force=True)
    assert index.read_text() == places


def test_the_vocabulary_of_a_bundle_comes_along(tmp_path):
    write_arrays(tmp_path / "lit.npz", published.arrays("LiT"))
    (tmp_path / "lit.model").write_bytes(b"vocabulary")

    convert(tmp_path / "lit.npz", tmp_path / "b.orbax")

    assert (tmp_path / "b.model").read_bytes() == b"vocabulary"


def test_notes_tell_the_grid_that_the_arrays_leave_open(tmp_path, caplog):
    arrays = published.arrays("ViT gap")
    arrays[published.POSITIONS] = arrays[published.POSITIONS][:, :15]
    write_arrays(tmp_path / "a.npz", arrays)
    notes = NOTES | {"image_size": [40, 24], "classifier": "gap"}
    (tmp_path / "a.json").write_text(json.dumps(notes))

    with caplog.at_level(logging.WARNING):
        assert convert(tmp_path / "a.npz", tmp_path / "b.npz").spec.image_size == (40, 24)
    assert not caplog.records


@pytest.mark.parametrize("notes", ["{", "[" * 100_000, '{"image_size": [Infinity, 8]}', "{}"])
def test_damaged_notes_are_not_passed_on(notes, source, tmp_path):
    source.with_suffix(".json").write_text(notes)

    with pytest.raises(UserError, match=r"a\.json is damaged \(.*mend it, or remove it"):
        convert(source, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()


def test_values_that_are_no_numbers_are_passed_on_and_said(tmp_path, caplog):
    arrays = published.arrays("ViT")
    arrays["head/bias"][1] = np.nan
    arrays["head/kernel"][0, 0] = 3.4e38  # No bfloat16.
    write_arrays(tmp_path / "a.npz", arrays)

    convert(tmp_path / "a.npz", tmp_path / "b.npz", dtype="bfloat16")

    assert "b.npz holds weights that are no numbers, NaN or infinite (2): head/bias 1 of 5" in (
        caplog.text
    )
    assert np.isnan(read(tmp_path / "b.npz")["head/bias"][1])


@pytest.mark.parametrize("there", ["b.npz", "b.json"])
def test_nothing_is_replaced_unless_told(there, source, tmp_path):
    (tmp_path / there).write_bytes(b"mine")

    with pytest.raises(UserError, match=f"{there} is there already: .*--force"):
        convert(source, tmp_path / "b.npz")
    assert (tmp_path / there).read_bytes() == b"mine"

    convert(source, tmp_path / "b.npz", force=True)
    assert published.same(read(tmp_path / "b.npz"), read(source))
    # Notes of other weights would be wrong.
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_may_be_replaced_by_itself(ending, tmp_path):
    arrays = published.arrays("Mixer")
    path = tmp_path / f"a{ending}"
    write_arrays(path, arrays)
    path.with_suffix(".json").write_text(json.dumps(NOTES))

    convert(path, path, dtype="bfloat16", force=True)

    assert read(path)["head/bias"].dtype == ml_dtypes.bfloat16
    assert json.loads(path.with_suffix(".json").read_text()) == NOTES


def test_what_is_not_understood_is_refused_and_nothing_written(source, tmp_path):
    arrays = published.arrays("ViT")
    del arrays["Transformer/encoder_norm/bias"]
    write_arrays(tmp_path / "bad.npz", arrays)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(UserError, match=r"bad.npz does not fit .* missing \(1\): Transformer/enc"):
        convert(tmp_path / "bad.npz", tmp_path / "b.npz")
    for kwargs, message in [
        ({"style": "keras"}, "unknown key style 'keras'"),
        ({"dtype": "int8"}, "unknown dtype 'int8', expected one of float32, bfloat16"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "b.npz", **kwargs)
    with pytest.raises(UserError, match=r"expected a name that ends in .npz or"):
        convert(source, tmp_path / "b.pt")
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "absent.npz", tmp_path / "b.npz")

    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_value_leaves_no_half_file(source, tmp_path):
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    source.write_bytes(content)

    with pytest.raises(UserError, match="can't be read"):
        convert(source, tmp_path / "b.safetensors")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize("kind", ["npz", "compressed", "scanned"])
def test_one_array_is_in_memory_at_a_time(kind, tmp_path):
    """Eight arrays of 16 MiB each, or one stack of them, take twice the largest and a little."""
    blocks, width, mlp = 8, 64, 65_536
    shapes = {
        "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel": (width, mlp),
        "Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias": (mlp,),
        "Transformer/encoderblock_0/MlpBlock_0/Dense_1/kernel": (mlp, width),
    }
    arrays = {}
    for key, shape in published.shapes("ViT").items():
        if "encoderblock_" not in key:
            arrays[key] = np.zeros([{16: width}.get(n, n) for n in shape], np.float32)
        elif "encoderblock_0" in key:
            shape = shapes.get(key) or [{16: width, 8: width // 2}.get(n, n) for n in shape]
            for i in range(blocks):
                arrays[key.replace("_0/", f"_{i}/", 1)] = np.zeros(shape, np.float32)
    arrays[published.POSITIONS] = np.zeros((1, 17, width), np.float32)
    largest = width * mlp * 4
    if kind == "scanned":
        first = "Transformer/encoderblock_0/"
        for key in [key for key in arrays if key.startswith(first)]:
            layers = [arrays.pop(key.replace("_0/", f"_{i}/", 1)) for i in range(blocks)]
            arrays[key.replace("_0/", "/", 1)] = np.stack(layers)
        largest *= blocks
    if kind == "compressed":
        np.savez_compressed(tmp_path / "a.npz", **arrays)
    else:
        write_arrays(tmp_path / "a.npz", arrays)
    (source,) = tmp_path.iterdir()
    # What the libraries take, the tracing of the network included, is had before it begins.
    code = (
        "import re, sys, pathlib\n"
        "from vit_jax.checkpoints.convert import convert\n"
        "source, folder = sys.argv[1], pathlib.Path(sys.argv[2])\n"
        "from vit_jax.checkpoints import open_arrays, read_spec, to_linen\n"
        "with open_arrays(source) as arrays: read_spec(to_linen(arrays))\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1])\n"
        "before = peak()\n"
        "convert(source, folder / 'b.npz')\n"
        "convert(source, folder / 'c.safetensors')\n"
        "print(peak() - before)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path], check=True, capture_output=True, text=True
    ).stdout

    constant = 8 << 20
    assert int(output) * 1024 < 2 * largest + constant
