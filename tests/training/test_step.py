"""One step: the original's numbers, and what must not change them."""

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.special import log_softmax

from tests import reference
from vit_jax.data import parse
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.vit import check_images
from vit_jax.training import TrainState, default_config, make_optimizer, make_train_step

CLASSES = 5


class SmallModel(nn.Module):
    """Any Linen module can be trained; one that compiles fast does for most of what follows.

    As those of the package it takes no raw pixels."""

    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        check_images(images)
        x = nn.Dense(16, dtype=self.dtype)(images.reshape(len(images), -1))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(nn.gelu(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x).astype(jnp.float32)


def small_params(model):
    return model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]


def small_batch(n=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.uniform(-1, 1, (n, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, CLASSES, n, dtype=np.int32),
    }


def plain_sgd(lr=1.0):
    """Its change of the parameters is the gradient times `lr`."""
    config = default_config()
    config.update(dict(base_lr=lr, warmup_steps=0, decay_type="constant", grad_norm_clip=0.0))
    config.update(dict(momentum=0.0, optim_dtype="float32"))
    return make_optimizer(config, 100)


def first_step(batch, model=None, **options):
    """Metrics of one step, and the gradients that it used."""
    model = model or SmallModel()
    params, tx = small_params(model), plain_sgd()
    step = make_train_step(model, tx, **options)
    state, metrics = step(TrainState.create(params=params, tx=tx), batch)
    grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params)
    return {k: float(v) for k, v in metrics.items()}, grads


def assert_same_gradients(a, b, tolerance=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 0, tolerance), a, b)


def official_steps(dtype):
    """The original's figures of five steps, our metrics of them, and the weights before and after
    by name."""
    with np.load(reference.OFFICIAL / "train.npz", allow_pickle=False) as arrays:
        official = dict(arrays)
    shapes = reference.official_shapes("ViT-Ti_16", "1000", 64)
    shapes |= {"head/kernel": (192, 10), "head/bias": (10,)}
    before = reference.make_params(shapes, 301)
    config = default_config()
    config.update(dict(base_lr=0.03, warmup_steps=2, grad_norm_clip=1.0, optim="sgd"))

    model = create_model("ViT-Ti_16", num_classes=10, dtype=dtype)
    tx = make_optimizer(config, 10)
    state = TrainState.create(params=unflatten_dict(before, sep="/"), tx=tx)
    step = make_train_step(model, tx, accum_steps=2)
    metrics = []
    with jax.default_matmul_precision("highest"):
        for i in range(5):
            images = reference.make_images(400 + i, 8, 64)
            state, values = step(state, {"image": images, "label": one_hot_labels(400 + i)})
            metrics.append(jax.device_get(values))
    after = {k: np.asarray(v) for k, v in flatten_dict(state.params, sep="/").items()}
    assert sorted(after) == list(official["keys"])
    return official, metrics, before, after


def test_five_steps_are_those_of_the_original():
    official, metrics, before, after = official_steps(jnp.float32)

    np.testing.assert_allclose([m["loss"] for m in metrics], official["loss"], atol=2e-5)
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], official["grad_norm"], rtol=2e-5)
    for i, key in enumerate(sorted(after)):
        norm = np.linalg.norm(after[key].astype(np.float64))
        change = np.linalg.norm((after[key] - before[key]).astype(np.float64))
        assert norm == pytest.approx(official["p_norm"][i], rel=1e-6), key
        assert change == pytest.approx(official["delta_norm"][i], rel=2e-3, abs=1e-7), key
    # The momentum is kept in bfloat16: where rounding tips the other way, one number in a thousand
    # may be off by a share of 2**-7.
    found, expected = after["head/kernel"] - before["head/kernel"], official["head_kernel_delta"]
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=2**-6)
    assert (np.abs(found - expected) > 1e-6).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.ci
def test_five_steps_in_bfloat16_are_those_of_the_original_but_for_its_rounding():
    """A rounding to bfloat16 is off by at most eps / 2, evenly spread: by eps / sqrt(12) in the
    mean square. On its way forwards a number is rounded by 13 operations in each of 12 blocks: two
    norms, four projections, weights and means of attention, two dense layers, GELU and two sums.
    Independent errors add as their squares, and there is as much again on the way back."""
    official, metrics, before, after = official_steps(jnp.bfloat16)

    eps = float(jnp.finfo(jnp.bfloat16).eps)
    forwards = eps * np.sqrt(12 * 13 / 12)  # 2.8 %
    back = eps * np.sqrt(2 * 12 * 13 / 12)  # 4.0 %
    # Logits are about 0.8, and the loss of one of 8 images changes by at most sqrt(2) times as
    # much; three standard deviations of their mean.
    losses = [m["loss"] for m in metrics]
    atol = 3 * forwards * 0.8 * np.sqrt(2 / 8)
    np.testing.assert_allclose(losses, official["loss"], rtol=0, atol=atol)
    assert np.abs(losses - official["loss"]).max() > 1e-4  # It is bfloat16.
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], official["grad_norm"], rtol=back)
    expected = dict(zip(official["keys"], official["delta_norm"], strict=True))
    for key, norm in expected.items():
        change = np.linalg.norm((after[key] - before[key]).astype(np.float64))
        # The bias of keys has no effect: its gradient is rounding alone.
        size = expected[key.replace("key/bias", "query/bias")]
        assert change == pytest.approx(norm, abs=back * size), key
        assert after[key].dtype == np.float32
    found, expected = after["head/kernel"] - before["head/kernel"], official["head_kernel_delta"]
    assert np.linalg.norm(found - expected) < back * np.linalg.norm(expected)


def one_hot_labels(seed):
    sequence = np.random.SeedSequence([seed, 0x1ABE1, 8, 10])
    chosen = np.random.Generator(np.random.PCG64(sequence)).integers(0, 10, 8)
    return np.eye(10, dtype=np.float32)[chosen]


def test_class_numbers_and_one_hot_rows_mean_the_same():
    batch = small_batch()
    one_hot = np.eye(CLASSES, dtype=np.float32)[batch["label"]]
    (a, grads_a), (b, grads_b) = first_step(batch), first_step(batch | {"label": one_hot})
    assert a == b
    assert_same_gradients(grads_a, grads_b, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_is_its_formula(loss, smoothing):
    model, batch = SmallModel(), small_batch()
    z = np.asarray(model.apply({"params": small_params(model)}, batch["image"]), np.float64)
    y = np.eye(CLASSES)[batch["label"]] * (1 - smoothing) + smoothing / CLASSES
    if loss == "softmax":
        expected = -(y * log_softmax(z, axis=1)).sum(axis=1).mean()
    else:
        p = 1 / (1 + np.exp(-z))
        expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(axis=1).mean()
    metrics, _ = first_step(batch, loss=loss, label_smoothing=smoothing)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match="loss is 'hinge', expected softmax or sigmoid"):
        first_step(small_batch(), loss="hinge")


def test_grad_norm_is_the_norm_before_clipping():
    metrics, grads = first_step(small_batch())
    squares = sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(squares), rel=1e-4)


def test_the_norms_of_the_update_and_of_the_new_weights_are_told():
    metrics, changes = first_step(small_batch())
    before = small_params(SmallModel())
    after = jax.tree.map(lambda x, change: np.asarray(x, np.float64) - change, before, changes)
    for name, tree in (("update_norm", changes), ("param_norm", after)):
        squares = sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(tree))
        assert metrics[name] == pytest.approx(np.sqrt(squares), rel=1e-4)


@pytest.mark.parametrize("compile", ["jit", "pmap"])
def test_the_norm_of_the_update_is_told_where_it_is_wanted(compile):
    model, tx = SmallModel(), plain_sgd(lr=0.1)

    def norms(**options):
        step = make_train_step(model, tx, compile=compile, **options)
        state = TrainState.create(params=small_params(model), tx=tx)
        for _ in range(5):
            state, metrics = step(state, small_batch())
            assert not metrics["bad_steps"]
            yield float(metrics["update_norm"])

    expected = [norm if step % 2 == 0 else np.nan for step, norm in enumerate(norms(), 1)]
    assert [*norms(update_norm_at=lambda step: step % 2 == 0)] == pytest.approx(
        expected, rel=1e-6, nan_ok=True
    )


@pytest.mark.parametrize("slices", [2, 4, 16])
def test_slices_give_the_loss_and_the_gradient_of_the_whole_batch(slices):
    whole, grads = first_step(small_batch())
    sliced, sliced_grads = first_step(small_batch(), accum_steps=slices)
    assert sliced == pytest.approx(whole, rel=1e-6)
    assert_same_gradients(sliced_grads, grads)


def test_each_slice_has_its_own_dropout_and_each_step_too():
    model = SmallModel(dropout_rate=0.5)
    batch = small_batch(8)
    twins = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    once, _ = first_step(batch, model)
    twice, _ = first_step(twins, model, accum_steps=2)
    assert once["loss"] != twice["loss"]
    step = make_train_step(model, tx := plain_sgd(lr=0.0))
    state = TrainState.create(params=small_params(model), tx=tx)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3


def test_dropout_follows_from_seed_and_step_alone():
    model, batch = SmallModel(dropout_rate=0.5), small_batch()
    step = make_train_step(model, tx := plain_sgd())
    losses = []
    for seed in (7, 7, 8):
        state = TrainState.create(params=small_params(model), tx=tx, seed=seed)
        losses.append(float(step(state, batch)[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_more_slices_make_no_larger_program():
    def size(slices):
        model, tx = SmallModel(), plain_sgd()
        state = TrainState.create(params=small_params(model), tx=tx)
        step = make_train_step(model, tx, accum_steps=slices)
        return len(step.lower(state, small_batch()).as_text())

    assert size(16) < 1.01 * size(2)


def test_a_state_passed_in_cannot_be_used_again_but_the_caller_keeps_the_parameters():
    model, tx = SmallModel(), plain_sgd()
    params = small_params(model)
    state = TrainState.create(params=params, tx=tx)
    step = make_train_step(model, tx)
    new, _ = step(state, small_batch())
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.params["Dense_0"]["bias"])
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        step(state, small_batch())
    assert int(new.step) == 1
    np.asarray(params["Dense_0"]["bias"])


def test_many_steps_are_one_compilation_and_move_nothing_to_the_host():
    model, tx = SmallModel(dropout_rate=0.1), plain_sgd()
    step = make_train_step(model, tx, accum_steps=2)
    batches = [jax.device_put(small_batch(seed=i)) for i in range(4)]
    state, _ = step(TrainState.create(params=small_params(model), tx=tx), batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    assert step._cache_size() == 1


@pytest.mark.parametrize("compile", ["jit", "pmap"])
def test_the_average_of_the_weights_starts_with_them_and_leaves_out_bad_steps(compile):
    model, tx = SmallModel(), plain_sgd(0.1)
    step = make_train_step(model, tx, compile=compile, accum_steps=2, skip_bad=True, ema_decay=0.7)
    state = TrainState.create(params=small_params(model), tx=tx, ema=True)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for i in range(6):
        batch = small_batch(seed=i)
        if i == 3:
            batch["image"] *= np.nan
        state, metrics = step(state, batch)
        if i != 3:
            expected = jax.tree.map(
                lambda mean, x: 0.7 * mean + 0.3 * np.asarray(x, np.float64), expected, state.params
            )
    assert int(metrics["bad_steps"]) == 1
    for found, mean in zip(*map(jax.tree.leaves, (state.ema, expected)), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, mean, rtol=1e-6, atol=1e-7)
    assert TrainState.create(params=small_params(model), tx=tx).ema is None


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match="holds 16 images, expected a multiple of 3"):
        first_step(small_batch(16), accum_steps=3)


def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters():
    model = SmallModel(dtype=jnp.bfloat16)
    rounded, grads = first_step(small_batch(), model)
    exact, _ = first_step(small_batch())
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert rounded["loss"] != exact["loss"]
    assert {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype(np.float32)}


EIGHT_DEVICES = """
    import json, sys
    import jax, numpy as np
    from ml_collections import ConfigDict
    from tests.training import test_step as t
    from vit_jax.training import TrainState, make_mesh, make_train_step

    mesh = make_mesh()
    assert mesh.size == 8
    model, tx = t.SmallModel(), t.plain_sgd(0.1)
    step = make_train_step(model, tx, mesh=mesh, accum_steps=2)
    state = TrainState.create(params=t.small_params(model), tx=tx)
    losses = []
    for i in range(5):
        state, metrics = step(state, t.small_batch(32, seed=i))
        losses.append(float(metrics["loss"]))
    program = step.lower(state, t.small_batch(32)).compile().as_text()
    moves = [n for n in ("all-gather", "all-to-all", "collective-permute") if n in program]
    assert "all-reduce" in program

    mesh = make_mesh(ConfigDict(dict(batch=8, accum_steps=1, sharding="fsdp")))
    params = {"kernel": np.ones((256, 64), np.float32)}
    state = TrainState.create(params=params, tx=tx, mesh=mesh, ema=True)
    for place in state.params["kernel"], state.ema["kernel"]:
        assert {part.data.shape for part in place.addressable_shards} == {(32, 64)}
    print(json.dumps([losses, moves]))
"""


def test_eight_devices_give_the_losses_of_one_and_exchange_nothing_but_sums():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)],
        env=environment | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses, moves = json.loads(done.stdout.splitlines()[-1])

    model, tx = SmallModel(), plain_sgd(0.1)
    step = make_train_step(model, tx)
    state = TrainState.create(params=small_params(model), tx=tx)
    for i, loss in enumerate(losses):
        state, metrics = step(state, small_batch(32, seed=i))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert not moves


@pytest.mark.parametrize(
    "options",
    [
        dict(mixup=0.5, cutmix=1.0, accum_steps=2),
        *(
            pytest.param(options, marks=[pytest.mark.slow, pytest.mark.ci])
            for options in (
                *({}, dict(accum_steps=4), dict(mixup=0.5), dict(cutmix=1.0)),
                dict(mixup=0.5, cutmix=1.0, compile="pmap"),
            )
        ),
    ],
)
def test_whole_grey_levels_are_normalised_on_the_device(options):
    levels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    batch = small_batch() | {"image": levels}
    floats = batch | {"image": parse("value_range(-0.5, 2)")(levels.reshape(128, 8, 1))}
    floats["image"] = floats["image"].reshape(levels.shape)

    found = first_step(batch, normalize=parse("value_range(-0.5, 2)").normalize, **options)
    expected = first_step(floats, **options)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )
