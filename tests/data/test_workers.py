"""Worker processes: chosen where they pay, light, and gone when they aren't needed, however."""

import contextlib
import errno
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections import deque
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data.test_batches import AUGMENTED, DIGITS, IDENTITY, assert_same, first, numbered
from vit_jax.data import (
    choose_readers,
    eval_batches,
    from_arrays,
    own_cores,
    parse,
    train_batches,
    workers,
)
from vit_jax.data.workers import BatchBuffers, anonymous_file
from vit_jax.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"batch_size": 8, "seed": 0}


def children(parent=None):
    """The processes that one has started, this one by default."""
    parent, found = parent or os.getpid(), set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if file.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.add(int(file.parent.name))
    return found


def alive(pids):
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


class started:
    """The processes that are started in a block."""

    def __enter__(self):
        self._before = children()
        return self

    def __exit__(self, *_):
        pass

    def __call__(self):
        return children() - self._before


def elsewhere(do):
    """A source whose images worker processes read as `do` says, and this process as zeros."""
    here = os.getpid()

    def read(key):
        value = None if os.getpid() == here else do(key)
        return np.full((2, 2, 1), 0 if value is None else value, np.uint8)

    return replace(numbered(64), read_key=read)


# Who reads.


def test_the_cores_are_those_that_this_process_was_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6, 7})
    monkeypatch.setattr(workers, "_QUOTA", "/nowhere")
    assert own_cores() == 4


@pytest.mark.parametrize(
    ("quota", "number"),
    [("max 100000", 8), ("350000 100000", 4), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_a_container_s_quota_counts(quota, number, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(workers, "_QUOTA", str(tmp_path / "cpu.max"))
    assert own_cores() == number


@pytest.mark.parametrize(
    ("cores", "workers", "threads", "expected"),
    [
        (1, -1, 0, "1 thread"),
        (2, -1, 0, "2 threads"),
        (3, -1, 0, "3 worker processes"),
        (96, -1, 0, "96 worker processes"),
        (96, -1, 4, "4 threads"),
        (96, 0, 0, "16 threads"),
        (2, 1, 4, "1 worker process"),
    ],
)
def test_a_process_a_core_reads_where_there_are_more_than_two(cores, workers, threads, expected):
    assert str(choose_readers(DIGITS, workers, threads, cores)) == expected


def test_what_cannot_be_given_to_processes_is_read_by_threads_and_the_reason_told():
    source, lock = numbered(4), threading.Lock()
    source = replace(source, read_key=lambda key: lock)
    assert str(choose_readers(source, cores=4)) == (
        "4 threads (numbered can't be given to other processes: cannot pickle '_thread.lock' "
        "object)"
    )
    with pytest.raises(UserError, match=r"numbered can't be given .* '_thread\.lock' object"):
        train_batches(source, IDENTITY, workers=2, **OPTIONS)


@pytest.fixture
def only_here(monkeypatch):
    """A source with a function of a module that no other process can import."""
    module = types.ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)
    module.np = np
    exec("def read(key): return np.full((2, 2, 1), key, np.uint8)", vars(module))
    return replace(numbered(64), read_key=module.read)


def no_processes(error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    return refuse


def test_where_processes_cannot_read_what_they_were_given_threads_do(only_here, caplog, capfd):
    expected = first(3, train_batches(only_here, IDENTITY, threads=2, **OPTIONS))
    chosen = choose_readers(only_here, cores=3)
    assert str(chosen) == "3 worker processes"
    with started() as own, caplog.at_level(logging.WARNING):
        assert_same(
            first(3, train_batches(only_here, IDENTITY, workers=chosen, **OPTIONS)), expected
        )
        assert not own()
    reason = "numbered can't be given to other processes: No module named 'only_here'"
    assert [record.message for record in caplog.records] == [f"Read by threads: {reason}"]
    with started() as own, pytest.raises(UserError) as error:
        next(train_batches(only_here, IDENTITY, workers=2, **OPTIONS))
    assert str(error.value) == f"{reason}; --config.workers=0 reads it by threads"
    assert not own()
    assert "Traceback" not in capfd.readouterr().err


def open_files() -> set[str]:
    """Those of this process, when what nobody refers to is gone, of other tests too."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EMFILE])
@pytest.mark.parametrize("at", [(subprocess, "Popen"), (os, "pipe"), (os, "memfd_create")])
def test_where_no_process_or_file_can_be_had_threads_read(at, error, monkeypatch, caplog):
    chosen = choose_readers(DIGITS, cores=3)
    expected = first(2, train_batches(DIGITS, IDENTITY, **OPTIONS))
    files = open_files()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(*at, no_processes(error))
        assert_same(first(2, train_batches(DIGITS, IDENTITY, workers=chosen, **OPTIONS)), expected)
        with pytest.raises(UserError, match=r"digits can't be given .*--config\.workers=0 reads"):
            next(train_batches(DIGITS, IDENTITY, workers=2, **OPTIONS))
    (record,) = caplog.records
    assert record.message.startswith("Read by threads: digits can't be given to other processes: ")
    assert os.strerror(error) in record.message
    assert not open_files() - files


def test_large_arrays_are_not_copied_unasked(monkeypatch):
    source = from_arrays(np.zeros((64, 8, 8, 3), np.uint8), np.arange(64) % 2)
    assert choose_readers(source, cores=4).workers == 4
    monkeypatch.setattr(workers, "_MOST_COPIED", 64 * 8 * 8 * 3)
    told = "4 threads (0.0 GB of images in memory aren't copied for processes unasked)"
    assert str(choose_readers(source, cores=4)) == told
    assert choose_readers(source, workers=3, cores=4).workers == 3


def test_a_memory_mapped_file_is_mapped_again_not_copied(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 9, 9), "u1"))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    monkeypatch.setattr(workers, "_MOST_COPIED", 20_000)
    expected = first(3, train_batches(from_arrays(images, range(64)), IDENTITY, **OPTIONS))
    assert choose_readers(from_arrays(images, range(64)), cores=4).workers == 4
    for part in (images, images[5:]):
        source = from_arrays(part, range(len(part)))
        expected = first(3, train_batches(source, IDENTITY, **OPTIONS))
        assert_same(first(3, train_batches(source, IDENTITY, workers=1, **OPTIONS)), expected)
    changed = np.load(tmp_path / "images.npy", mmap_mode="c")
    for part in (images[::2], changed):
        reason = choose_readers(from_arrays(part, range(len(part))), cores=4).reason
        assert "a part of a memory-mapped file that isn't contiguous, or not as on disk" in reason


def test_names_in_shared_memory_are_a_sequence():
    names = ["a", "", "ä\udcff", "d"]
    texts = workers._Texts(names)
    assert [*texts] == [texts[i] for i in range(4)] == names
    assert "d" in texts
    assert "e" not in texts
    for index in (-1, 4):
        with pytest.raises(IndexError):
            texts[index]


@pytest.mark.parametrize("options", [{"workers": -2}, {"threads": -1}])
def test_negative_numbers_are_refused(options):
    with pytest.raises(UserError, match="expected -1 or more and 0 or more"):
        choose_readers(DIGITS, **options)


def test_few_images_are_evaluated_by_threads_and_many_by_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    for count, expected in ((4090, 0), (4096, 3)):
        with started() as own:
            batches = eval_batches(numbered(count), IDENTITY, batch_size=8, workers=-1)
            next(batches)
            assert len(own()) == expected
            batches.close()


# What they do.


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_the_same_byte_for_byte_and_through_a_resume(workers):
    options = {"source": DIGITS, "preprocess": AUGMENTED, "batch_size": 50, "seed": 3}
    expected = first(6, train_batches(threads=1, **options))
    for start, prefetch in ((0, 1), (4, 3)):
        batches = train_batches(start_step=start, workers=workers, prefetch=prefetch, **options)
        assert_same(first(6 - start, batches), expected[start:])


@pytest.mark.parametrize("workers", [1, 3])
def test_evaluations_are_the_same(workers):
    options = {"batch_size": 7, "corrupt": "skip"}
    source = numbered(25, unreadable={0, 7, 24})
    assert_same(
        list(eval_batches(source, IDENTITY, workers=workers, **options)),
        list(eval_batches(source, IDENTITY, **options)),
    )


def test_several_fill_one_batch_together():
    def slow(key):
        time.sleep(0.01)
        return os.getpid() % 251

    with contextlib.closing(
        train_batches(elsewhere(slow), IDENTITY, batch_size=32, seed=0, workers=2)
    ) as batches:
        for _ in range(3):
            next(batches)
        assert len(np.unique(next(batches)["image"])) == 2


def test_an_unreadable_image_is_told_once_by_whichever_reads_it(caplog):
    source = numbered(10, unreadable={3, 4})
    with caplog.at_level(logging.WARNING):
        batches = train_batches(source, IDENTITY, workers=3, corrupt="skip", **OPTIONS)
        expected = train_batches(source, IDENTITY, threads=1, corrupt="skip", **OPTIONS)
        assert_same(first(8, batches), first(8, expected))
    messages = sorted({record.message for record in caplog.records})
    assert messages == ["Skipping image 3: damaged", "Skipping image 4: damaged"]
    assert len(caplog.records) == 4  # Of two iterators.


def test_they_import_neither_jax_nor_tensorflow_nor_grain():
    def tell(key):
        raise UserError(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))

    with pytest.raises(UserError) as told:
        next(train_batches(elsewhere(tell), IDENTITY, workers=1, **OPTIONS))
    loaded = set(str(told.value).split())
    assert {"cv2", "numpy", "vit_jax"} <= loaded
    assert not loaded & {"jax", "jaxlib", "flax", "tensorflow", "tensorflow_datasets"}
    assert not loaded & {"grain", "scipy", "orbax", "pytest"}


def test_the_accelerator_is_hidden_from_them(monkeypatch):
    def tell(key):
        import jax

        hidden = os.environ["CUDA_VISIBLE_DEVICES"], os.environ["JAX_PLATFORMS"]
        raise UserError(f"{hidden} {jax.default_backend()}")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"^\('-1', 'cpu'\) cpu$"):
        next(train_batches(elsewhere(tell), IDENTITY, workers=1, **OPTIONS))


def test_they_start_in_seconds():
    import grain  # noqa: F401 (this process's own imports don't count)

    begin = time.monotonic()
    first(1, train_batches(DIGITS, IDENTITY, workers=2, **OPTIONS))
    assert time.monotonic() - begin < 10  # Below 1 if the machine has nothing else to do.


def test_a_user_error_crosses_unchanged_and_at_the_batch_that_it_is_of():
    def fail(key):
        if key in (order[20], order[21]):
            raise UserError(f"image {key}: \\x1b 'odd' ä\n")

    source = elsewhere(fail)
    order = np.concatenate([b["label"] for b in first(8, train_batches(labelled(64), **OPTIONS2))])
    batches = train_batches(source, IDENTITY, workers=2, prefetch=4, **OPTIONS)
    assert len(next(batches)["image"]) == len(next(batches)["image"]) == 8
    time.sleep(0.5)
    with pytest.raises(UserError) as error:
        next(batches)
    assert str(error.value) == f"image {order[20]}: \\x1b 'odd' ä\\n"


def labelled(count):
    return replace(numbered(count), label_ids=np.arange(count, dtype=np.int32))


OPTIONS2 = {"preprocess": IDENTITY, **OPTIONS}


def test_an_unexpected_error_crosses_with_its_traceback():
    with started() as own:
        batches = train_batches(elsewhere(lambda key: 1 // 0), IDENTITY, workers=2, **OPTIONS)
        with pytest.raises(RuntimeError, match=r"(?s)in a process .*Traceback .*do\(key\).*1 // 0"):
            next(batches)
        assert not own()


# How they end.


def test_a_killed_one_is_one_line_and_the_others_go():
    with started() as own:
        batches = train_batches(DIGITS, IDENTITY, workers=3, **OPTIONS)
        next(batches)
        pids = own()
        assert len(pids) == 3
        os.kill(min(pids), signal.SIGKILL)
        with pytest.raises(UserError, match="that reads images was killed by SIGKILL, as"):
            deque(batches, maxlen=0)  # Without end, but for this error.
        assert not alive(pids)


def test_one_that_cannot_start_says_why(monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    with pytest.raises(UserError, match="a process that reads images ended with status 1"):
        next(train_batches(DIGITS, IDENTITY, workers=1, **OPTIONS))
    assert "No module named" in capfd.readouterr().err


@pytest.mark.parametrize("end", [lambda b: b.close(), lambda b: None], ids=["closed", "abandoned"])
def test_none_is_left_of_batches_that_are(end):
    files = open_files()
    with started() as own:
        batches = train_batches(DIGITS, IDENTITY, workers=2, **OPTIONS)
        kept = next(batches)["image"]
        assert len(own()) == 2
        end(batches)
        del batches
        wait_until(lambda: not own())
    assert kept.any()
    del kept
    assert not open_files() - files


SCRIPT = """
import os, signal, sys, time
import numpy as np
from vit_jax import data

print("begin", flush=True)

def read(key):
    return np.full((64, 64, 3), key, np.uint8)

source = data.Source("mine", ("a", "b"), 3, range(9), np.zeros(9, np.int32), read, str)
batches = data.train_batches(source, data.parse("rgb"), batch_size=8, seed=0, workers=2)
next(batches)
"""


def script(end, **options):
    """Runs a script that no `if __name__ == "__main__"` guards, whose source is its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT + end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **options,
    )


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("", 0, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("sys.exit(3)", 3, ""),
        ("os._exit(4)", 4, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_a_script_ends_with_batches_unread_and_nothing_else_is_said(end, status, said):
    before = set(os.listdir("/dev/shm"))
    process = script(end)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "begin\n")
    assert err.strip().rpartition("\n")[2] == said
    assert "ignored" not in err
    assert set(os.listdir("/dev/shm")) <= before
    wait_until(lambda: not in_session(process.pid))


def in_session(session):
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if file.read_text().rpartition(")")[2].split()[3] == str(session):
                found.add(int(file.parent.name))
    return found


def test_they_end_by_themselves_if_the_process_that_started_them_is_killed():
    before = set(os.listdir("/dev/shm"))
    process = script("print('there', flush=True); time.sleep(60)")
    assert [process.stdout.readline() for _ in range(2)] == ["begin\n", "there\n"]
    assert len(in_session(process.pid)) == 3
    process.kill()
    _, err = process.communicate(timeout=60)  # Returns when no process has its end of the pipe.
    wait_until(lambda: not in_session(process.pid))
    assert err == ""
    assert set(os.listdir("/dev/shm")) <= before


def test_signals_leave_them_to_the_process_that_started_them():
    with started() as own:
        batches = train_batches(DIGITS, IDENTITY, workers=2, **OPTIONS)
        next(batches)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            for pid in own():
                os.kill(pid, number)
        first(20, batches)
        assert not own()


# The memory of batches is filled anew when nobody can see it any more, and not before.

LAYOUT = {
    "image": ((3, 5, 7, 3), np.dtype(np.uint8)),
    "label": ((3,), np.dtype(np.int32)),
    "mask": ((3,), np.dtype(bool)),
}


@pytest.mark.parametrize("shared", [False, True])
def test_arrays_have_their_shapes_and_don_t_overlap(shared):
    buffers = BatchBuffers(LAYOUT, anonymous_file() if shared else None)
    (one, first), (two, second) = buffers.take(), buffers.take()
    assert one != two
    for i, batch in enumerate((first, second)):
        for j, array in enumerate(batch.values()):
            array[...] = 2 * i + j
    for i, batch in enumerate((first, second)):
        for j, (name, array) in enumerate(batch.items()):
            assert (array.shape, array.dtype) == LAYOUT[name]
            assert array.ctypes.data % 64 == 0
            assert (array == np.array(2 * i + j).astype(array.dtype)).all()


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch["label"],
        lambda batch: batch["image"][1, ::2, ::-1].T[0].view(),
        lambda batch: memoryview(batch["image"]),
        lambda batch: {"deep": [batch["mask"].T]},
    ],
)
def test_a_buffer_is_used_again_when_no_view_of_it_is_left(keep):
    buffers = BatchBuffers(LAYOUT)
    number, batch = buffers.take()
    kept = keep(batch)
    del batch
    other, _ = buffers.take()
    assert other != number
    del kept, _
    assert {buffers.take()[0], buffers.take()[0]} <= {number, other}


@pytest.mark.parametrize("count", [0, 2])
def test_what_jax_took_in_place_stays_as_it_was_while_others_are_filled(count):
    options = {"batch_size": 64, "seed": 3, "prefetch": 1}
    expected = train_batches(DIGITS, AUGMENTED, threads=1, **options)
    batches = train_batches(DIGITS, AUGMENTED, threads=2, workers=count, **options)
    taken, in_place = [], 0
    for _ in range(6):
        batch = next(batches)
        arrays = jax.device_put(batch)
        in_place += arrays["image"].unsafe_buffer_pointer() == batch["image"].ctypes.data
        taken.append(arrays)
        del batch
    for _ in range(6):
        next(batches)  # Let go at once.
    batches.close()
    assert in_place == 6, "JAX copied: this shows nothing"
    for arrays in taken:
        batch = next(expected)
        np.testing.assert_array_equal(arrays["image"], batch["image"])
        np.testing.assert_array_equal(arrays["label"], batch["label"])
    expected.close()


def addresses(batches, count):
    return {next(batches)["image"].ctypes.data for _ in range(count)}


@pytest.mark.parametrize("count", [0, 1])
def test_a_consumer_that_lets_go_needs_no_more_buffers_than_are_ahead(count):
    source = from_arrays(np.zeros((9, 8, 8), np.uint8), np.arange(9) % 2)
    options = {"batch_size": 4, "seed": 0, "prefetch": 2, "workers": count}
    batches = train_batches(source, parse("rgb"), **options)
    gc.disable()  # Nothing waits for it.
    try:
        assert len(addresses(batches, 40)) <= 4
    finally:
        gc.enable()
    batches.close()


def test_batches_outlive_their_iterator():
    batches = train_batches(numbered(8), parse("rgb"), batch_size=4, seed=0, prefetch=1)
    kept = [next(batches) for _ in range(5)]
    copies = [batch["image"].copy() for batch in kept]
    batches.close()
    del batches
    for batch, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(batch["image"], copy)
