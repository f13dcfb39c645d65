"""A run: what it leaves, how it goes on, and what it refuses."""

import gc
import json
import logging
import re
import shutil
import signal
import threading

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict

from tests.training.conftest import run_module
from vit_jax import data, load
from vit_jax.checkpoints import open_arrays
from vit_jax.errors import UserError
from vit_jax.evaluation.images import evaluate_images
from vit_jax.training import TrainState, default_config, make_optimizer, outputs, run
from vit_jax.training.checkpoints import Checkpoints
from vit_jax.training.distributed import StopSignal
from vit_jax.training.inputs import DevicePrefetcher, RunData, open_data
from vit_jax.training.optimizer import schedule_of
from vit_jax.training.outputs import evaluate_workdir
from vit_jax.training.workdir import open_workdir, read_metrics, write_config

pytestmark = pytest.mark.usefixtures("no_image")


def times(workdir):
    """When each file was last changed, but for the lock."""
    return {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != "lock"}


def test_a_run_leaves_weights_figures_a_report_and_its_configuration(whole, tiny):
    names = {p.name for p in whole.iterdir() if "tfevents" not in p.name}
    assert names == {
        *("checkpoints", "config.json", "data.json", "lock", "metrics.jsonl"),
        *("report.html", "report.png", "weights.json", "weights.npz"),
    }
    assert json.loads((whole / "config.json").read_text())["batch"] == tiny().batch
    lines = read_metrics(whole / "metrics.jsonl")
    assert [x["step"] for x in lines if "train/loss" in x] == list(range(5, 41, 5))
    assert [x["step"] for x in lines if "test/loss" in x] == [20, 40]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_the_weights_it_leaves_give_the_accuracy_it_reports(whole):
    scores = evaluate_images(load(whole), data.open_source("digits", "test"))
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert (scores.count, scores.top1) == (360, last["test/top1"])
    assert scores.loss == pytest.approx(last["test/loss"], rel=1e-6)


def test_the_first_step_which_is_compiled_has_no_speed_yet(tiny, tmp_path, capsys):
    run(tiny("progress_every=1", "total_steps=4"), tmp_path)
    first, second = read_metrics(tmp_path / "metrics.jsonl")[:2]
    assert set(second) - set(first) == {
        *("time/images_per_s", "time/images_per_s_per_device", "time/data_wait"),
    }
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step 1/4")]
    assert "        - img/s  data wait    -  eta -:--:--  grad " in line


def test_the_learning_rate_in_the_metrics_is_the_one_that_was_applied(whole, tiny):
    schedule = schedule_of(tiny(), 40)
    for line in read_metrics(whole / "metrics.jsonl"):
        if "train/lr" in line:
            # But for the last bit, which the compiled step rounds otherwise.
            assert line["train/lr"] == pytest.approx(float(schedule(line["step"] - 1)), rel=1e-6)


@pytest.mark.slow
@pytest.mark.ci
def test_equal_seeds_give_equal_runs_and_another_seed_another(whole, tiny, tmp_path, outcome):
    run(tiny("threads=2", "prefetch=5"), tmp_path / "same")
    run(tiny("seed=1"), tmp_path / "other")
    assert outcome(tmp_path / "same") == outcome(whole)
    weights, lines = outcome(tmp_path / "other")
    assert weights != outcome(whole)[0]
    assert lines != outcome(whole)[1]


def test_a_finished_run_says_so_and_changes_nothing(whole, tiny):
    before = times(whole)
    result = run(tiny(), whole)
    assert result.finished
    assert "has finished its 40 steps, test accuracy" in result.summary
    assert "nothing to do" in result.summary
    assert times(whole) == before


def test_another_configuration_is_refused_with_the_fields_that_differ(whole, tiny):
    before = times(whole)
    with pytest.raises(UserError) as error:
        run(tiny("batch=32", "pp.test=train[:10%]", "prefetch=7"), whole)
    assert "(config.batch 16 -> 32; config.splits.test 'test' -> 'train[:10%]')" in str(error.value)
    assert times(whole) == before


def test_a_mistake_found_before_the_first_step_does_not_bar_the_workdir(tiny, tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'digit'"):
        run(tiny("dataset=digit", "total_steps=4"), tmp_path)
    assert run(tiny("total_steps=4"), tmp_path).finished


def test_a_mistake_found_before_the_first_step_leaves_no_folder_that_was_not_there(tiny, tmp_path):
    with pytest.raises(UserError, match="unknown dataset"):
        run(tiny("dataset=digit"), tmp_path / "new" / "run")
    with pytest.raises(UserError, match="unknown dataset"):
        run(tiny("dataset=digit"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_storage_is_no_workdir(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"s3://b/run can.t be used: expected a folder or gs:"):
        run(tiny(), "s3://b/run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints", "weights.npz", "0.jpg", "cat/0.png", "main.py"]
)
def test_a_folder_with_anything_but_a_run_is_refused(name, tiny, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    entry = name.split("/")[0]
    with pytest.raises(UserError, match=f"holds {entry} but no config.json, so it is no run's"):
        run(tiny(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [entry]
    assert (tmp_path / name).read_text() == "precious"


def test_of_many_things_in_a_folder_that_is_refused_a_few_are_named(tiny, tmp_path):
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds a, b, c and 2 more but no config\.json"):
        run(tiny(), tmp_path)


@pytest.mark.parametrize("name", ["run.log", "slurm-7.out", ".gitkeep", "lost+found", "data.json"])
def test_logs_and_what_is_hidden_may_lie_in_the_folder_before(name, tiny, tmp_path):
    (tmp_path / name).write_text("mine")
    with open_workdir(tmp_path, tiny()) as folder:
        assert folder == epath.Path(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("text", [None, "", "[]", "\xff"])
def test_lost_fingerprints_of_the_images_are_written_anew(text, tiny, tmp_path, caplog):
    folder, prints = epath.Path(tmp_path), {"train": "1", "test": "2"}
    write_config(folder, tiny(), prints)
    file = tmp_path / "data.json"
    good = file.read_bytes()
    file.unlink() if text is None else file.write_text(text, encoding="latin-1")
    write_config(folder, tiny(), prints)
    assert "data.json is lost or damaged and is written anew" in caplog.text
    assert file.read_bytes() == good


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\0\xff"])
def test_a_damaged_config_json_is_refused(tmp_path, tiny, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        run(tiny(), tmp_path)


@pytest.mark.slow
@pytest.mark.ci
def test_images_that_have_changed_since_the_run_began_are_refused(tiny, tmp_path, monkeypatch):
    for name in ("train/dark", "train/bright", "test/dark", "test/bright"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            image = np.full((8, 8, 3), 10 * len(name) + i, np.uint8)
            cv2.imwrite(str(tmp_path / "photos" / name / f"{i}.png"), image)
    fields = (f"dataset={tmp_path / 'photos'}", "total_steps=4", "batch_eval=4")
    with monkeypatch.context() as patch:
        _Interrupted.in_step(patch, 2)
        assert not run(tiny(*fields), tmp_path / "run").finished
    new = tmp_path / "photos" / "train" / "dark" / "new.png"
    shutil.copy(new.with_name("0.png"), new)
    with pytest.raises(UserError, match=r"the train images of .*photos have changed since the run"):
        run(tiny(*fields), tmp_path / "run")
    new.unlink()
    assert run(tiny(*fields), tmp_path / "run").finished


class _Interrupted:
    """Ways to send this process a signal at one moment of a run."""

    @staticmethod
    def in_step(monkeypatch, step):
        make = run_module.make_step_from_config

        def make_interrupting(*args, **kwargs):
            train_step = make(*args, **kwargs)

            def interrupting(state, batch):
                state, metrics = train_step(state, batch)
                if int(state.step) == step:
                    signal.raise_signal(signal.SIGTERM)
                return state, metrics

            return interrupting

        monkeypatch.setattr(run_module, "make_step_from_config", make_interrupting)

    @staticmethod
    def in_evaluation(monkeypatch, number, after_batches):
        read, count = RunData.eval_batches, 0

        def interrupting(self):
            nonlocal count
            count += 1
            for i, batch in enumerate(read(self)):
                if count == number and i == after_batches:
                    signal.raise_signal(signal.SIGINT)
                yield batch
            if count == number and i + 1 == after_batches:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(RunData, "eval_batches", interrupting)


SLOW = (pytest.mark.slow, pytest.mark.ci)


@pytest.mark.parametrize("step", [13, *(pytest.param(step, marks=SLOW) for step in (1, 20, 39))])
def test_a_run_stopped_by_sigterm_goes_on_exactly(
    step, whole, tiny, tmp_path, outcome, monkeypatch, saved_steps
):
    with monkeypatch.context() as patch:
        _Interrupted.in_step(patch, step)
        result = run(tiny(), tmp_path)
    assert (result.step, result.finished) == (step, False)
    assert result.summary == (
        f"stopped by SIGTERM at step {step} of 40, saved in {tmp_path / 'checkpoints'}: "
        "start the same command again to go on"
    )
    assert max(saved_steps(tmp_path)) == step
    assert not (tmp_path / "weights.npz").exists()
    assert run(tiny(), tmp_path).finished
    assert outcome(tmp_path) == outcome(whole)


# An evaluation has three batches; the second one is that of the last step.
@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("number", "after"),
    [(1, 0), *(pytest.param(1, n, marks=SLOW) for n in (2, 3)), (2, 1), (2, 3)],
)
def test_a_stop_during_an_evaluation_loses_nothing(
    number, after, whole, tiny, tmp_path, outcome, monkeypatch
):
    with monkeypatch.context() as patch:
        _Interrupted.in_evaluation(patch, number, after)
        result = run(tiny(), tmp_path)
    assert result.step == 20 * number
    complete = (number, after) == (2, 3)  # Nothing was left to do.
    assert result.finished == complete
    assert run(tiny(), tmp_path).finished
    assert outcome(tmp_path) == outcome(whole)


def test_a_stop_during_an_evaluation_that_has_read_nothing_yet_is_a_stop(
    tiny, tmp_path, monkeypatch
):
    read = RunData.eval_batches

    def interrupting(self):
        for i, batch in enumerate(read(self)):
            if i == 1:
                signal.raise_signal(signal.SIGINT)
            yield batch | {"mask": np.zeros_like(batch["mask"])}

    with monkeypatch.context() as patch:
        patch.setattr(RunData, "eval_batches", interrupting)
        result = run(tiny("total_steps=4", "eval_every=2"), tmp_path)
    assert (result.step, result.finished) == (2, False)


# What fails after the last step loses nothing.


def broken(*args, **kwargs):
    raise RuntimeError("no font\nat all")


def test_a_report_that_fails_is_said_and_made_by_the_next_start(
    whole, tiny, tmp_path, outcome, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_make_report", broken)
        result = run(tiny(), tmp_path)
    assert result.finished
    assert result.summary.endswith(
        f"{tmp_path} holds weights.npz, but its report can't be made (RuntimeError: no font): mend "
        "the cause, then start the same command again"
    )
    assert outcome(tmp_path) == outcome(whole)
    assert run(tiny(), tmp_path).summary.endswith("and the TensorBoard events")
    assert "has finished, but it lacks report.html, report.png: this is made again" in caplog.text
    assert outcome(tmp_path) == outcome(whole)
    assert "nothing to do" in run(tiny(), tmp_path).summary


def test_an_evaluation_that_fails_after_the_last_step_loses_no_step(
    whole, tiny, tmp_path, outcome, monkeypatch, saved_steps
):
    def failing(*args):
        raise UserError("photos/3.jpg can't be read")

    fields = ("eval_every=0", "checkpoint_every=0")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", failing)
        with pytest.raises(UserError, match=r"3\.jpg can't be read"):
            run(tiny(*fields), tmp_path)
    assert outcome(tmp_path)[0] == outcome(whole)[0]
    assert saved_steps(tmp_path) == [40]
    monkeypatch.setattr(run_module, "make_step_from_config", lambda *args: broken)
    assert run(tiny(*fields), tmp_path).finished
    assert outcome(tmp_path)[0] == outcome(whole)[0]


@pytest.mark.parametrize(
    "lost", ["half of weights.npz", "a bit of weights.npz", "weights.json", "report.html"]
)
def test_what_a_finished_run_has_lost_is_made_again_from_its_checkpoint(
    lost, whole, tiny, tmp_path, outcome, caplog, monkeypatch
):
    workdir = shutil.copytree(whole, tmp_path / "run")
    weights, file = workdir / "weights.npz", workdir / lost
    if lost.startswith("half"):
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif lost.startswith("a bit"):
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    else:
        file.unlink()
    monkeypatch.setattr(run_module, "make_step_from_config", lambda *args: broken)
    result = run(tiny(), workdir)
    assert result.finished
    assert "finished 40 steps" in result.summary
    assert lost.split()[-1] in caplog.text
    assert outcome(workdir) == outcome(whole)
    assert load(workdir).labels == load(whole).labels


@pytest.mark.parametrize("lost", ["half of weights.npz", "report.png"])
def test_what_a_finished_run_has_lost_with_its_checkpoints_is_told(lost, whole, tiny, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    weights = workdir / "weights.npz"
    if lost.startswith("half"):
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        (workdir / lost).unlink()
    shutil.rmtree(workdir / "checkpoints")
    before = times(workdir)
    with pytest.raises(UserError, match=f"{lost.split()[-1]}.*no checkpoint of step 40 to make"):
        run(tiny(), workdir)
    assert times(workdir) == before


@pytest.mark.slow
@pytest.mark.ci
def test_lines_of_metrics_that_are_lost_are_told_and_the_best_weights_so_far_are_kept(
    tiny, tmp_path, capsys, monkeypatch
):
    fields = ("keep_best", "eval_every=10", "total_steps=30")
    with monkeypatch.context() as patch:
        _Interrupted.in_step(patch, 25)
        run(tiny(*fields), tmp_path)
    assert "lost" not in capsys.readouterr().err
    metrics, best = tmp_path / "metrics.jsonl", tmp_path / "weights_best.npz"
    lines, kept = metrics.read_bytes().splitlines(keepends=True), best.read_bytes()
    metrics.write_bytes(b"".join(lines[:2]))  # Steps 5 and 10, no evaluation.
    assert run(tiny(*fields), tmp_path).finished
    assert (
        "; metrics.jsonl has lost lines of steps 10 to 25, and with them how good "
        "weights_best.npz is: kept as weights_best_1.npz\n"
    ) in capsys.readouterr().err
    assert (tmp_path / "weights_best_1.npz").read_bytes() == kept
    assert load(tmp_path / "weights_best_1.npz").labels == tuple("0123456789")
    assert best.exists()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("keep", range(9))
def test_however_many_lines_are_lost_it_is_told(keep, tiny, tmp_path, capsys, monkeypatch):
    fields = ("eval_every=10", "total_steps=30", "checkpoint_every=0")
    with monkeypatch.context() as patch:
        _Interrupted.in_step(patch, 26)
        run(tiny(*fields), tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7  # Five of training, two of evaluation.
    metrics.write_bytes(b"".join(lines[:keep]))
    capsys.readouterr()
    run(tiny(*fields), tmp_path)
    assert ("metrics.jsonl has lost lines" in capsys.readouterr().err) == (keep < 7)


def test_a_kill_before_the_weights_are_written_costs_only_an_evaluation(
    whole, tiny, tmp_path, outcome, monkeypatch
):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), tmp_path)
    assert run(tiny(), tmp_path).finished
    assert outcome(tmp_path) == outcome(whole)


def test_a_second_ctrl_c_ends_at_once_and_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_may_be_started_in_another_thread(tiny, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(run(tiny("total_steps=4"), tmp_path / "run"))
    )
    thread.start()
    thread.join()
    assert results[0].finished


def test_a_run_starts_from_the_weights_of_another(whole, tiny, tmp_path, capsys):
    start = tiny(f"model_or_filename={whole / 'weights.npz'}", "total_steps=1", "warmup_steps=1")
    run(start, tmp_path)
    assert f", from {whole / 'weights.npz'}, 10 classes" in capsys.readouterr().err
    before, after = load(whole).params, load(tmp_path).params
    assert not after["head"]["kernel"].any()  # A new head, and a first update of size 0.
    jax.tree.map(np.testing.assert_array_equal, before["Transformer"], after["Transformer"])


@pytest.mark.slow
@pytest.mark.ci
def test_weights_of_other_channels_are_made_ready_and_the_first_line_says_how(
    whole, tiny, tmp_path, capsys
):
    weights = f"model_or_filename={whole / 'weights.npz'}"
    run(tiny(weights, "pp.train=rgb", "pp.eval=rgb", "total_steps=1", "warmup_steps=1"), tmp_path)
    said = "its first layer, of 1 channels, repeated and scaled by 1/3 for images of 3"
    assert said in capsys.readouterr().err


def images_of_12_bits(classes=2, per_class=12, channels=1):
    """Arrays of 16 bits, of which 12 are used; each class has its own mean."""
    rng = np.random.default_rng(0)
    labels = np.arange(classes * per_class) % classes
    means = 300 + 2500 * labels[:, None, None, None] / classes
    noise = rng.normal(0, 80, (len(labels), 8, 8, channels))
    return np.clip(means + noise, 0, 4095).astype(np.uint16), labels


@pytest.mark.parametrize(
    ("wish", "operation", "told"),
    [
        ("", "levels(0, 65535)", "set --config.levels='12 bit' if they have no more bits"),
        pytest.param(
            *("12 bit", "levels(0, 4095)", "levels(0, 4095) makes of them 0 to 255"),
            marks=[pytest.mark.slow, pytest.mark.ci],
        ),
        pytest.param(
            *("100, 2000", "levels(100, 2000)", "levels(100, 2000) makes of them 0 to 255"),
            marks=[pytest.mark.slow, pytest.mark.ci],
        ),
        pytest.param(
            *("percentile", "levels(", "the 0.1th and 99.9th percentiles of 24 images"),
            marks=[pytest.mark.slow, pytest.mark.ci],
        ),
    ],
)
def test_levels_are_recorded_with_the_weights_and_said(
    wish, operation, told, tiny, tmp_path, capsys
):
    images, labels = images_of_12_bits()
    source = data.from_arrays(images, labels)
    config = tiny("total_steps=2", "batch=8", f"levels={wish}")
    run(config, tmp_path, sources=(source, source))
    assert told in capsys.readouterr().err
    vit = load(tmp_path)
    assert vit.preprocess.startswith(operation)
    batch = next(data.eval_batches(source, data.parse(vit.preprocess), batch_size=24))["image"]
    lo, hi = (ends[0] for ends in data.parse(vit.preprocess).levels)
    expected = np.clip((images.astype(float) - lo) / (hi - lo), 0, 1) * 2 - 1
    np.testing.assert_allclose(batch, expected, atol=1e-5)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    scores = evaluate_images(vit, source)
    assert scores.loss == pytest.approx(last["test/loss"], rel=1e-5)


def test_training_on_more_than_8_bits_is_not_rounded(tiny):
    images, labels = images_of_12_bits()
    source = data.from_arrays(images, labels)
    task = open_data(
        tiny("batch=8", "levels=12 bit", "pp.train=value_range(-1, 1)"), (source, source)
    )
    assert task.train_split[0].dtype == "float32"
    spec = "levels(0, 9)|value_range(-1, 1)"
    fields = (f"pp.train={spec}", f"pp.eval={spec}", "levels=full")
    with pytest.raises(UserError, match="both say what values are black and white"):
        open_data(tiny("batch=8", *fields), (source, source))


def test_weights_that_do_not_fit_the_images_or_the_fields_are_refused(whole, tiny, tmp_path):
    weights = f"model_or_filename={whole / 'weights.npz'}"
    with pytest.raises(UserError, match=r"config\.model\.num_layers is 2, but the weights in .* 1"):
        run(tiny(weights, "model.num_layers=2"), tmp_path / "a")
    with pytest.raises(UserError, match=r"no weights at none\.npz: give "):
        run(tiny("model_or_filename=none.npz"), tmp_path / "c")


def test_training_and_evaluation_have_to_make_images_of_one_shape(tiny, tmp_path):
    with pytest.raises(UserError, match=r"shape \(4, 4, 1\) and evaluation of \(8, 8, 1\)"):
        run(tiny("pp.train=resize(4)"), tmp_path)


@pytest.mark.slow
@pytest.mark.ci
def test_bfloat16_trains_and_leaves_float32_weights(tiny, tmp_path):
    run(tiny("dtype=bfloat16", "total_steps=8"), tmp_path)
    assert {str(x.dtype) for x in jax.tree.leaves(load(tmp_path).params)} == {"float32"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole, tiny, tmp_path, outcome, monkeypatch, capsys, saved_steps
):
    with monkeypatch.context() as patch:
        _Interrupted.in_step(patch, 25)
        run(tiny(), tmp_path)
    assert saved_steps(tmp_path) == [20, 25]
    for path in (tmp_path / "checkpoints" / "25").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(tiny(), tmp_path).finished
    assert re.search(r"\ndamaged in .*: 25 \(.*\); step 20 is used in", capsys.readouterr().err)
    assert (tmp_path / "checkpoints" / "25.damaged").is_dir()
    assert outcome(tmp_path) == outcome(whole)


def test_what_is_saved_is_the_state_at_the_save_though_the_next_steps_take_its_memory(tmp_path):
    tx = make_optimizer(default_config(), 10)
    params = {"kernel": np.random.default_rng(0).standard_normal((2000, 2000), np.float32)}
    state = TrainState.create(params=params, tx=tx)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for i in range(1, 4):
        state = step(state)
        expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpoints.save(i, state)
        for _ in range(5):
            state = step(state)  # While the save is under way.
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(state)[0], expected)
    checkpoints.close()


def test_what_others_log_is_heard_again_after_a_run(tmp_path):
    log = logging.getLogger("absl")
    before = log.level
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert log.level == logging.CRITICAL
    checkpoints.close()
    assert log.level == before


@pytest.mark.parametrize(
    "moment",
    ["open_data", *(pytest.param(m, marks=SLOW) for m in ("make_network", "write_config"))],
)
def test_a_stop_while_a_run_starts_is_heeded(moment, tiny, tmp_path, monkeypatch, capsys):
    begin = getattr(run_module, moment)

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return begin(*args, **kwargs)

    monkeypatch.setattr(run_module, moment, interrupted)
    result = run(tiny(), tmp_path)
    assert (result.step, result.finished) == (0, False)
    assert "stopped by SIGTERM at step 0 of 40, nothing to save yet: start" in result.summary
    assert ", from scratch, 10 classes, " in capsys.readouterr().err


# What a run looks at, evaluates and saves, and when.


@pytest.mark.parametrize("progress_every", [pytest.param(1, marks=SLOW), 40])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(
    progress_every, tiny, tmp_path, saved_steps
):
    config = tiny(
        "base_lr=1e36",
        "optim=sgd",
        "checkpoint_every=1",
        "eval_every=0",
        f"progress_every={progress_every}",
    )
    # The first update of the warm-up has learning rate 0; the second one ruins the weights.
    with pytest.raises(UserError, match=r"at step 2 the param_norm became (nan|inf); what"):
        run(config, tmp_path)
    assert saved_steps(tmp_path) == [1]
    assert not (tmp_path / "weights.npz").exists()


def test_the_loss_is_looked_at_before_a_checkpoint_replaces_a_good_one(tiny, tmp_path, saved_steps):
    config = tiny("base_lr=1e36", "optim=sgd", "checkpoint_every=1", "progress_every=40")
    config.keep_checkpoints = 1
    with pytest.raises(UserError, match="at step 2 "):
        run(config, tmp_path)
    assert saved_steps(tmp_path) == [1]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep, tiny, tmp_path, saved_steps):
    run(tiny(f"keep_checkpoints={keep}", "checkpoint_every=5", "eval_every=0"), tmp_path)
    assert saved_steps(tmp_path) == list(range(5, 41, 5))[-keep:]


@pytest.mark.slow
@pytest.mark.ci
def test_keep_best_keeps_the_weights_of_the_best_evaluation(tiny, tmp_path):
    # A learning rate that destroys in the second half what the first has learnt.
    config = tiny("keep_best", "eval_every=5", "decay_type=constant", "base_lr=0.3")
    run(config, tmp_path)
    best = max(line.get("test/top1", 0) for line in read_metrics(tmp_path / "metrics.jsonl"))
    scores = evaluate_images(
        load(tmp_path / "weights_best.npz"), data.open_source("digits", "test")
    )
    assert scores.top1 == best
    assert load(tmp_path / "weights_best.npz").labels == tuple("0123456789")


@pytest.mark.slow
@pytest.mark.ci
def test_averaged_weights_are_evaluated_and_left(tiny, tmp_path):
    # Before the first step a state is saved to roll back to.
    fields = ("total_steps=6", "checkpoint_every=1", "keep_checkpoints=9", "eval_every=3")
    # What no array tells is remembered, too, by whoever looks at a checkpoint.
    untold = ("model.activation=gelu_erf", "model.layer_norm_epsilon=0.05")
    config = tiny(*fields, *untold, "on_bad_step=rollback", "ema_decay=0.8", "keep_best")
    run(config, tmp_path)
    average = {}
    for step in range(7):
        with open_arrays(tmp_path / "checkpoints" / str(step)) as arrays:
            params = {
                k[7:]: np.asarray(x, np.float64)
                for k, x in arrays.items()
                if k.startswith("params/")
            }
        for k, x in params.items():
            average[k] = 0.8 * average[k] + 0.2 * x if step else x
    left = load(tmp_path)
    for k, x in flatten_dict(left.params, sep="/").items():
        np.testing.assert_allclose(x, average.pop(k), rtol=1e-5, atol=1e-7)
    assert not average
    tests = [x for x in read_metrics(tmp_path / "metrics.jsonl") if "test/loss" in x]
    scores = evaluate_images(left, data.open_source("digits", "test"))
    assert scores.loss == pytest.approx(tests[-1]["test/loss"], rel=1e-6)
    best = evaluate_images(load(tmp_path / "weights_best.npz"), data.open_source("digits", "test"))
    assert best.top1 == max(x["test/top1"] for x in tests)

    (tmp_path / "weights.npz").unlink()
    assert evaluate_workdir(tmp_path).scores.loss == pytest.approx(scores.loss, rel=1e-6)
    with pytest.raises(
        UserError, match=r"another configuration \(config\.ema_decay 0\.8 -> 0\.0; "
    ):
        run(tiny(*fields, *untold), tmp_path)


@pytest.mark.slow
@pytest.mark.ci
def test_without_checkpoints_or_evaluations_on_the_way_the_end_still_has_both(
    tiny, tmp_path, saved_steps
):
    run(tiny("checkpoint_every=0", "eval_every=0", "total_steps=7"), tmp_path)
    assert saved_steps(tmp_path) == [7]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 7, 7]
    assert all(line["train/update_norm"] > 0 for line in lines[:2])
    assert "test/top1" in lines[-1]


@pytest.mark.slow
@pytest.mark.ci
def test_while_it_trains_python_looks_for_garbage_among_what_is_new_alone(
    tiny, tmp_path, monkeypatch
):
    frozen = []

    def take(feed):
        frozen.append(gc.get_freeze_count())
        return real_take(feed)

    real_take, before = DevicePrefetcher.__next__, gc.get_freeze_count()
    monkeypatch.setattr(DevicePrefetcher, "__next__", take)
    run(tiny("total_steps=3", "warmup_steps=1"), tmp_path)
    assert frozen[0] == before
    assert min(frozen[1:]) > before + 100_000
    assert gc.get_freeze_count() == 0
