"""Fields that change how a run is computed, and not what comes out; and what every run avoids."""

import threading
from collections import Counter
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vit_jax
from tests.training.conftest import run_module
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.training import make_optimizer, run
from vit_jax.training.inputs import DevicePrefetcher, RunData

SHORT = (
    *("total_steps=6", "eval_every=3", "checkpoint_every=4", "progress_every=3"),
    *("model.num_layers=2", "model.dropout_rate=0.0", "keep_best=True"),
    # AdamW makes steps of gradients that are nothing but rounding, as of the bias of the keys.
    *("optim=sgd", "optim_dtype=float32"),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny, outcome):
    """What a short run without dropout leaves."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    run(tiny(*SHORT), workdir)
    return outcome(workdir)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "fields",
    [("scan_layers=True", "remat=full"), ("compile=pmap",)],
    ids=lambda f: f[-1],
)
def test_a_run_leaves_the_files_of_the_plain_one(tiny, outcome, plain, tmp_path, fields):
    run(tiny(*SHORT, *fields), tmp_path / "run")
    weights, lines = outcome(tmp_path / "run")

    assert weights.keys() == plain[0].keys()
    for name, array in weights.items():
        found, expected = (np.frombuffer(x, np.float32) for x in (array, plain[0][name]))
        # The bias of keys has no effect: its gradient is rounding alone, and AdamW makes it count.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)
    assert [line.keys() for line in lines] == [line.keys() for line in plain[1]]
    for line, expected in zip(lines, plain[1], strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    vit = vit_jax.load(tmp_path / "run" / "weights_best.npz")
    assert vit(np.zeros((1, 8, 8, 1), np.float32)).shape == (1, 10)


@pytest.mark.slow
def test_a_run_with_stacked_weights_goes_on_with_them_alone(tiny, outcome, tmp_path, monkeypatch):
    """Stochastic depth included: the draws follow from the step."""
    fields = (*SHORT, "scan_layers=True", "model.stochastic_depth_rate=0.5", "checkpoint_every=3")
    run(tiny(*fields), tmp_path / "whole")

    class Pulled(Exception):
        pass

    take, taken = DevicePrefetcher.__next__, []

    def pull(feed):
        taken.append(feed)
        if len(taken) == 5:
            raise Pulled
        return take(feed)

    monkeypatch.setattr(DevicePrefetcher, "__next__", pull)
    with pytest.raises(Pulled):
        run(tiny(*fields), tmp_path / "halves")
    with pytest.raises(UserError, match=r"config\.scan_layers True -> False"):
        run(tiny(*fields, "scan_layers=False"), tmp_path / "halves")
    run(tiny(*fields, "remat=dots"), tmp_path / "halves")

    whole, halves = (outcome(tmp_path / name) for name in ("whole", "halves"))
    for name, array in halves[0].items():
        found, expected = (np.frombuffer(x, np.float32) for x in (array, whole[0][name]))
        # The bias of keys has no effect: its gradient is rounding alone, and AdamW makes it count.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-4)


def test_pmap_wants_whole_weights(tiny):
    with pytest.raises(UserError, match=r"config\.compile is pmap, which has the weights whole"):
        tiny("compile=pmap", "sharding=fsdp")


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_first_moment_is_kept_in_optim_dtype(tiny, optim, dtype):
    config = tiny(f"optim={optim}", f"optim_dtype={dtype}")
    model = create_model("ViT-Ti_16", num_classes=10)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    state = jax.eval_shape(make_optimizer(config, 10).init, params)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    of_dtype = Counter(str(leaf.dtype) for leaf in arrays)
    count = len(jax.tree.leaves(params))
    # AdamW's second moment is float32 in any case: its small values need the exponent's digits.
    assert of_dtype == Counter({dtype: count}) + Counter(float32=count * (optim == "adamw"))


def test_a_run_compiles_once_moves_nothing_unasked_and_waits_where_it_tells_something(
    tiny, tmp_path, monkeypatch
):
    """Every program of a run is compiled at most once; after the first step JAX may move nothing
    between host and device that nobody asked for; and the main thread waits for the last step that
    was sent off only to evaluate or to save: what is printed is of an earlier one."""
    compiled: Counter[str] = Counter()
    newest: list[jax.Array] = []
    waits: list[int] = []
    steps = 0

    def listen(name, _, fun_name="", **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled[fun_name] += 1

    def noted(wait):
        def waiting(x, *args, **kwargs):
            if threading.current_thread() is threading.main_thread():
                leaves = jax.tree.leaves(x)
                if any(leaf is new for leaf in leaves for new in newest):
                    waits.append(steps)
            return wait(x, *args, **kwargs)

        return waiting

    def step_of(*args):
        step = real_step_of(*args)

        def counted(state, batch):
            nonlocal steps
            out = step(state, batch)
            steps += 1
            newest[:] = jax.tree.leaves(out)
            jax.config.update("jax_transfer_guard", "disallow")
            return out

        return counted

    def result(future, timeout=None):  # Of the last step, which a thread waits for.
        if future is last:
            waits.append(steps)
        return real_result(future, timeout)

    def watch(feed, metrics):
        nonlocal last
        last = real_watch(feed, metrics)
        return last

    last = None
    real_step_of, array = run_module.make_step_from_config, type(jnp.zeros(()))
    real_result, real_watch = Future.result, DevicePrefetcher.watch
    monkeypatch.setattr(run_module, "make_step_from_config", step_of)
    monkeypatch.setattr(Future, "result", result)
    monkeypatch.setattr(DevicePrefetcher, "watch", watch)
    for name in ("block_until_ready", "device_get"):
        monkeypatch.setattr(jax, name, noted(getattr(jax, name)))
    for name in ("__array__", "__float__", "__int__", "__bool__", "item", "block_until_ready"):
        monkeypatch.setattr(array, name, noted(getattr(array, name)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.clear_caches()
    try:
        run(tiny("progress_every=8", "eval_every=20", "checkpoint_every=30"), tmp_path / "run")
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        jax.monitoring.unregister_event_duration_listener(listen)

    assert steps == 40
    assert compiled["jit(step)"] == 2  # That of training and that of evaluation.
    # The first step, whose time is the compiler's; then what is evaluated and saved.
    assert set(waits) == {1, 20, 30, 40}


def test_a_run_has_no_more_than_prefetch_batches_beside_the_one_at_work(
    tiny, tmp_path, monkeypatch, no_image
):
    losses: list[jax.Array] = []
    counts: list[int] = []

    def step_of(*args):
        step = real_step_of(*args)

        def noted(state, batch):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
            return state, metrics

        return noted

    def train_batches(task, start_step):
        for asked, batch in enumerate(real_batches(task, start_step), start=1):
            # Those before it, less those whose steps are done, and itself.
            counts.append(asked - sum(loss.is_ready() for loss in losses))
            yield batch

    real_step_of, real_batches = run_module.make_step_from_config, RunData.train_batches
    monkeypatch.setattr(run_module, "make_step_from_config", step_of)
    monkeypatch.setattr(RunData, "train_batches", train_batches)
    run(tiny("prefetch=3"), tmp_path / "run")
    assert len(losses) == 40
    assert max(counts) == 4
