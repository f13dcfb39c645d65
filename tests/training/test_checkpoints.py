"""Checkpoints: what was damaged is never taken for what was saved."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.checkpoints import open_arrays
from vit_jax.errors import UserError
from vit_jax.training import TrainState, make_optimizer, run
from vit_jax.training.checkpoints import Checkpoints, digest
from vit_jax.training.inputs import DevicePrefetcher


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state, and a folder with its checkpoints of steps 1 and 2."""
    from vit_jax.training import default_config

    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    weights = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)
    tx = make_optimizer(default_config(), 10)  # Its momentum is bfloat16.
    state = TrainState.create(params={"kernel": weights, "bias": weights[0]}, tx=tx)
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state.replace(step=jnp.int32(step)))
    checkpoints.close()
    return state, folder


def restore(folder, like):
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def equal(a, b):
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def flipped(content):
    content[len(content) // 2] ^= 4
    return content


DAMAGES = {
    "flipped": flipped,
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
}


SLOW = (pytest.mark.slow, pytest.mark.ci)


@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(d, marks=SLOW) for d in DAMAGES if d != "flipped")]
)
def test_whatever_file_is_damaged_the_state_restored_is_one_that_was_saved(damage, saved, tmp_path):
    state, whole = saved
    files = sorted(p for p in (whole / "2").rglob("*") if p.is_file())
    assert len(files) > 8
    largest = max(files, key=lambda p: p.stat().st_size)
    for i, file in enumerate(files):
        folder = shutil.copytree(whole, tmp_path / str(i))
        target = folder / file.relative_to(whole)
        target.write_bytes(DAMAGES[damage](bytearray(file.read_bytes())))
        restored, said = restore(folder, state)
        step = 1 if said else 2  # Not every file matters.
        assert equal(restored, state.replace(step=np.int32(step))), file
        assert (folder / "2.damaged").exists() == (step == 1)
        if file == largest:
            assert step == 1
            assert said.startswith(f"damaged in {folder}, and renamed to STEP.damaged: 2 (")
            assert said.endswith("; step 1 is used in their place")
            assert "\n" not in said


def test_the_guard_is_saved_under_the_names_of_the_first_runs(saved):
    with open_arrays(saved[1] / "2") as arrays:
        names = {name for name in arrays if name.startswith("guard/")}
    assert names == {f"guard/{name}" for name in ("usual", "good", "bad_steps", "in_a_row")}


def test_if_none_is_whole_that_is_told_and_nothing_is_changed(saved, tmp_path):
    state, whole = saved
    folder = shutil.copytree(whole, tmp_path / "checkpoints")
    for file in folder.rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(
        UserError, match=r"checkpoints/2 can't be used \(.*\), nor 1 before it: men"
    ):
        restore(folder, state)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_any_bit_and_any_two_places_exchanged_change_the_digest():
    chance = np.random.default_rng(0)
    for x in (
        chance.standard_normal((5, 7)).astype(np.float32),
        jnp.asarray(chance.standard_normal(11), jnp.bfloat16),
        np.int32(7),
    ):
        x = np.asarray(x)
        (before,) = digest([x])
        for bit in range(x.nbytes * 8):
            changed = np.frombuffer(x.tobytes(), np.uint8).copy()
            changed[bit // 8] ^= 1 << bit % 8
            assert digest([changed.view(x.dtype).reshape(x.shape)])[0] != before
        for i, j in chance.integers(x.size, size=(50, 2)):
            swapped = x.ravel().copy()
            swapped[[i, j]] = swapped[[j, i]]
            assert (digest([swapped.reshape(x.shape)])[0] == before) == (i == j)
    zeros = np.zeros((40, 40), np.float32)
    assert digest([zeros])[0] != digest([zeros + 1])[0]


@pytest.mark.slow
@pytest.mark.ci
def test_jumps_of_the_clock_change_nothing(tiny, tmp_path, outcome, whole, monkeypatch):
    import time

    chance, now, offset = np.random.default_rng(0), time.time, 0.0
    save, take = Checkpoints.save, DevicePrefetcher.__next__

    def jump():  # By decades.
        nonlocal offset
        offset = chance.uniform(-1e9, 1e9)

    def save_and_jump(self, step, state):
        save(self, step, state)
        for _ in range(20):
            time.sleep(0.01)
            jump()

    def take_later_or_earlier(self):
        jump()
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + offset)
        patch.setattr(time, "time_ns", lambda: int(1e9 * (now() + offset)))
        patch.setattr(Checkpoints, "save", save_and_jump)
        patch.setattr(DevicePrefetcher, "__next__", take_later_or_earlier)
        assert run(tiny(), tmp_path).finished
    assert outcome(tmp_path) == outcome(whole)
