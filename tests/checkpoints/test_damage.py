"""What was damaged is never loaded as what it isn't: any flipped bit, any link, any NaN."""

from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1

from tests import published
from vit_jax.checkpoints import (
    load_weights,
    nonfinite,
    open_arrays,
    save_weights,
    to_tree,
    write_arrays,
)
from vit_jax.checkpoints.digests import crc32c
from vit_jax.errors import UserError
from vit_jax.training import TrainState, default_config, make_optimizer
from vit_jax.training.checkpoints import Checkpoints

ARRAYS = published.arrays("ViT")


def flips(path: Path, count: int, seed: int = 0):
    """Damages a file or a folder of files by one bit, mends it, and goes on with another."""
    files = sorted(f for f in (path, *path.rglob("*")) if f.is_file() and f.stat().st_size)
    chance = np.random.default_rng(seed)
    for file in files:
        whole = file.read_bytes()
        for place in chance.choice(len(whole), min(count, len(whole)), replace=False):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << chance.integers(8)
            file.write_bytes(damaged)
            yield f"{file}: byte {place}"
        file.write_bytes(whole)


def check(path: Path, count: int, arrays=ARRAYS) -> int:
    """How many flips were refused; the others must have changed nothing."""
    refused = 0
    for where in flips(path, count):
        try:
            found, _ = load_weights(path, image_size=(32, 32))
        except UserError:
            refused += 1
        else:
            assert published.same(found, arrays), where
    assert published.same(load_weights(path)[0], arrays)
    return refused


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".orbax"])
def test_a_flipped_bit_is_refused_or_changes_no_value(ending, tmp_path):
    path = tmp_path / f"w{ending}"
    write_arrays(path, ARRAYS)

    assert check(path, {".orbax": 6}.get(ending, 40)) > 15


def test_every_flipped_bit_among_the_values_of_an_orbax_folder_is_refused(tmp_path):
    path = tmp_path / "w.orbax"
    write_arrays(path, ARRAYS)
    value = ARRAYS["embedding/kernel"].tobytes()
    # Which of the files has it depends on when TensorStore wrote which array.
    files = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    file, whole = next((f, content) for f, content in files.items() if value in content)
    start = whole.index(value)
    for place in np.random.default_rng(0).integers(len(value), size=12):
        damaged = bytearray(whole)
        damaged[start + place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w\.orbax can't be read \(.*damaged or incomplete"):
            load_weights(path)


@pytest.mark.slow
@pytest.mark.ci
def test_a_flipped_bit_in_a_checkpoint_of_a_run_is_refused_or_changes_no_value(tmp_path):
    state = TrainState.create(
        params=to_tree(ARRAYS), tx=make_optimizer(default_config(), 10), ema=True
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, state)
    checkpoints.close()
    path = tmp_path / "checkpoints" / "1"

    assert check(path, 2) > 5

    refused = 0  # Whoever asks for the average gets it checked, too.
    for _ in flips(path / "state" / "d", 12):
        try:
            with open_arrays(path) as arrays:
                ema = {k[4:]: np.asarray(a) for k, a in arrays.items() if k.startswith("ema/")}
            assert published.same(ema, ARRAYS)
        except UserError:
            refused += 1
    assert refused > 3


def test_folders_of_others_have_no_checksums_and_are_loaded(tmp_path):
    v1.save(tmp_path / "theirs", to_tree(ARRAYS))
    trees = {"state": to_tree(ARRAYS), "digest": np.arange(3)}
    v1.save_checkpointables(tmp_path / "others", trees)  # That is no digest of ours.
    for name in ("theirs", "others"):
        assert published.same(load_weights(tmp_path / name)[0], ARRAYS)


def test_of_a_folder_of_several_trees_it_is_said_which_is_read(tmp_path, caplog):
    v1.save_checkpointables(
        tmp_path / "parts", {"ema": to_tree(ARRAYS), "params": {"x": np.ones(3)}}
    )

    load_weights(tmp_path / "parts")

    assert "parts: of its trees ema is read; left out: params" in caplog.text


def test_links_in_a_folder_are_refused(tmp_path):
    write_arrays(tmp_path / "w.orbax", ARRAYS)
    file = max(tmp_path.rglob("d/*"), key=lambda file: file.stat().st_size)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UserError, match=r"w\.orbax holds '.*', which is a link or no regular file"):
        load_weights(tmp_path / "w.orbax")

    (tmp_path / "link.orbax").symlink_to(tmp_path / "w.orbax")
    (tmp_path / "elsewhere").replace(file)
    assert published.same(load_weights(tmp_path / "link.orbax")[0], ARRAYS)


def test_pieces_that_claim_to_be_larger_than_the_whole_are_refused(tmp_path):
    context = v1.Context()
    context.array.saving.use_ocdbt = False
    with context:
        v1.save(tmp_path / "files", to_tree(ARRAYS))
    (file,) = tmp_path.rglob("embedding.kernel/zarr.json")
    text = file.read_text()
    file.write_text(text.replace('"chunk_shape":[8,8,3,16]', '"chunk_shape":[80000,8000,300,1600]'))
    assert file.read_text() != text

    with pytest.raises(UserError, match=r"files can't be read \(embedding/kernel is .* in 3"):
        load_weights(tmp_path / "files")


def test_checksums_are_of_type_shape_and_values():
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = {crc32c(x) for x in (a, a.reshape(4, 3), a.view(np.int32), a + 1, a.T)}
    assert len(found) == 5
    assert crc32c(a) == crc32c(a.astype(">f4")) == crc32c(np.asfortranarray(a))
    assert crc32c(np.zeros((0, 3))) != crc32c(np.zeros((3, 0)))


# Values that are no numbers.


@pytest.fixture
def broken():
    arrays = {k: a.copy() for k, a in ARRAYS.items()}
    arrays["head/bias"][1:3] = np.nan, np.inf
    arrays["embedding/bias"][:] = -np.inf
    return arrays


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".orbax"])
def test_nan_and_infinity_are_refused_by_the_names_of_their_arrays(ending, broken, tmp_path):
    path = tmp_path / f"w{ending}"
    write_arrays(path, broken)

    message = (
        r"w\..* holds weights that are no numbers, NaN or infinite \(2\): embedding/bias 16 of 16,"
        r" head/bias 2 of 5: the run .*load\(\.\.\., allow_nonfinite=True\)"
    )
    with pytest.raises(UserError, match=message):
        load_weights(path)

    assert published.same(load_weights(path, allow_nonfinite=True)[0], broken)


def test_numbers_that_are_too_large_for_float32_are_refused(tmp_path):
    arrays = {k: a.astype(np.float64) for k, a in ARRAYS.items()}
    arrays["head/bias"][0] = 1e300
    write_arrays(tmp_path / "w.npz", arrays)

    with pytest.raises(UserError, match=r"NaN or infinite \(1\): head/bias 1 of 5"):
        load_weights(tmp_path / "w.npz")


def test_writing_them_is_said(broken, tmp_path, caplog):
    save_weights(tmp_path / "w.npz", to_tree(broken))

    assert "w.npz holds weights that are no numbers, NaN or infinite (2): embedding/" in caplog.text
    assert nonfinite({"x": jax.numpy.ones(3)}) == []
