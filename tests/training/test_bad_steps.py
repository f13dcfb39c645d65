"""Steps that go wrong are left out or gone back for, whenever the run is interrupted."""

import signal
from collections import deque
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.training.conftest import run_module
from vit_jax import load
from vit_jax.errors import UserError
from vit_jax.models.kernels import choose_kernels
from vit_jax.sharding import make_mesh
from vit_jax.training import TrainState, default_config, run
from vit_jax.training.inputs import open_data
from vit_jax.training.network import make_network
from vit_jax.training.optimizer import make_optimizer
from vit_jax.training.state import new_guard
from vit_jax.training.step import SPIKE_WARMUP, make_step_from_config, update_guard
from vit_jax.training.workdir import read_metrics

NAN = float("nan")


def poison(monkeypatch, bad_steps, stops=()):
    """Spoils the images of some steps (those of the n-th are number n - 1), and sends SIGTERM
    after others."""
    make = run_module.make_step_from_config

    def make_poisoned(*args, **kwargs):
        train_step = make(*args, **kwargs)

        def poisoned(state, batch):
            step = int(state.step) + 1
            if step in bad_steps:
                batch = {**batch, "image": batch["image"] * NAN}
            if step in stops:
                signal.raise_signal(signal.SIGTERM)
            return train_step(state, batch)

        return poisoned

    monkeypatch.setattr(run_module, "make_step_from_config", make_poisoned)


def guarded(tiny, how, *fields):
    return tiny(f"on_bad_step={how}", "image_dtype=float32", "progress_every=4", *fields)


def by_hand(config, steps):
    """The averaged weights, without the batches that are "left_out", and going "back" to those
    after batch 20 before some."""
    task = open_data(config)
    shape, spec = task.image_shape, task.eval_ops.spec
    vit = make_network(config, image_shape=shape, labels=task.labels, preprocess=spec)
    tx = make_optimizer(config, config.total_steps)
    kernels = choose_kernels(vit.model, shape[:2], jax.devices()).kernels
    model = vit.model.clone(kernels=kernels)
    train_step = make_step_from_config(config, model, tx, make_mesh(), task.train_split[1])
    state = TrainState.create(params=vit.params, tx=tx, seed=config.seed, ema=True)
    saved, batches = None, task.train_batches(0)
    for i, batch in enumerate(batches):
        if i == config.total_steps:
            break
        if i in steps.get("back", ()):
            state = jax.tree.map(jnp.copy, saved).with_counts(i, bad_steps=1, consecutive_bad=1)
        if i not in steps.get("left_out", ()):
            state, _ = train_step(state, batch)
        else:
            state = state.with_counts(i + 1, bad_steps=1, consecutive_bad=1)
        if i + 1 == 20:
            saved = jax.tree.map(jnp.copy, state)
    batches.close()
    return flatten_dict(jax.device_get(state.averaged), sep="/")


def weights(workdir):
    return flatten_dict(load(workdir).params, sep="/")


@pytest.mark.parametrize(
    ("how", "by"),
    [
        pytest.param("skip", {"left_out": [25]}, marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("rollback", {"back": [26]}, marks=[pytest.mark.slow, pytest.mark.ci]),
    ],
)
def test_a_bad_step_is_skipped_or_gone_back_for_and_an_interrupted_run_ends_the_same(
    how, by, tiny, tmp_path, outcome, monkeypatch, capsys
):
    config = guarded(tiny, how, "keep_checkpoints=1", "ema_decay=0.8")
    with monkeypatch.context() as patch:
        poison(patch, {26})
        assert run(config, tmp_path / "whole").finished
    said = capsys.readouterr().err
    assert "step 26: the loss became nan: " in said
    assert ("gone back to the weights of step 20" in said) == (how == "rollback")
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert {x["step"]: x["train/bad_steps"] for x in lines if "train/loss" in x} == {
        step: int(step > 26) for step in range(4, 41, 4)
    }
    for stops in ((22, 26), (3, 25, 27)):
        workdir = tmp_path / f"stopped{stops}"
        for stop in stops:
            with monkeypatch.context() as patch:
                poison(patch, {26}, {stop})
                assert not run(config, workdir).finished
        with monkeypatch.context() as patch:
            poison(patch, {26})
            assert run(config, workdir).finished
        assert outcome(workdir) == outcome(tmp_path / "whole"), stops

    expected = by_hand(config, by)
    for name, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.slow
def test_without_a_bad_step_nothing_is_changed_by_the_guard(tiny, tmp_path, outcome, whole):
    for how in ("skip", "rollback"):
        assert run(tiny(f"on_bad_step={how}", "spike=1e9"), tmp_path / how).finished
    plain = outcome(whole)
    for how in ("skip", "rollback"):
        guarded, lines = outcome(tmp_path / how)
        assert guarded == plain[0]
        for line in lines:
            assert line.pop("train/bad_steps", 0) == 0
        assert lines == plain[1]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("how", "bad", "message"),
    [
        ("skip", range(21, 41), "at step 30 the loss became nan, the last of 10 bad steps in a"),
        ("rollback", range(16, 41), "at step 25 the loss became nan, the last of 10 bad steps in"),
        ("rollback", range(21, 41, 2), "at step 39 the loss became nan, the 10th time since step"),
    ],
)
def test_a_run_that_only_goes_wrong_is_stopped(how, bad, message, tiny, tmp_path, monkeypatch):
    poison(monkeypatch, set(bad))
    with pytest.raises(UserError, match=message):
        run(guarded(tiny, how, "checkpoint_every=20"), tmp_path)


@pytest.mark.slow
def test_a_run_that_stopped_at_a_bad_step_goes_on_by_skipping_it(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {26})
    with pytest.raises(UserError, match=r"at step 26 the loss .*on_bad_step=skip$"):
        run(guarded(tiny, "stop"), tmp_path)
    assert run(guarded(tiny, "skip"), tmp_path).finished


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("progress_every", [1, 40])
def test_a_gradient_that_jumps_is_a_bad_step_too(progress_every, tiny, tmp_path):
    with pytest.raises(UserError, match=r"the grad_norm \S+ was 1\.\d+ times the usual \S+; what"):
        run(tiny("spike=1.05", f"progress_every={progress_every}"), tmp_path)


def test_what_is_usual_is_the_mean_of_the_good_norms_the_latest_counting_most():
    norms = np.random.default_rng(0).lognormal(size=300).astype(np.float32)
    norms[[5, 70, 200]] = [np.nan, 1e6, np.inf]
    guard, usual, good = new_guard(), 0.0, 0
    for norm in norms:
        expected = np.isfinite(norm) and (good < SPIKE_WARMUP or norm <= 20 * usual)
        figures = {"loss": 1.0, "grad_norm": jnp.float32(norm), "param_norm": 1.0}
        ok, guard = update_guard(guard, figures, spike=20)
        assert ok == expected
        if expected:
            good += 1
            usual += max(1 / good, 0.02) * (float(norm) - usual)
        assert guard["grad_norm_ema"] == pytest.approx(usual, rel=1e-5)
    assert (guard["bad_steps"], guard["consecutive_bad"], guard["good_steps"]) == (
        300 - good,
        0,
        good,
    )
    assert good <= 297


def test_metrics_are_read_in_order_up_to_a_step_each_once():
    config = default_config()
    config.update(dict(progress_every=2, on_bad_step="rollback"))
    unread, reported, clock = deque(), [], Future()
    clock.set_result("clock")
    log = SimpleNamespace(step=lambda *step: reported.append(step), say=None)
    for step in range(1, 8):
        values = dict(loss=NAN if step == 5 else step, grad_norm=1.0, param_norm=1.0)
        values |= dict(grad_norm_ema=1.0, bad_steps=3, consecutive_bad=int(step == 5))
        values = {name: np.float32(x) for name, x in values.items()}
        unread.append(run_module.UnreadStep(step, values, clock))
    read = partial(run_module.read_metrics, unread, config=config, log=log)
    assert read(3) is None  # Nobody wants to see this one.
    assert not reported
    assert read(4) is None
    assert [(step, values["loss"], clock) for step, values, clock in reported] == [
        (2, 2.0, "clock"),
        (4, 4.0, "clock"),
    ]
    assert read(7) == (5, "the loss became nan", 3, 1)
    assert len(reported) == 2
