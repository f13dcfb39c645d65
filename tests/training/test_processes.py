"""Several processes train as one: they meet, agree, count, save, stop and fail together."""

import re
import shutil
import signal
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.group import TINY, Group, free_port
from vit_jax import load
from vit_jax.errors import UserError
from vit_jax.training import processes, run
from vit_jax.training.options import load_config, override
from vit_jax.training.workdir import read_metrics

# Wide enough that a layer is split; exact momentum, so that only sums are rounded differently; test
# images in a number that no number of devices divides.
FIELDS = ("model.mlp_dim=1024", "optim_dtype=float32", "progress_every=1", "batch_eval=7")
FIELDS += ("splits.test=test[:353]", "ema_decay=0.5")
# What runs in some number of processes with some number of devices each is what runs in one.
LAYOUTS = {
    "8 devices": (1, 8),
    "pmap over 8 devices": (1, 8, "compile=pmap", "model.dropout_rate=0.0"),
    "fsdp over 8 devices": (1, 8, "sharding=fsdp"),
    "2 processes": (2, 1),
    "4 processes x 2": (4, 2),
    "fsdp over 2 x 4": (2, 4, "sharding=fsdp"),
    "hybrid over 2 x 2": (2, 2, "sharding=hybrid"),
}


def assert_same_run(workdir, reference):
    """The same figures but for rounding, and evaluations that count the same images."""
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


def on_one_device(workdir, *fields):
    """The same run in one process on one device."""
    options = [f"--config.{field}" for field in (*FIELDS, *fields)]
    assert run(override(load_config(str(TINY)), options), workdir).finished
    return workdir


@pytest.fixture(scope="module")
def alone(tmp_path_factory, _compile_once):
    return on_one_device(tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_run_of_one_device(layout, alone, tmp_path):
    count, devices, *fields = LAYOUTS[layout]
    ends = Group(tmp_path / "run", *FIELDS, *fields, count=count, devices=devices).end()
    assert [status for status, _, _ in ends] == [0] * count, ends
    if "pmap" in layout:  # Each device draws its own dropout there.
        alone = on_one_device(tmp_path / "alone", fields[-1])
    assert_same_run(tmp_path / "run", alone)
    (_, text, _), *others = ends
    assert re.search(r"test accuracy .* \(\d+ of 353\)", text)
    assert all((out, "step" in err) == ("", False) for _, out, err in others)


@pytest.mark.slow
def test_one_run_goes_on_over_8_devices_4_x_2_one_fsdp_and_replicated_again(alone, tmp_path):
    workdir = tmp_path / "run"
    chain = [("replicate", 1, 8), ("replicate", 4, 2), ("replicate", 1, 1), ("fsdp", 2, 2)]
    for i, (sharding, count, devices) in enumerate(chain):
        fields = (*FIELDS, f"sharding={sharding}")
        group = Group(workdir, *fields, count=count, devices=devices)
        group.send(signal.SIGTERM, process=count - 1, step=7 * (i + 1))
        ends = group.end()
        assert [status for status, _, _ in ends] == [75] * count, ends
    ((status, _, log),) = Group(workdir, *FIELDS, count=1).end()
    assert status == 0, log
    assert_same_run(workdir, alone)
    images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(load(workdir)(images), load(alone)(images), atol=1e-3)


LONG = (*FIELDS, "total_steps=1000000", "eval_every=0")


def test_when_a_process_is_killed_the_other_names_it_at_once_and_one_process_goes_on(
    alone, tmp_path
):
    group = Group(tmp_path / "run", *FIELDS)
    group.send(signal.SIGKILL, process=1, step=11)
    since = time.monotonic()
    (status, _, log), (killed, _, _) = group.end()
    assert (status, killed) == (75, -9), log
    assert time.monotonic() - since < 10
    assert re.search(
        r"\nvit-jax: process 1 on \S+ has gone without a word: start the same command again to go "
        r"on from the last checkpoint\n$",
        log,
    )
    ((status, _, log),) = Group(tmp_path / "run", *FIELDS, count=1).end()
    assert status == 0, log
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_when_the_first_of_four_is_killed_the_others_name_it(tmp_path):
    group = Group(tmp_path / "run", *LONG, count=4)
    group.send(signal.SIGKILL, process=0, step=5)
    first, *others = group.end()
    assert first[0] == -9
    for status, _, log in others:
        assert status == 75, log
        assert "vit-jax: process 0 on " in log


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_is_silent_too_long_is_given_up_but_not_before(silent, tmp_path):
    group = Group(tmp_path / "run", *LONG, "silence_timeout=8")
    group.send(signal.SIGSTOP, silent, step=5)
    time.sleep(3)
    group.processes[silent].send_signal(signal.SIGCONT)
    before = group.step
    group.send(signal.SIGSTOP, silent, step=before + 5)
    group.processes[1 - silent].wait(60)
    group.processes[silent].send_signal(signal.SIGCONT)
    for status, _, log in group.end():
        assert status == 75, log
        assert log.endswith(
            "has given no sign of life for 8 s: start the same command again to go on from the "
            "last checkpoint\n"
        )
        assert f"vit-jax: process {silent} on " in log


@pytest.mark.slow
def test_a_mistake_of_one_process_in_mid_run_ends_the_other_with_its_message(tmp_path):
    folder = tmp_path / "images"
    chance = np.random.default_rng(0)
    for i in range(80):
        path = folder / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), chance.integers(256, size=(8, 8, 3), dtype=np.uint8))
    shutil.copytree(folder / "train", folder / "test")
    path.write_bytes(path.read_bytes()[:60])
    group = Group(tmp_path / "run", "eval_every=0", f"dataset={folder}", "batch=4", "accum_steps=1")
    logs = []
    for status, _, log in group.end():
        assert status == 2, log
        assert "Traceback" not in log
        logs.append(log.splitlines()[-1])
    own, told = sorted(logs, key=len)
    assert str(path) in own
    assert re.fullmatch(f"vit-jax: process [01] on \\S+: {re.escape(own[9:])}", told)


@pytest.mark.slow
def test_all_processes_go_back_from_a_bad_step_together_whatever_each_has_made_ready(tmp_path):
    fields = ("on_bad_step=rollback", "base_lr=1e36", "optim=sgd", "warmup_steps=8")
    fields += ("checkpoint_every=4", "progress_every=3", "eval_every=0")
    group = Group(tmp_path / "run", *fields, own={1: ["--config.prefetch=5"]})
    (status, _, log), (other_status, _, other_log) = group.end()
    assert (status, other_status) == (2, 2), log + other_log
    gone_back = re.findall(r"step (\d+): the param_norm .* weights of step (\d+)", log)
    assert [int(step) for step, _ in gone_back] == list(range(2, 11))
    assert [int(since) for _, since in gone_back] == [0, 0, 0, 4, 4, 4, 4, 8, 8]
    message = (
        "vit-jax: at step 11 the param_norm became (inf|nan), the last of 10 bad steps in a row"
    )
    assert re.match(message, log.splitlines()[-1])
    assert log.splitlines()[-1] == other_log.splitlines()[-1]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step_and_any_devices_go_on(alone, tmp_path):
    workdir = tmp_path / "run"
    group = Group(workdir, *FIELDS, "sharding=fsdp")
    group.send(signal.SIGTERM, process=1, step=5)
    (first, text, log), (second, _, silence) = group.end()
    assert (first, second) == (75, 75), log + silence
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert text.startswith(f"stopped by SIGTERM at step {saved} of 40, saved in")

    group = Group(workdir, *FIELDS, "sharding=fsdp", count=1, devices=8)
    group.send(signal.SIGTERM, process=0, step=saved + 3)
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
def test_a_workdir_that_not_all_share_is_refused_before_anything_is_written(tmp_path):
    elsewhere = f"--workdir={tmp_path / 'elsewhere'}"
    group = Group(tmp_path / "run", *FIELDS, own={1: [elsewhere]})
    for status, _, log in group.end():
        assert status == 2
        assert re.search(
            r"vit-jax: process 1 on \S+ has in the workdir a lock of process None, process 0 on "
            r"\S+ has '\d+ on \S+': start all .* a workdir that all of them share\n$",
            log,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_each_process_writes_its_trace(tmp_path):
    ends = Group(tmp_path / "run", "total_steps=4", "eval_every=0", "profile=(2, 3)").end()
    assert [status for status, _, _ in ends] == [0, 0], ends
    traces = [*(tmp_path / "run" / "profile").rglob("*.xplane.pb")]
    assert sorted(t.relative_to(tmp_path).parts[2] for t in traces) == ["plugins", "process_1"]
    assert all(b"PjitFunction(step)" in trace.read_bytes() for trace in traces)


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
