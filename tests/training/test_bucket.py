"""A run whose workdir is in a bucket is the run that it would be in a folder."""

import random
import signal
import threading
import time

import pytest

from tests.group import Group
from vit_jax import load
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.files import as_path
from vit_jax.training import run, workdir
from vit_jax.training.outputs import evaluate_workdir
from vit_jax.training.workdir import MetricsWriter, read_metrics

OUTPUTS = {"config.json", "data.json", "metrics.jsonl", "checkpoints", "events"}
OUTPUTS |= {"weights.npz", "weights.json", "report.html", "report.png"}


def left(folder) -> tuple[bytes, list[dict]]:
    """The weights and the metrics of a run, without times."""
    lines = read_metrics(folder / "metrics.jsonl")
    lines = [{k: v for k, v in x.items() if not k.startswith("time/")} for x in lines]
    return (as_path(folder) / "weights.npz").read_bytes(), lines


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.usefixtures("no_image")
def test_a_run_in_a_bucket_leaves_what_it_leaves_in_a_folder(bucket, tiny, whole, capsys):
    result = run(tiny("profile=(12,13)"), bucket)
    assert (result.finished, result.step) == (True, 40)
    names = {path.name.partition(".out.")[0] for path in bucket.iterdir()}
    assert names == OUTPUTS | {"profile"}
    assert left(bucket) == left(whole)
    assert "nothing to do" in run(tiny(), bucket).summary
    assert load(bucket).labels == load(whole).labels
    assert main(["evaluate", str(bucket)]) == main(["report", str(bucket)]) == 0

    # As if it had been killed after step 30, with a checkpoint of step 40 that is damaged.
    for name in ("weights.npz", "report.png"):
        (bucket / name).unlink()
    assert "The run has not finished" in evaluate_workdir(bucket).note
    (data,) = (bucket / "checkpoints" / "40" / "state" / "d").iterdir()
    data.write_bytes(data.read_bytes()[:-9])
    run(tiny(), bucket)
    assert left(bucket) == left(whole)
    assert "damaged in" in capsys.readouterr().err
    assert (bucket / "checkpoints" / "40.damaged").exists()


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("gs://nowhere/run", "gs://nowhere/run/lock: there is no such bucket or object"),
        ("gs://closed/run", "gs://closed/run/lock: these credentials may not do that"),
        ("s3://bucket/run", "s3://bucket/run can't be used: expected a folder or gs://"),
    ],
)
def test_a_workdir_that_cannot_be_used_is_told_at_once(bucket, tiny, place, problem):
    with pytest.raises(UserError, match=problem):
        run(tiny(), place)


def test_metrics_appear_while_a_run_goes_on_and_no_step_waits_for_them(bucket, monkeypatch):
    monkeypatch.setattr(workdir, "UPLOAD_SECONDS", 0)
    uploads, sync = threading.Semaphore(0), workdir.GrowingFiles.sync

    def slow_sync(files):
        if threading.current_thread() is not threading.main_thread():
            assert uploads.acquire(timeout=60)
        sync(files)

    monkeypatch.setattr(workdir.GrowingFiles, "sync", slow_sync)
    writer = MetricsWriter(bucket, 0)
    for step in range(1, 5):
        writer.write(step, {"train/loss": 0.5})  # Returns, though nothing can be uploaded yet.
    assert not read_metrics(bucket / "metrics.jsonl")
    uploads.release()
    deadline = time.monotonic() + 60
    while not read_metrics(bucket / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [record["step"] for record in read_metrics(bucket / "metrics.jsonl")] == [1, 2, 3, 4]
    uploads.release()
    writer.close()


def end_of(group: Group) -> list[int]:
    return [status for status, _, _ in group.end()]


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(bucket, whole):
    dice = random.Random(0)
    for i in range(8):
        group = Group(bucket, count=1)
        group.wait_for(5 * i)
        time.sleep(dice.uniform(0, 0.5))
        group.processes[0].kill()
        group.end()
    ((status, text, errors),) = Group(bucket, count=1).end()
    assert status == 0, errors
    assert left(bucket) == left(whole), text


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_that_are_killed_and_stopped_end_as_two_in_a_folder(bucket, tmp_path):
    undisturbed = Group(tmp_path / "run")
    killed = Group(bucket)
    killed.send(signal.SIGKILL, 1, 10)
    assert 0 not in end_of(killed)
    stopped = Group(bucket)
    stopped.send(signal.SIGTERM, 1, 20)
    assert end_of(stopped) in ([75, 75], [0, 0])
    assert end_of(Group(bucket)) == [0, 0]
    assert end_of(undisturbed) == [0, 0]
    assert left(bucket) == left(tmp_path / "run")
