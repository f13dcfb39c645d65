"""The loop of a run: what it looks at, evaluates and saves, and when."""

import gc

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import data, load
from vit_jax.checkpoints import open_arrays
from vit_jax.errors import UserError
from vit_jax.evaluation.images import evaluate_images
from vit_jax.training import run
from vit_jax.training.inputs import DevicePrefetcher
from vit_jax.training.outputs import evaluate_workdir
from vit_jax.training.workdir import read_metrics

pytestmark = pytest.mark.usefixtures("no_image")


@pytest.mark.parametrize("progress_every", [1, 40])
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


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep, tiny, tmp_path, saved_steps):
    run(tiny(f"keep_checkpoints={keep}", "checkpoint_every=5", "eval_every=0"), tmp_path)
    assert saved_steps(tmp_path) == list(range(5, 41, 5))[-keep:]


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


def test_averaged_weights_are_evaluated_and_left(tiny, tmp_path):
    # Before the first step a state is saved to roll back to.
    fields = ("total_steps=6", "checkpoint_every=1", "keep_checkpoints=9", "eval_every=3")
    config = tiny(*fields, "on_bad_step=rollback", "ema_decay=0.8", "keep_best")
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
        run(tiny(*fields), tmp_path)


def test_without_checkpoints_or_evaluations_on_the_way_the_end_still_has_both(
    tiny, tmp_path, saved_steps
):
    run(tiny("checkpoint_every=0", "eval_every=0", "total_steps=7"), tmp_path)
    assert saved_steps(tmp_path) == [7]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [5, 7, 7]
    assert all(line["train/update_norm"] > 0 for line in lines[:2])
    assert "test/top1" in lines[-1]


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
