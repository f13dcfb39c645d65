"""Batches are on the device before they are needed, not too many of them, and only an idle device
waits for them."""

import gc
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.training.conftest import TINY, run_module
from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.sharding import batch_sharding, make_mesh
from vit_jax.training import distributed, run
from vit_jax.training.inputs import DevicePrefetcher, open_data


class Step:
    """What a step gives, on a device that works as long as the test wants."""

    def __init__(self, error=None):
        self._done = threading.Event()
        self._error = error

    def finish(self):
        self._done.set()

    def block_until_ready(self):
        self._done.wait(60)
        if self._error:
            raise self._error
        return self


class Batches:
    """Endless batches, each of which takes a while."""

    def __init__(self, seconds=0.0):
        self.asked = 0
        self.closed = False
        self._seconds = seconds

    def __next__(self):
        self.asked += 1
        time.sleep(self._seconds)
        return {"image": np.full(8, self.asked)}

    def close(self):
        self.closed = True


def prefetcher(batches, prefetch):
    return DevicePrefetcher(batches, batch_sharding(make_mesh()), prefetch)


def settled(batches):
    """How many batches were asked for, when no more are."""
    asked = -1
    while asked != batches.asked:
        asked = batches.asked
        time.sleep(0.1)
    return asked


@pytest.mark.parametrize("prefetch", [1, 3])
def test_beside_the_batch_at_work_no_more_than_prefetch_are_on_the_device(prefetch):
    batches, steps = Batches(), []
    feed = prefetcher(batches, prefetch)
    for done in range(4):
        # All that are there can be taken at once, but more come only when a step is done.
        while len(steps) < done + prefetch + 1:
            assert np.asarray(next(feed)["image"])[0] == len(steps) + 1
            steps.append(Step())
            feed.watch({"loss": steps[-1]})
        assert settled(batches) == done + prefetch + 1
        steps[done].finish()
        assert settled(batches) == done + prefetch + 2
    for step in steps:
        step.finish()
    feed.close()


@pytest.mark.parametrize(("busy", "least", "most"), [(0.0, 0.7, 1.0), (0.4, 0.0, 0.2)])
def test_only_the_time_in_which_the_device_has_nothing_to_do_is_idle(busy, least, most):
    feed = prefetcher(Batches(0.2), 1)
    done = None
    for i in range(5):
        next(feed)
        step = Step()
        if done is not None:
            done.result()  # A device does one step after the other.
        threading.Timer(busy, step.finish).start()
        done = feed.watch({"loss": step})
        if i == 1:
            feed_begins = done.result()
    clock = done.result()
    assert clock.steps - feed_begins.steps == 3
    assert least <= (clock.idle - feed_begins.idle) / (clock.at - feed_begins.at) <= most
    feed.close()


def test_what_passes_before_the_clock_is_restarted_is_not_idle():
    feed = prefetcher(Batches(0.3), 1)
    next(feed)
    feed.restart_clock()
    step = Step()
    step.finish()
    clock = feed.watch({"loss": step}).result()
    assert clock.idle == 0
    assert clock.at - feed.clock.at == 0
    feed.close()


def test_closing_ends_the_threads_and_the_reading_and_leaves_nothing_on_the_devices():
    gc.collect()  # What other tests left.
    batches, before = Batches(), threading.active_count()
    arrays = len(jax.live_arrays())
    feed = prefetcher(batches, 2)
    next(feed)
    feed.close()
    assert batches.closed
    assert threading.active_count() == before
    gc.collect()
    assert len(jax.live_arrays()) == arrays


def test_the_error_of_a_step_comes_where_its_metrics_are_read():
    feed = prefetcher(Batches(), 1)
    for _ in range(4):  # More than there is room for: the error keeps none of them away.
        next(feed)
        step = Step(RuntimeError("out of memory"))
        step.finish()
        done = feed.watch({"loss": step})
    with pytest.raises(RuntimeError, match="out of memory"):
        done.result()
    feed.close()


# Who reads the images of a run: chosen by cores and configuration, and told.


def readers(config, cores, sources=None):
    return [str(chosen) for chosen in open_data(config, sources, cores).readers]


def test_by_default_processes_train_where_there_are_more_than_two_cores(tiny):
    assert readers(tiny("threads=0"), 16) == ["16 worker processes", "16 threads"]
    assert readers(tiny("threads=0"), 2) == ["2 threads", "2 threads"]
    assert readers(tiny("threads=3"), 16) == ["3 threads", "3 threads"]
    assert readers(tiny("threads=0", "workers=0"), 8) == ["8 threads", "8 threads"]
    assert readers(tiny("workers=5"), 2) == ["5 worker processes", "1 thread"]


def test_they_also_test_where_there_are_many_images(tiny):
    many = data.open_source("digits", "train").take([0, 1] * 2048)
    assert readers(tiny("threads=0"), 4, (many, many)) == ["4 worker processes"] * 2


@pytest.mark.slow
@pytest.mark.ci
def test_the_first_line_of_a_run_says_who_reads_and_why_no_others(
    tiny, tmp_path, monkeypatch, capsys
):
    lock, digits = threading.Lock(), data.open_source("digits", "train")

    def read(key):
        with lock:
            return digits.read_key(key)

    source = replace(digits, read_key=read)
    monkeypatch.setattr(run_module, "share_of_cores", lambda: 3)
    fields = ("total_steps=1", "warmup_steps=0", "eval_every=0")
    run(tiny(*fields, "threads=0"), tmp_path / "run", sources=(source, source))
    first = capsys.readouterr().err.splitlines()[0]
    reason = "digits can't be given to other processes: cannot pickle '_thread.lock' object"
    assert f" to test on, read by 3 threads ({reason}), 1 x cpu" in first
    with pytest.raises(UserError, match=r"digits can't be given to other processes: .* object"):
        run(tiny(*fields, "workers=2"), tmp_path / "other", sources=(source, source))
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.usefixtures("no_image")
def test_processes_that_were_chosen_train_to_the_end(tiny, tmp_path, monkeypatch, capsys, outcome):
    digits, seen = data.open_source("digits", "train"), tmp_path / "seen"
    seen.mkdir()

    def read(key):
        (seen / str(os.getpid())).touch()
        return digits.read_key(key)

    sources = (replace(digits, read_key=read), data.open_source("digits", "test"))
    monkeypatch.setattr(data.workers, "own_cores", lambda: 3)
    for workers in (-1, 0):
        config = tiny("total_steps=20", "threads=0", f"workers={workers}")
        assert run(config, tmp_path / str(workers), sources=sources).finished
        if workers == -1:
            assert " read by 3 worker processes, " in capsys.readouterr().err.splitlines()[0]
            readers = {path.name for path in seen.iterdir()} - {str(os.getpid())}
            assert 1 <= len(readers) <= 3
    assert outcome(tmp_path / "-1") == outcome(tmp_path / "0")


SCRIPT = """
import sys
from pathlib import Path

from vit_jax.cli import main
from vit_jax.training import run
from vit_jax.training.options import load_config, override

config, folder = sys.argv[1:]
fields = ["--config.total_steps=4", "--config.workers=2"]
assert run(override(load_config(config), fields), Path(folder) / "run").finished
sys.exit(main(["train", f"--config={config}", f"--workdir={folder}/main", *fields]))
"""


@pytest.mark.slow
@pytest.mark.ci
def test_a_script_that_nothing_guards_trains_with_worker_processes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(TINY), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(TINY.parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" read by 2 worker processes, ") == 2  # The script ran once.
    assert (tmp_path / "run" / "weights.npz").exists()
    assert (tmp_path / "main" / "weights.npz").exists()


@pytest.mark.parametrize(
    ("own", "others", "share"),
    [
        (range(16), [], 16),
        (range(16), [["here", range(16)]] * 7, 2),
        (range(16), [["elsewhere", range(16)]] * 7, 16),
        (range(4), [["here", range(4, 8)]], 4),
        (range(2), [["here", range(2)]] * 7, 1),
    ],
)
def test_processes_of_one_machine_share_its_cores_out(own, others, share, monkeypatch):
    monkeypatch.setattr(distributed.platform, "node", lambda: "here")
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: set(own))
    monkeypatch.setattr(distributed, "allgather", lambda value: [value, *others])
    monkeypatch.setattr(data.workers, "_QUOTA", "/nowhere")
    assert distributed.share_of_cores() == share
