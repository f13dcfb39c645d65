"""Folders as Orbax writes them, its two generations and their options: the same bits, with
bounded memory, and never other values than were written."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as v0
import pytest
from orbax.checkpoint import v1

from tests import published
from vit_jax.checkpoints import open_arrays, to_tree, write_arrays, write_npz
from vit_jax.errors import UserError

RNG = np.random.default_rng(0)
LARGE = RNG.normal(size=(700, 600)).astype(np.float32)  # Some of each kind are more than a MiB.
ARRAYS = {
    "large/kernel": LARGE,
    "large/turned": LARGE.T,
    "large/half": RNG.normal(size=(3, 500, 400)).astype(ml_dtypes.bfloat16),
    "large/mask": RNG.normal(size=1_500_000) > 0,
    "large/zeros": np.zeros((512, 1024), np.float32),
    "a.b/bias": np.arange(7, dtype=np.float16),
    "one": np.array(3.5),
}


def save_v1(path, tree, **options) -> None:
    context = v1.Context()
    for name, value in options.items():
        setattr(context.array.saving, name, value)
    if "chunk" in options:
        context.array.saving.storage_options.chunk_byte_size = options["chunk"]
    with context:
        v1.save(path, tree)


def save_standard(path, tree) -> None:
    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def save_manager(path, tree) -> None:
    with v0.CheckpointManager(path.parent / "run") as manager:
        manager.save(7, args=v0.args.StandardSave(tree))
        manager.wait_until_finished()
    (path.parent / "run" / "7").rename(path)


def save_several(path, tree) -> None:
    v1.save_checkpointables(path, {"a": {"other": np.ones(3)}, "state": tree})


SAVERS = {
    "v1": save_v1,
    "v1 plain": lambda path, tree: save_v1(path, tree, use_compression=False),
    "v1 files": lambda path, tree: save_v1(path, tree, use_ocdbt=False),
    "v1 files plain": lambda path, tree: save_v1(
        path, tree, use_ocdbt=False, use_compression=False
    ),
    "v1 chunks": lambda path, tree: save_v1(path, tree, chunk=1 << 18),
    "v1 zarr2": lambda path, tree: save_v1(path, tree, use_zarr3=False),
    "v1 several": save_several,
    "v0 standard": save_standard,
    "v0 manager": save_manager,
    "v0 files": lambda path, tree: v0.PyTreeCheckpointer(use_ocdbt=False).save(path, tree),
    "v0 zarr3": lambda path, tree: v0.PyTreeCheckpointer(use_zarr3=True).save(path, tree),
    "v0 jax": lambda path, tree: save_standard(
        path, jax.tree.map(jnp.asarray, {k: v for k, v in tree.items() if k != "one"})
    ),
}


def read(path) -> dict[str, np.ndarray]:
    with open_arrays(path) as arrays:
        return {name: array.read() for name, array in arrays.items()}


@pytest.mark.parametrize("saver", SAVERS)
def test_every_folder_that_orbax_writes_is_read_bit_for_bit(saver, tmp_path):
    SAVERS[saver](tmp_path / "w", to_tree(ARRAYS))

    found = read(tmp_path / "w")

    expected = {k: v for k, v in ARRAYS.items() if saver != "v0 jax" or k != "one"}
    assert published.same(found, expected)


def test_orbax_reads_what_is_written(tmp_path):
    write_arrays(tmp_path / "w.orbax", ARRAYS)

    tree = v1.load(tmp_path / "w.orbax")

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): np.asarray(v) for k, v in flat}
    assert published.same(named, ARRAYS)


@pytest.mark.parametrize("saver", ["v1 files", "v1 files plain", "v0 files"])
def test_a_damaged_chunk_is_refused(saver, tmp_path):
    """Its ends are where lengths and offsets are; values in between have no checksum."""
    path = tmp_path / "w"
    SAVERS[saver](path, to_tree({"large/kernel": LARGE, "b": np.ones(3)}))
    (chunk,) = (p for p in path.rglob("*") if p.is_file() and p.stat().st_size > 1 << 20)
    whole = chunk.read_bytes()
    spoilt = [b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", None]
    if saver != "v0 files":
        spoilt += [whole[:-20] + b"\x08" + whole[-19:], whole[:-12] + b"\xff" * 8 + whole[-4:]]
    for content in spoilt:
        chunk.unlink()
        if content is not None:
            chunk.write_bytes(content)
        with pytest.raises(UserError, match=r"can't be read .*damaged or incomplete") as caught:
            read(path)
        assert "\n" not in str(caught.value)
        chunk.touch()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
def test_converting_takes_less_than_three_times_the_largest_array(tmp_path):
    """From and to Orbax folders, its own and others'."""
    for name, classes in (("small", 10), ("large", 1_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        arrays = published.arrays("ViT")
        for key, shape in (("head/kernel", (16, classes)), ("head/bias", (classes,))):
            arrays[key] = RNG.random(shape, np.float32)
        write_npz(folder / "a.npz", arrays)
        save_v1(folder / "default", to_tree(arrays))
        save_standard(folder / "standard", to_tree(arrays))
    code = (
        "import re, sys, pathlib\n"
        "from vit_jax.checkpoints.convert import convert\n"
        "for size in ('small', 'large'):\n"
        "    folder = pathlib.Path(sys.argv[1], size)\n"
        "    convert(folder / 'a.npz', folder / 'own.orbax')\n"
        "    for source in ('own.orbax', 'default', 'standard'):\n"
        "        convert(folder / source, folder / f'{source}.npz')\n"
        "        convert(folder / source, folder / f'{source}-2.orbax')\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+)', status)[1])"
    )
    command = [sys.executable, "-c", code, tmp_path]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = (int(line) * 1024 for line in output.split())
    for source in ("own.orbax", "default", "standard"):
        assert published.same(read(folder / f"{source}.npz"), arrays)
        assert published.same(read(folder / f"{source}-2.orbax"), arrays)

    assert after - before < 3 * arrays["head/kernel"].nbytes
