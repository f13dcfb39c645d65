"""Several processes train as one: they meet, agree, count, save and stop together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import load
from vit_jax.errors import UserError
from vit_jax.training import processes, run
from vit_jax.training.metrics import read_metrics

TINY = Path(__file__).resolve().parents[1] / "tiny.py"
PATIENCE = 200
# Wide enough that a layer is split; exact momentum, so that only sums are rounded differently.
FIELDS = ("model.mlp_dim=1024", "optim_dtype=float32", "progress_every=1", "batch_eval=7")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Group:
    """`vit-jax train` as several processes."""

    def __init__(self, workdir: Path, *fields: str, count: int = 2, devices: int = 1, own=None):
        self.workdir, self.processes = workdir, []
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        for i in range(count):
            command = [sys.executable, "-m", "vit_jax", "train", f"--config={TINY}"]
            command += [f"--workdir={workdir}", *(f"--config.{field}" for field in fields)]
            command += (own or {}).get(i, [])
            if count > 1:
                command += [f"--coordinator={address}", f"--num-processes={count}"]
                command += [f"--process-id={i}"]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self.processes.append(subprocess.Popen(command, env=environment, **pipes))

    def stop(self, process: int, step: int) -> None:
        """Sends SIGTERM to one process when the run is at a step."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, UserError):
                if any(x["step"] >= step for x in read_metrics(self.workdir / "metrics.jsonl")):
                    break
            assert self.processes[process].poll() is None, self.end()
            time.sleep(0.002)
        self.processes[process].send_signal(signal.SIGTERM)

    def end(self) -> list[tuple[int, str, str]]:
        """Exit status, output and errors of each."""
        texts = [p.communicate(timeout=PATIENCE) for p in self.processes]
        return [(p.returncode, *text) for p, text in zip(self.processes, texts, strict=True)]


def assert_same_run(workdir, reference):
    """The same figures but for rounding, and evaluations that count the same pictures."""
    found, expected = (read_metrics(w / "metrics.jsonl") for w in (workdir, reference))
    assert [x["step"] for x in found] == [x["step"] for x in expected]
    for a, b in zip(found, expected, strict=True):
        for key in b:
            if not key.startswith("time/"):
                assert a[key] == pytest.approx(b[key], rel=2e-4, abs=3e-3 * ("top" in key)), (a, b)
    weights = [flatten_dict(load(w).params, sep="/") for w in (workdir, reference)]
    for name in weights[0]:
        if not name.endswith("key/bias"):  # It changes nothing: Adam makes steps of its rounding.
            np.testing.assert_allclose(weights[0][name], weights[1][name], atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, _compile_once):
    """The same run in one process on one device."""
    from vit_jax.training.options import load_config, override

    workdir = tmp_path_factory.mktemp("alone") / "run"
    fields = [f"--config.{field}" for field in FIELDS]
    assert run(override(load_config(str(TINY)), fields), workdir).finished
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "devices"), [("replicate", 1), ("fsdp", 2), ("hybrid", 2)])
def test_two_processes_give_the_run_of_one(sharding, devices, alone, tmp_path):
    group = Group(tmp_path / "run", *FIELDS, f"sharding={sharding}", devices=devices)
    (first, text, log), (second, nothing, silence) = group.end()
    assert (first, second) == (0, 0), log + silence
    assert_same_run(tmp_path / "run", alone)
    assert re.search(r"test accuracy .* \(\d+ of 360\)", text)
    assert (nothing, "step" in silence) == ("", False)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step_and_any_devices_go_on(alone, tmp_path):
    workdir = tmp_path / "run"
    group = Group(workdir, *FIELDS, "sharding=fsdp")
    group.stop(process=1, step=5)
    (first, text, log), (second, _, silence) = group.end()
    assert (first, second) == (75, 75), log + silence
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert text.startswith(f"stopped by SIGTERM at step {saved} of 40, saved in")

    group = Group(workdir, *FIELDS, "sharding=fsdp", count=1, devices=8)
    group.stop(process=0, step=saved + 3)
    ((status, _, log),) = group.end()
    assert status == 75, log
    assert "going on from step" in log

    ((status, _, log),) = Group(workdir, *FIELDS, count=1).end()
    assert status == 0, log
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_processes_that_differ_are_named_with_the_field_in_which_they_do(tmp_path):
    group = Group(tmp_path / "run", *FIELDS, own={1: ["--config.batch=32"]})
    for status, _, log in group.end():
        assert status == 2
        assert re.search(
            r"vit-jax: process 1 on \S+ has config.batch 32, process 0 on \S+ has 16: start", log
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_that_only_one_process_can_see_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    (one, _, log), (other, _, second_log) = Group(tmp_path / "run", *FIELDS).end()
    assert (one, other) == (2, 2)
    assert "vit-jax: " in log
    assert "holds metrics.jsonl but no config.json" in log
    assert "vit-jax: process 0: " in second_log


def meeting(monkeypatch, patience, *calls):
    """What each of several processes, here threads, says when they meet."""
    monkeypatch.setattr(processes, "PATIENCE", patience)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(processes.os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    said = [None] * len(calls)
    address = f"127.0.0.1:{free_port()}"

    def one(i, number, count):
        try:
            processes.connect(address, count, number)
        except UserError as e:
            said[i] = str(e)

    threads = [threading.Thread(target=one, args=(i, *call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_processes_that_all_come_meet(monkeypatch):
    assert meeting(monkeypatch, 20, (2, 3), (0, 3), (1, 3)) == [None] * 3


def test_who_is_missing_is_told_to_those_who_came(monkeypatch):
    said = meeting(monkeypatch, 1, (0, 4), (2, 4))
    assert said[0].startswith("of 4 processes 1, 3 did not come within 1 s: look why on")
    assert said[1] == said[0]
    (said,) = meeting(monkeypatch, 1, (1, 2))
    assert re.match(r"process 0 did not answer at 127.0.0.1:\d+ within 1 s: look whether", said)


def test_numbers_given_twice_and_different_counts_are_told(monkeypatch):
    said = meeting(monkeypatch, 20, (0, 3), (1, 3), (1, 3))
    assert said[0].startswith("process 1 of 3 came to process 0 of 3 twice: give every process")
    assert said == [said[0]] * 3
    said = meeting(monkeypatch, 20, (0, 2), (1, 3))
    assert said[0].startswith("process 1 of 3 came to process 0 of 2: give every process the same")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", None, None), "belong together: give all three"),
        (("nowhere", 2, 0), "--coordinator is 'nowhere', expected HOST:PORT"),
        (("a:70000", 2, 0), "expected HOST:PORT"),
        (("a:1", 2, 2), "--process-id is 2 of --num-processes 2, expected 0 to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        processes.connect(*given)
