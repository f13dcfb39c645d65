"""Schedules and optimizers: the numbers of the original code, and formulas in NumPy."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from vit_jax.training import default_config, make_optimizer, make_schedule

OFFICIAL = json.loads((Path(__file__).parents[1] / "official" / "lr.json").read_text())


def config_of(**fields):
    config = default_config()
    # A constant learning rate of 1 shows the direction of the update itself.
    config.update(dict(base_lr=1.0, warmup_steps=0, decay_type="constant", grad_norm_clip=0.0))
    config.update(fields)
    return config


def some_tree(seed):
    rng = np.random.default_rng(seed)
    return {
        "block": {
            "kernel": rng.standard_normal((3, 4), np.float32),
            "bias": rng.standard_normal(4, np.float32),
        },
        "norm": {"scale": rng.standard_normal(4, np.float32)},
    }


def apply(tx, params, gradients):
    """The parameters after one compiled update for each gradient."""

    @jax.jit
    def update(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for gradient in gradients:
        params, state = update(params, state, gradient)
    return jax.device_get((params, state))


def assert_close(tree, expected, rtol=1e-6, atol=1e-7):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), tree, expected)


@pytest.mark.parametrize("case", OFFICIAL)
def test_the_learning_rates_are_those_of_the_original(case):
    schedule = make_schedule(*OFFICIAL[case]["args"])
    for step, expected in OFFICIAL[case]["lr"].items():
        got = np.asarray(schedule(int(step)))
        assert got.dtype == np.float32
        assert float(got) == pytest.approx(expected, rel=1e-9, abs=0), step
        # Compiled, XLA may take the factors in another order, which costs the last digit.
        compiled = float(jax.jit(schedule)(int(step)))
        assert compiled == pytest.approx(expected, rel=3e-7, abs=1e-8), step


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("decay", ["cosine", "linear", "constant", "rsqrt"])
def test_schedules_follow_their_formulas(decay, warmup):
    total, base, end = 50, 0.3, 1e-5
    schedule = make_schedule(total, base, decay, warmup)
    for step in range(60):
        done = np.clip((step - warmup) / (total - warmup), 0, 1)
        expected = {
            "cosine": base * (1 + np.cos(np.pi * done)) / 2,
            "linear": end + (base - end) * (1 - done),
            "constant": base,
            "rsqrt": base / np.sqrt(1 + max(step - warmup, 0) / max(warmup, 1)),
        }[decay] * (min(1, step / warmup) if warmup else 1)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_warm_up_as_long_as_the_run_is_a_straight_line():
    schedule = make_schedule(10, 1.0, "cosine", 10)
    np.testing.assert_allclose([schedule(i) for i in range(10)], np.arange(10) / 10, rtol=1e-6)


def test_update_n_has_the_learning_rate_of_n_minus_1_so_the_first_of_a_warm_up_changes_nothing():
    config = config_of(base_lr=0.4, warmup_steps=4, momentum=0.0, optim_dtype="float32")
    tx = make_optimizer(config, total_steps=100)
    params, gradient = some_tree(0), some_tree(1)
    assert_close(apply(tx, params, [gradient])[0], params, rtol=0, atol=0)
    expected = jax.tree.map(lambda p, g: p - (0.1 + 0.2) * g, params, gradient)
    assert_close(apply(tx, params, [gradient] * 3)[0], expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sgd_is_momentum_whose_memory_alone_is_rounded(dtype):
    tx = make_optimizer(config_of(base_lr=0.1, optim_dtype=dtype, momentum=0.9), 100)
    gradients = [some_tree(i) for i in range(1, 6)]
    got, _ = apply(tx, some_tree(0), gradients)

    def expected(param, *gradients):
        # In bfloat16 the constant 0.9 itself is 0.8984375.
        kept = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
        decay, trace = np.float32(kept(0.9)), np.zeros_like(param)
        for gradient in gradients:
            update = gradient + decay * trace
            trace = update.astype(kept).astype(np.float32)
            param = param - np.float32(0.1) * update
        return param

    assert_close(got, jax.tree.map(expected, some_tree(0), *gradients))


@pytest.mark.parametrize(("optim", "name"), [("sgd", "trace"), ("adamw", "mu")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_the_optimizer_has_the_asked_for_type(optim, name, dtype):
    tx = make_optimizer(config_of(optim=optim, optim_dtype=dtype), 100)
    _, state = apply(tx, some_tree(0), [some_tree(1)])
    moment = optax.tree_utils.tree_get(state, name)
    assert {str(x.dtype) for x in jax.tree.leaves(moment)} == {dtype}


def test_clipping_scales_to_the_norm_itself_without_an_epsilon():
    tx = make_optimizer(config_of(grad_norm_clip=1.0, momentum=0.0, optim_dtype="float32"), 100)
    zeros = {"kernel": np.zeros(2, np.float32)}
    for length, expected in ((0.5, 0.5), (0.999, 0.999), (1e-20, 1e-20), (2.0, 1.0), (5e5, 1.0)):
        gradient = {"kernel": np.array([0.6, 0.8], np.float32) * np.float32(length)}
        params, _ = apply(tx, zeros, [gradient])
        assert np.linalg.norm(params["kernel"].astype(np.float64)) == pytest.approx(expected, 3e-7)


def test_the_norm_that_clipping_looks_at_is_that_of_all_arrays_together():
    tx = make_optimizer(config_of(grad_norm_clip=1.0, momentum=0.0, optim_dtype="float32"), 100)
    gradient = {"a": np.full(1, 3, np.float32), "b": np.full(1, 4, np.float32)}
    params, _ = apply(tx, jax.tree.map(np.zeros_like, gradient), [gradient])
    np.testing.assert_allclose([params["a"][0], params["b"][0]], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_is_optax_adamw_decaying_kernels_only(dtype):
    config = config_of(
        optim="adamw", optim_dtype=dtype, base_lr=0.01, weight_decay=0.1, b1=0.8, b2=0.9
    )
    config.update(decay_type="cosine", grad_norm_clip=1.0)
    mask = {"block": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            make_schedule(20, 0.01, "cosine", 0),
            b1=0.8,
            b2=0.9,
            weight_decay=0.1,
            mask=mask,
            mu_dtype=jnp.dtype(dtype),
        ),
    )
    gradients = [some_tree(i) for i in range(1, 8)]
    got, _ = apply(make_optimizer(config, 20), some_tree(0), gradients)
    assert_close(got, apply(reference, some_tree(0), gradients)[0], rtol=1e-6)


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_weight_decay_is_scaled_by_the_learning_rate_and_touches_kernels_alone(optim):
    tx = make_optimizer(config_of(optim=optim, base_lr=0.5, weight_decay=0.1), 100)
    params = some_tree(0)
    got, _ = apply(tx, params, [jax.tree.map(np.zeros_like, params)])
    expected = jax.tree.map(np.copy, params)
    expected["block"]["kernel"] *= 1 - 0.5 * 0.1
    assert_close(got, expected)
