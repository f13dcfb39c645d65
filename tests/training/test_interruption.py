"""Runs in processes of their own, killed, stopped, and out of disk: nothing is lost.

Every resumed run has to end bit for bit like one that was left alone.
"""

import contextlib
import errno
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vit_jax import load
from vit_jax.cli import main
from vit_jax.data import open_source
from vit_jax.errors import UserError
from vit_jax.evaluation.images import evaluate_images
from vit_jax.training import run
from vit_jax.training.checkpoints import Checkpoints
from vit_jax.training.workdir import read_metrics

TINY = Path(__file__).resolve().parents[1] / "tiny.py"
PATIENCE = 120  # Seconds until a process that shows no sign of life fails a test.


class Training:
    """`vit-jax train` as a process."""

    def __init__(self, workdir: Path, *fields: str, **environment: str):
        self.workdir = workdir
        options = [f"--config.{field}" for field in fields]
        command = [sys.executable, "-m", "vit_jax", "train", f"--config={TINY}", *options]
        self.log = workdir.with_name(workdir.name + ".log").open("w+")
        self._process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment},
        )

    def wait_until(self, moment) -> bool:
        """Looks every millisecond; False if the run ends before the moment comes."""
        for _ in range(PATIENCE * 1000):
            if self._process.poll() is not None:
                return False
            if moment(self):
                return True
            time.sleep(0.001)
        raise TimeoutError(self.log.name)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal; gives the exit status and what was printed."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        text, _ = self._process.communicate(timeout=PATIENCE)
        self.log.close()
        return self._process.returncode, text

    @property
    def step(self) -> int:
        """The step of the last whole line of the metrics."""
        with contextlib.suppress(OSError, ValueError):
            lines = (self.workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
            return int(lines[-1].partition(b",")[0].rpartition(b" ")[2]) if lines else 0
        return 0

    @property
    def saving(self) -> int:
        """The step whose checkpoint is being written; 0 for none."""
        with contextlib.suppress(OSError):
            for path in (self.workdir / "checkpoints").iterdir():
                if "tmp" in path.name:
                    return int(path.name.partition(".")[0])
        return 0


def at_step(step):
    return lambda training: training.step >= step


def in_save_from(step):
    return lambda training: training.saving >= step


def check_kills(kills, fields, tiny, tmp_path, outcome):
    """Runs with kills at the given moments, then to the end, and once without any kill."""
    count = 0
    for moment in kills:
        training = Training(tmp_path / "killed", *fields)
        count += training.wait_until(moment)
        training.end(signal.SIGKILL)
    assert count == len(kills)
    assert run(tiny(*fields), tmp_path / "killed").finished
    assert run(tiny(*fields), tmp_path / "whole").finished
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_killed_while_it_steps_and_while_it_saves_ends_like_one_left_alone(
    tiny, tmp_path, outcome
):
    # The first kill leaves an unfinished checkpoint, the second a few steps beyond a finished one.
    fields = ("total_steps=200", "checkpoint_every=20", "ema_decay=0.9")
    check_kills([in_save_from(40), at_step(110)], fields, tiny, tmp_path, outcome)


@pytest.mark.slow
def test_a_run_killed_at_ten_random_moments_ends_like_one_left_alone(tiny, tmp_path, outcome):
    chance = random.Random(time.time_ns())
    fields = ("total_steps=300", "checkpoint_every=20", "progress_every=1", "keep_best")
    kills = []
    for i in range(10):
        step = 28 * i + chance.randint(1, 27)
        kills.append(in_save_from(step) if i % 2 else at_step(step))
    check_kills(kills, fields, tiny, tmp_path, outcome)
    best = [(tmp_path / name / "weights_best.npz").read_bytes() for name in ("killed", "whole")]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=[pytest.mark.slow, pytest.mark.ci]),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_says_how_to_go_on_and_exits_with_75(number, tmp_path):
    workdir = tmp_path / "run"
    training = Training(workdir, "total_steps=1000000", "eval_every=0", "checkpoint_every=0")
    assert training.wait_until(at_step(5))
    status, text = training.end(number)
    assert status == 75
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert text == (
        f"stopped by {number.name} at step {saved:,} of 1,000,000, saved in "
        f"{workdir / 'checkpoints'}: start the same command again to go on\n"
    )


def workers_of(training):
    """The processes that a run has started."""
    files = Path(f"/proc/{training.pid}/task").glob("*/children")
    with contextlib.suppress(OSError):
        return [int(pid) for file in files for pid in file.read_text().split()]
    return []


def workers_start(training):
    """Whether they are there, when they still import what they need."""
    return len(workers_of(training)) == 2


def are_gone(pids):
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


WORKERS = ("total_steps=1000000", "eval_every=0", "checkpoint_every=0", "workers=2")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [at_step(5), workers_start])
def test_what_stops_a_run_reaches_worker_processes_too_and_they_say_nothing(
    moment, number, tmp_path
):
    training = Training(tmp_path / "run", *WORKERS)
    assert training.wait_until(moment)
    workers = workers_of(training)
    os.killpg(training.pid, number)  # As a terminal does with Ctrl-C, and a cluster with SIGTERM.
    assert not training.wait_until(lambda t: False)
    assert training.end(number)[0] == 75
    log = Path(training.log.name).read_text()
    assert "read by 2 worker processes" in log
    assert f"{number.name}: stopping; what is under way is finished and saved first" in log
    assert "Traceback" not in log
    assert are_gone(workers)


@pytest.mark.slow
def test_a_worker_process_that_is_killed_ends_the_run_with_one_line(tmp_path):
    training = Training(tmp_path / "run", *WORKERS)
    assert training.wait_until(at_step(5))
    workers = workers_of(training)
    os.kill(workers[1], signal.SIGKILL)
    assert not training.wait_until(lambda t: False)
    assert training.end(signal.SIGTERM)[0] == 2
    log = Path(training.log.name).read_text()
    assert log.count("vit-jax: ") == 1
    assert "\nvit-jax: a process that reads images was killed by SIGKILL, as the" in log
    assert "Traceback" not in log
    assert are_gone(workers)


@pytest.mark.slow
def test_worker_processes_end_with_a_run_that_is_killed(tmp_path):
    training = Training(tmp_path / "run", *WORKERS)
    assert training.wait_until(at_step(5))
    workers = workers_of(training)
    training.end(signal.SIGKILL)
    assert len(workers) == 2
    assert are_gone(workers)


def test_a_run_that_is_asked_to_stop_while_it_starts_ends_before_its_first_step(tmp_path):
    training = Training(tmp_path / "run", "total_steps=1000000")
    assert training.wait_until(lambda t: (t.workdir / "lock").exists())
    status, text = training.end(signal.SIGTERM)
    assert (status, text) == (
        75,
        "stopped by SIGTERM at step 0 of 1,000,000, nothing to save yet: start the same command "
        "again to go on\n",
    )


def test_a_second_run_in_the_same_workdir_is_refused_until_the_first_is_gone(tmp_path, capsys):
    fields = ("total_steps=1000000", "eval_every=0")
    command = ["train", f"--config={TINY}", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.{field}" for field in fields]
    first = Training(tmp_path / "run", *fields)
    assert first.wait_until(at_step(5))
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"vit-jax: process {first.pid} on {platform.node()} is training in {tmp_path / 'run'}: "
        "wait for it, stop it, or choose another workdir\n"
    )
    first.end(signal.SIGKILL)
    second = Training(tmp_path / "run", *fields)
    assert second.wait_until(at_step(first.step + 10))
    assert second.end(signal.SIGTERM)[0] == 75


def test_checkpoints_that_are_all_damaged_are_told_in_one_line(whole, tmp_path, capfd):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / "report.png").unlink()
    for file in (workdir / "checkpoints").glob("*/state/d/*"):
        os.truncate(file, 100)
    assert main(["train", f"--config={TINY}", f"--workdir={workdir}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"vit-jax: the checkpoint {workdir}/checkpoints/40 can't be used (OUT_OF"
    )
    assert line.endswith(
        "), nor 1 before it: mend the cause, or remove these folders to begin anew"
    )


@pytest.mark.slow
def test_any_batch_size_evaluates_each_image_once_on_eight_devices(tmp_path):
    training = Training(
        *(tmp_path / "run", "total_steps=2", "warmup_steps=0", "batch_eval=7"),
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert not training.wait_until(lambda t: False)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    scores = evaluate_images(load(tmp_path / "run"), open_source("digits", "test"))
    assert scores.count == 360
    assert last["test/top1"] == scores.top1
    assert last["test/loss"] == pytest.approx(scores.loss, rel=1e-6)
    assert ", 8 x cpu;" in Path(training.log.name).read_text()
    training.end(signal.SIGTERM)


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own; gives a function that changes its size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("may not mount a file system")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("read_only", [False, True])
def test_a_disk_that_is_full_or_read_only_when_a_run_begins_is_one_line_and_nothing_is_left(
    read_only, tiny, tmp_path, capfd
):
    with small_disk(tmp_path / "disk", "64k") as resize:
        workdir = tmp_path / "disk" / "run"
        if read_only:
            resize("64k,ro")
        else:
            with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("wb") as file:
                file.write(bytes(2**20))
        before = sorted((tmp_path / "disk").iterdir())
        assert main(["train", f"--config={TINY}", f"--workdir={workdir}"]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("vit-jax: ")
        assert str(workdir) in line
        assert ("Read-only file system" if read_only else "No space left on device") in line
        with pytest.raises(UserError, match="choose another place" if read_only else "make room"):
            run(tiny(), workdir)
        assert sorted((tmp_path / "disk").iterdir()) == before


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_save_keeps_the_checkpoint_before_and_the_run_goes_on(
    tiny, tmp_path, outcome, capfd
):
    # Each checkpoint takes 3.5 MB: the disk has room for one.
    fields = ("model.mlp_dim=12000", "keep_checkpoints=1", "eval_every=0")
    command = ["train", f"--config={TINY}", *(f"--config.{f}" for f in fields)]
    with small_disk(tmp_path / "disk", "5m") as resize:
        workdir = tmp_path / "disk" / "run"
        assert main([*command, f"--workdir={workdir}"]) == 2
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if "could not save" in line] == lines[-1:]
        assert lines[-1].startswith(f"vit-jax: could not save step 20 in {workdir}/checkpoints (No")
        assert "space left on device); the checkpoint of step 10 is still good: make" in lines[-1]
        assert not any("Traceback" in line for line in lines)
        assert Checkpoints(workdir / "checkpoints", keep=1).latest == 10

        resize("100m")
        assert run(tiny(*fields), workdir).finished
        run(tiny(*fields), tmp_path / "whole")
        assert outcome(workdir) == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.ci
def test_a_disk_without_any_room_left_is_one_line_and_harms_nothing(
    whole, tiny, tmp_path, outcome, capfd
):
    with small_disk(tmp_path / "disk", "8m") as resize:
        workdir = tmp_path / "disk" / "run"
        training = Training(workdir, "total_steps=40")
        training.wait_until(at_step(10))
        training.end(signal.SIGTERM)
        with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("wb") as file:
            while file.write(bytes(4096)):
                file.flush()
        command = ["train", f"--config={TINY}", f"--workdir={workdir}"]
        assert main(command) == 2
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1].startswith("vit-jax: ")
        assert "No space left on device" in lines[-1]
        assert not any("Traceback" in line for line in lines)

        (tmp_path / "disk" / "filler").unlink()
        resize("100m")
        assert main(command) == 0
        assert outcome(workdir) == outcome(whole)


@pytest.mark.slow
@pytest.mark.ci
def test_weights_that_cannot_be_written_at_the_end_are_written_by_the_next_start(
    whole, tiny, tmp_path, outcome, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", full)
        with pytest.raises(UserError, match="No space left on device"):
            run(tiny(), tmp_path)
    assert not [p for p in tmp_path.iterdir() if ".npz" in p.name]
    assert run(tiny(), tmp_path).finished
    assert outcome(tmp_path) == outcome(whole)
