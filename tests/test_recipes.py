"""The recipes for real machines do here what they can do without those machines."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from vit_jax import cli, load
from vit_jax.training.workdir import read_metrics

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "scripts"
TINY = REPOSITORY / "tests" / "tiny.py"
PATIENCE = 240
PATH = os.pathsep.join(p for p in [str(REPOSITORY), *sys.path] if p)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts a made-up program on the PATH; it can write to the file $SAID."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))

    def make(name: str, *lines: str) -> None:
        (folder / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
        (folder / name).chmod(0o755)

    return make


@pytest.fixture
def said(tmp_path):
    return lambda: (tmp_path / "said").read_text().splitlines()


def output(*command, status=0, **variables) -> str:
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


# The launcher.

LAUNCH = "import launch, sys; launch.PATIENCE = {}; sys.exit(launch.main())"
# What each process does: `number` is its own, `others` what the launcher added.
CHILD = "import os, sys, time, signal; number = int(sys.argv[-1][-1]); others = sys.argv[-3:-1]; "


def launcher(count, child, *options, patience=20.0):
    command = [sys.executable, "-c", LAUNCH.format(patience), f"-n={count}", *options, "--"]
    return [*command, sys.executable, "-c", CHILD + child]


@pytest.fixture(autouse=True)
def _scripts_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{SCRIPTS}{os.pathsep}{PATH}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_each_process_is_told_its_number_and_gpu_and_is_told_apart():
    child = "print(others, os.environ['CUDA_VISIBLE_DEVICES'], file=sys.stderr); "
    child += "sys.stdout.write('result\\n')"
    text = output(*launcher(2, child))
    addresses = re.findall(r"--coordinator=127.0.0.1:(\d+)', '--num-processes=2'\]", text)
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]
    lines = sorted(text.splitlines())
    assert [line[:3] + line[-1] for line in lines] == ["[0]0", "[1]1", "rest", "rest"]
    text = output(*launcher(2, child), CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert sorted(line[-3:] for line in text.splitlines() if "]" in line) == ["4,5", "6,7"]
    for visible in ("3", "3,4,5"):
        text = output(*launcher(2, child), CUDA_VISIBLE_DEVICES=visible, status=2)
        assert f"-n is 2, with CUDA_VISIBLE_DEVICES '{visible}'" in text


def test_if_one_fails_the_others_may_say_why_and_are_then_ended():
    child = "number and sys.exit(7); time.sleep(1); print('why', file=sys.stderr, flush=True); "
    text = output(*launcher(3, child + "time.sleep(100)", patience=2), status=7)
    assert text.count("why") == 1
    assert "launch: process 1 ended with status 7" in text or "launch: process 2 ended" in text
    assert "launch: ending process 0 2 s later" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_once_and_what_was_asked_for_is_not_undone(number):
    child = (
        "got = []; note = lambda n, _: got.append(n); "
        "[signal.signal(n, note) for n in (2, 15)]; print('up', file=sys.stderr, flush=True); "
        "[time.sleep(.05) for _ in iter(lambda: bool(got), True)]; time.sleep(.3); "
        "print('got', got, file=sys.stderr, flush=True); sys.exit(75)"
    )
    command = launcher(2, child, "--restarts=3")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert {process.stderr.readline(), process.stderr.readline()} == {"[0] up\n", "[1] up\n"}
    process.send_signal(number)
    rest = process.communicate(timeout=PATIENCE)[1]
    assert sorted(rest.splitlines()) == [f"[{i}] got [{int(number)}]" for i in (0, 1)]
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("child", "starts", "status"),
    [
        ("sys.exit(75)", 3, 75),
        ("number or os.kill(os.getpid(), 9)", 3, 137),
        ("sys.exit(2)", 1, 2),
        ("sys.exit(0)", 1, 0),
    ],
)
def test_all_are_started_again_after_75_and_a_sudden_death_only(child, starts, status):
    child = "print('start', file=sys.stderr, flush=True); " + child
    text = output(*launcher(2, child, "--restarts=2"), status=status)
    assert text.count("start\n") == 2 * starts
    assert text.count(": starting again (") == starts - 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of the same run in one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    output(sys.executable, "-m", "vit_jax", *arguments(workdir), PYTHONPATH=PATH)
    return workdir


def arguments(workdir) -> list[str]:
    return ["train", f"--config={TINY}", f"--workdir={workdir}", "--config.optim_dtype=float32"]


def assert_same_results(workdir, reference):
    found, expected = (read_metrics(w / "metrics.jsonl")[-1] for w in (workdir, reference))
    assert found["step"] == expected["step"] == 40
    assert found["test/top1"] == pytest.approx(expected["test/top1"], abs=3e-3)
    assert found["test/loss"] == pytest.approx(expected["test/loss"], rel=2e-4)
    head, expected = (load(w).params["head"]["kernel"] for w in (workdir, reference))
    np.testing.assert_allclose(head, expected, atol=2e-4)


@pytest.mark.slow
def test_a_run_of_2_that_loses_a_process_is_started_again_and_one_of_4_goes_on(alone, tmp_path):
    workdir = tmp_path / "run"
    train = [sys.executable, "-m", "vit_jax", *arguments(workdir), "--json"]
    train += ["--config.progress_every=1"]
    launch = [sys.executable, "-c", LAUNCH.format(5), "--restarts=1"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(
        [*launch, "-n=2", "--", *train, "--config.progress_every=1"], **pipes
    )
    log = []

    def read_until(pattern):
        for line in process.stderr:
            log.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError("".join(log))

    def kill():
        found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "process-id=1"], **pipes)
        os.kill(int(found.stdout), signal.SIGKILL)

    read_until(r"^\[0\] step 10/40")
    while not (workdir / "checkpoints" / "10").exists():
        time.sleep(0.01)
    kill()
    read_until(r"^launch: process \d ended")
    read_until(r"^launch: status \d+: starting again \(1 of 1\)")
    read_until(r"^\[0\] going on from step")
    kill()
    process.communicate(timeout=PATIENCE)
    assert process.returncode > 128, "".join(log)

    text = subprocess.run([*launch, "-n=4", "--", *train], **pipes, timeout=PATIENCE)
    assert text.returncode == 0, text.stderr
    assert json.loads(text.stdout)["finished"]
    assert_same_results(workdir, alone)


# Slurm.

SRUN = (
    '[ "$1 $2" = "--kill-on-bad-exit=0 --wait=90" ] || exit 9',
    "shift 2; highest=0; pids=()",
    "for i in $(seq 0 $((SLURM_NTASKS - 1))); do",
    "  export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST",
    '  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)',
    "done",
    'for p in "${pids[@]}"; do wait "$p"; s=$?; [ $s -gt $highest ] && highest=$s; done',
    "exit $highest",
)
BATCH = dict(SLURM_NTASKS="2", SLURM_JOB_NODELIST="localhost", SLURM_GPUS_ON_NODE="8")


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, 0, False), (75, 99, True), (2, 0, False), (1, 0, False), (137, 3, True), (134, 20, False)],
)
def test_a_job_of_slurm_queues_itself_again_if_that_helps(status, restarts, again, programs, said):
    programs("srun", *SRUN)
    programs("scontrol", 'echo "$@" >> $SAID')
    programs("vit-jax", 'echo "$JAX_LOCAL_DEVICE_IDS $@" >> $SAID', f"exit {status}")
    counts = dict(SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    output(SCRIPTS / "slurm.sh", "--workdir=a b", **BATCH, **counts, status=status)
    assert said() == ["0,1,2,3,4,5,6,7 train --workdir=a b"] * 2 + ["requeue 7"] * again


@pytest.mark.slow
def test_tasks_of_slurm_train_together(alone, programs, tmp_path):
    programs("srun", *SRUN)
    programs("vit-jax", f'exec {shlex.quote(sys.executable)} -m vit_jax "$@"')
    text = output(
        *(SCRIPTS / "slurm.sh", *arguments(tmp_path / "run")[1:], "--json"),
        **BATCH,
        SLURM_JOB_ID=str(os.getpid()),
    )
    assert "2 x cpu" in text
    assert_same_results(tmp_path / "run", alone)


# Cloud TPUs.

# A TPU that is there after having been asked for twice, and is taken away in the first run.
GCLOUD = (
    'cd "$STATE"; echo "$3 $4 ${*:5}" >> $SAID',
    'case "$3 $4" in',
    '  "queued-resources create") echo WAITING > queue ;;',
    '  "queued-resources delete") rm -f queue machine ;;',
    '  "queued-resources describe") cat queue 2>/dev/null || exit 1',
    "     [ $(cat queue) = WAITING ] && echo ACTIVE > queue && echo READY > machine ;;",
    '  "tpu-vm describe") cat machine 2>/dev/null || exit 1 ;;',
    '  "tpu-vm ssh") [[ "$*" = *vit-jax\\ train* ]] || exit 0',
    "     s=$(head -1 ends); sed -i 1d ends; [ $s = 255 ] && echo PREEMPTED > machine; exit $s ;;",
    "esac",
    "exit 0",
)


def on_tpu(tmp_path, programs, said, *ends, status):
    programs("gcloud", *GCLOUD)
    (tmp_path / "ends").write_text("\n".join(map(str, ends)))
    variables = dict(NAME="vit", ZONE="z", TYPE="v5litepod-16", RUNTIME="v2-alpha-tpuv5-lite")
    variables |= dict(SETUP="mount it", PAUSE="0.01", STATE=str(tmp_path), ATTEMPTS="4")
    output(SCRIPTS / "tpu.sh", "--config=a b", "--workdir=/s", **variables, status=status)
    return [line for line in said() if "describe" not in line]


def test_a_tpu_that_is_taken_away_is_asked_for_again(tmp_path, programs, said):
    calls = on_tpu(tmp_path, programs, said, 255, 75, 0, status=0)
    create = (
        "queued-resources create vit --node-id=vit --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot --zone=z --quiet"
    )
    delete = "queued-resources delete vit --force --zone=z --quiet"
    ssh = "tpu-vm ssh vit --worker=all --ssh-flag=-o ServerAliveInterval=30 --command="
    kinds = [c if "ssh" not in c else re.sub(r".*--command=(.*) --zone.*", r"\1", c) for c in calls]
    train = "exec ~/venv/bin/vit-jax train '--config=a b' '--workdir=/s'"
    kinds = [k.rpartition("; ")[2] for k in kinds]
    start = ["mount it", train]
    assert kinds == [create, *start, delete, create, *start, *start, delete]
    assert all(c.startswith(ssh) for c in calls if "ssh" in c)


def test_a_mistake_on_a_tpu_is_not_repeated_nor_is_anything_for_ever(tmp_path, programs, said):
    calls = on_tpu(tmp_path, programs, said, 2, status=2)
    assert sum("vit-jax train" in c for c in calls) == 1
    calls = on_tpu(tmp_path, programs, said, *[134] * 9, status=134)
    assert sum("vit-jax train" in c for c in calls) == 5


# Kubernetes.


def test_the_jobset_starts_one_process_a_pod_and_repeats_no_mistake(programs, said):
    manifest = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (hosts,) = manifest["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert manifest["spec"]["coordinator"]["replicatedJob"] == hosts["name"]
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    # A mistake fails the job for a reason that fails the set; anything else starts it again.
    (rule,), (whole,) = job["podFailurePolicy"]["rules"], manifest["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert cli.EXIT_USER_ERROR in rule["onExitCodes"]["values"]
    assert (whole["action"], whole["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (container,) = job["template"]["spec"]["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    count = job["completions"]
    assert job["parallelism"] == count

    programs("vit-jax", 'printf "%s\\n" "$@" > $SAID')
    where = dict(COORDINATOR="vit-hosts-0-0.vit", JOB_COMPLETION_INDEX="1")
    output(*container["command"], *container["args"], **where)
    options = ["--coordinator=vit-hosts-0-0.vit:12355", f"--num-processes={count}"]
    assert said() == ["train", *options, "--process-id=1", *container["args"]]


# What the pages say.


@pytest.mark.parametrize("page", ["machines.md", "scaling.md"])
def test_the_commands_of_a_page_are_bash_and_options_of_vit_jax_exist(page):
    text = (REPOSITORY / "docs" / page).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        output("bash", "-n", "-c", block)
    known = output(sys.executable, "-m", "vit_jax", "train", "--help")
    for line in re.findall(r"vit-jax train(.*(?:\\\n.*)*)", "".join(blocks)):
        for option in re.findall(r"(--[a-z-]+)[= ]", line):
            assert option in known, line
