"""Several processes train as one: they meet, agree, count, save, stop and fail together.

Those that start processes are slow; the promises among them are run by CI.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.group import TINY, Group, free_port
from vit_jax import load
from vit_jax.errors import UserError
from vit_jax.training import last_words, run
from vit_jax.training.distributed import allgather, exit_with_others, initialize
from vit_jax.training.last_words import HOSTS, explain
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
@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.ci if "hybrid" in x else ()) for x in LAYOUTS]
)
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
        group = Group(workdir, *fields, "silence_timeout=4", count=count, devices=devices)
        # Of several, JAX would stop all only after a second: after the last step.
        group.send(signal.SIGTERM if count == 1 else signal.SIGKILL, count - 1, step=7 * (i + 1))
        ends = group.end()
        expected = [75] if count == 1 else [ABORTED] * (count - 1) + [-signal.SIGKILL]
        assert [status for status, _, _ in ends] == expected, ends
    ((status, _, log),) = Group(workdir, *FIELDS, count=1).end()
    assert status == 0, log
    assert_same_run(workdir, alone)
    images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(load(workdir)(images), load(alone)(images), atol=1e-3)


LONG = (*FIELDS, "total_steps=1000000", "eval_every=0")


ABORTED = -signal.SIGABRT  # By JAX.
AGAIN = "start the same command again to go on from the last checkpoint"


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_names_it_and_one_process_goes_on(
    victim, alone, tmp_path
):
    group = Group(tmp_path / "run", *FIELDS, "silence_timeout=4")
    group.send(signal.SIGKILL, process=victim, step=11)
    since = time.monotonic()
    ends = group.end()
    assert time.monotonic() - since < 4 + 10
    assert [status for status, *_ in ends] == [-9 if i == victim else ABORTED for i in (0, 1)]
    log = ends[1 - victim][2]
    assert re.search(
        rf"\nvit-jax: process {victim} on \S+ ended, see its log, or .*: {AGAIN}\n$", log
    )
    assert "Check failure" not in log
    ((status, _, log),) = Group(tmp_path / "run", *FIELDS, count=1).end()
    assert status == 0, log
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, pytest.param(1, marks=pytest.mark.ci)])
def test_a_process_that_is_silent_too_long_is_given_up_but_not_before(silent, tmp_path):
    group = Group(tmp_path / "run", *LONG, "silence_timeout=6")
    group.send(signal.SIGSTOP, silent, step=5)
    time.sleep(2)
    group.processes[silent].send_signal(signal.SIGCONT)
    before = group.step
    group.send(signal.SIGSTOP, silent, step=before + 5)
    group.processes[1 - silent].wait(60)
    group.processes[silent].send_signal(signal.SIGCONT)
    for status, _, log in group.end():
        assert status == ABORTED, log
        assert log.endswith(f": {AGAIN}\n"), log
    assert f"vit-jax: process {silent} on " in log or silent == 0


@pytest.mark.slow
@pytest.mark.ci
def test_a_mistake_that_one_process_meets_in_mid_run_ends_the_other_too(tmp_path):
    folder = tmp_path / "images"
    chance = np.random.default_rng(0)
    for i in range(80):
        path = folder / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), chance.integers(256, size=(8, 8, 3), dtype=np.uint8))
    shutil.copytree(folder / "train", folder / "test")
    path.write_bytes(path.read_bytes()[:60])
    fields = ("eval_every=0", f"dataset={folder}", "batch=4", "accum_steps=1", "silence_timeout=4")
    ends = Group(tmp_path / "run", *fields).end()
    assert sorted(status for status, *_ in ends) == [ABORTED, 2], ends
    for i, (status, _, log) in enumerate(ends):
        assert "Traceback" not in log
        last = log.splitlines()[-1]
        if status == 2:
            assert last.startswith(f"vit-jax: {path}: ")
        else:
            assert last.startswith(f"vit-jax: process {1 - i} on ")


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
@pytest.mark.ci
def test_sigterm_to_one_process_stops_both_at_one_step_and_one_process_goes_on(tmp_path):
    workdir = tmp_path / "run"
    group = Group(workdir, *LONG, "sharding=fsdp")
    group.send(signal.SIGTERM, process=1, step=5)
    (first, text, log), (second, _, silence) = group.end()
    assert (first, second) == (75, 75), log + silence
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert text.startswith(f"stopped by SIGTERM at step {saved:,} of 1,000,000, saved in")

    group = Group(workdir, *LONG, count=1)
    group.send(signal.SIGTERM, process=0, step=saved + 3)
    ((status, _, log),) = group.end()
    assert status == 75, log
    assert f"going on from step {saved}, " in log


@pytest.mark.slow
def test_ctrl_c_to_one_process_stops_both(tmp_path):
    group = Group(tmp_path / "run", *LONG)
    group.send(signal.SIGINT, process=1, step=5)
    (first, text, log), (second, *_) = group.end()
    assert (first, second) == (75, 75), log
    assert text.startswith("stopped by SIGINT at step ")


@pytest.mark.slow
@pytest.mark.ci
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


def meeting(*arguments, seconds=60, **environment):
    """Exit status and last line of each of several processes that only meet, at once."""
    program = (
        "import sys\n"
        "from vit_jax.training import distributed\n"
        f"distributed.INITIALIZATION_S = {seconds}\n"
        "address, *numbers = sys.argv[1:]\n"
        "with distributed.exit_with_others(1.0):\n"
        "    distributed.initialize(address or None, *[int(n) for n in numbers] or [None, None])\n"
        "    print('met', distributed.allgather(distributed.is_main_process()))\n"
    )
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, own)],
            env=os.environ | path | environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own, variables in arguments
    ]
    texts = [process.communicate(timeout=200)[0] for process in started]
    return [(p.returncode, text.strip()) for p, text in zip(started, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.ci
def test_who_waits_in_vain_says_so_and_numbers_that_do_not_fit_are_told():
    address = f"127.0.0.1:{free_port()}"
    ((status, text),) = meeting(((address, 2, 0), {}), seconds=2)
    assert status == ABORTED
    assert text.startswith("vit-jax: process 0: not all of 2 processes came within 2 s: look why")
    address = f"127.0.0.1:{free_port()}"
    _, (status, text) = meeting(((address, 2, 0), {}), ((address, 3, 1), {}))
    assert status == 2, text
    assert "process 1 of 3 came to 2 processes: give every process the same" in text


@pytest.mark.slow
@pytest.mark.ci
def test_tasks_of_slurm_find_each_other():
    shared = dict(JOB_ID=free_port(), NTASKS=2, STEP_NUM_TASKS=2, STEP_NODELIST="localhost")
    tasks = [
        (("",), {f"SLURM_{k}": str(v) for k, v in dict(shared, PROCID=i, LOCALID=i).items()})
        for i in (0, 1)
    ]
    assert meeting(*tasks) == [(0, "met [True, False]")] * 2


def test_a_process_without_others_stays_alone(monkeypatch):
    initialize("localhost:1", 1, 0)
    initialize()  # No cluster is found here.
    # JAX would give the only task of a step one of its GPUs.
    for name, value in dict(STEP_NUM_TASKS=1, PROCID=0, LOCALID=0, NTASKS=1).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    initialize()
    assert allgather("me") == ["me"]
    # Of a pod that is none of a job's, JAX misses what only a job's have.
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: {}["job-name"])
    initialize()
    with pytest.raises(UserError, match="mine"), exit_with_others(1.0):
        raise UserError("mine")


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
        initialize(*given)


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"can't listen on port {port} \(Address already in"):
            initialize(f"127.0.0.1:{port}", 2, 0)


# What JAX 0.10 and 0.11 print between their log's head and their stack.
DEATHS = {
    "absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
    "1\n3\nThe tasks have crashed. Check the task logs": "process 1 on b, process 3 ended, see its",
    "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout."
    " This indicates that the remote task has failed": "process 1 on b ended, see its log, or gave",
    "DEADLINE_EXCEEDED: Barrier timed out.\n# of tasks that reached the barrier: 1/2.\nThe first "
    "task at the barrier: 1. Some timed out task names:\n0\n": "process 1 on b ended before",
    "absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task "
    "was preempted": "process 0 on a ended, see its log, or can't be reached",
    "absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.Coordination"
    "Service/Heartbeat\n": "process 0 on a ended, see its log, or can't be reached",
    "absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.Coordination"
    "Service/RegisterTask\n": "process 2: not all of 4 processes came within 300 s",
    "absl::Status: INVALID_ARGUMENT: Unexpected task registered with task=2\n\nRPC: /xla."
    "coordination.CoordinationService/RegisterTask": "process 2 of 4 does not fit to the others",
    "absl::Status: ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer "
    "incarnation.\n\nRPC: RegisterTask": "process 2 of 4 does not fit to the others",
    "absl::Status: OTHER: not known": "JAX ended process 2 (OTHER: not known): start",
}


@pytest.mark.parametrize("text", DEATHS)
def test_what_jax_prints_as_it_ends_a_process_becomes_one_line(text):
    assert explain(text, 2, 4, "300", ["a", "b"]).startswith(DEATHS[text])


LOGS = [
    ("a warning\n[Gloo] Rank 0 is connected\nanother\n", "a warning\nanother\n"),
    # An error that was not the end is shown as it is.
    ("E1127 9 coordination_service.cc] oh\nno\n", "E1127 9 coordination_service.cc] oh\nno\n"),
    (
        f'first\n{HOSTS}["a"]\nE1127 9 coordination_service\nF1127 9 client.h:80] Terminating: '
        "Task 0 heartbeat timeout\n*** Check failure stack trace: ***\n    @  0x7fe x\n",
        f"first\nvit-jax: process 0 on a ended, see its log, or gave no sign of life: {AGAIN}\n",
    ),
]


@pytest.mark.parametrize(("logs", "shown"), LOGS)
def test_what_else_its_c_code_prints_is_passed_on(logs, shown):
    command = [sys.executable, "-I", last_words.__file__, "1", "2", "300"]
    done = subprocess.run(command, input=logs, capture_output=True, text=True, check=True)
    assert done.stdout == shown


@pytest.mark.slow
def test_junk_on_the_coordinators_port_harms_no_run(tmp_path):
    group, chance, sent = Group(tmp_path / "run", "total_steps=20"), np.random.default_rng(0), 0
    while any(process.poll() is None for process in group.processes):
        with contextlib.suppress(OSError), socket.socket() as connection:
            # Bound: else it might be given the port that it wants to reach, and reach itself.
            connection.bind(("127.0.0.1", 0))
            connection.connect(("127.0.0.1", group.port))
            connection.sendall((b"GET / HTTP/1.1\r\n\r\n", chance.bytes(5000))[sent % 2])
            sent += 1
        time.sleep(0.02)
    assert sent > 20
    assert [process.returncode for process in group.processes] == [0, 0]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 20
