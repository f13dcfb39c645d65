"""Mixup and CutMix: what they make of a batch, and what must not change it."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta, kstest

from tests.training.test_step import CLASSES, SmallModel, plain_sgd, small_batch, small_params
from vit_jax.training import TrainState, make_train_step
from vit_jax.training.mixing import mix, mix_images


def batch_of(n=6, size=(10, 14), seed=0):
    rng = np.random.default_rng(seed)
    images = rng.uniform(-1, 1, (n, *size, 3)).astype(np.float32)
    return {"image": images, "label": rng.integers(0, CLASSES, n)}


compiled_mix = jax.jit(mix, static_argnums=2, static_argnames=("mixup", "cutmix"))


def mixed(batch, seed, mixup=0.0, cutmix=0.0):
    result = compiled_mix(batch, jax.random.key(seed), CLASSES, mixup=mixup, cutmix=cutmix)
    return {k: np.asarray(v) for k, v in result.items()}


def test_mixup_is_the_mean_of_a_image_and_the_one_before_and_so_is_its_label():
    batch = batch_of()
    # Two classes that alternate tell the share.
    shares = []
    for seed in range(50):
        result = mixed(batch | {"label": np.arange(6) % 2}, seed, mixup=0.4)
        share = result["label"][0, 0]
        shares.append(share)
        assert 0.5 <= share <= 1
        expected = share * batch["image"] + (1 - share) * np.roll(batch["image"], 1, axis=0)
        np.testing.assert_allclose(result["image"], expected, atol=1e-6)
        one_hot = np.eye(CLASSES)[np.arange(6) % 2]
        np.testing.assert_allclose(
            result["label"], share * one_hot + (1 - share) * np.roll(one_hot, 1, axis=0), atol=1e-6
        )
        assert result["label"].dtype == np.float32
    assert len(set(shares)) == 50


def test_the_shares_of_mixup_are_distributed_as_beta_folded_at_a_half():
    batch = {"image": np.zeros((2, 1, 1, 1), np.float32), "label": np.arange(2)}
    keys = jax.random.split(jax.random.key(0), 2000)
    both = jax.vmap(lambda key: mix(batch, key, 2, mixup=0.3, cutmix=0.0)["label"])(keys)
    shares = np.asarray(both[:, 0, 0])
    assert kstest(shares, lambda a: beta.cdf(a, 0.3, 0.3) - beta.cdf(1 - a, 0.3, 0.3)).pvalue > 0.01


def test_cutmix_puts_a_rectangle_of_the_image_before_over_each():
    batch = batch_of(size=(12, 20))
    before = np.roll(batch["image"], 1, axis=0)
    areas, places = [], set()
    for seed in range(60):
        result = mixed(batch | {"label": np.arange(6) % 2}, seed, cutmix=1.0)
        own = (result["image"] == batch["image"]).all(axis=-1)
        other = (result["image"] == before).all(axis=-1)
        assert (own ^ other).all()
        assert (own == own[0]).all()
        rows, columns = np.nonzero(other[0])
        areas.append(1 - len(rows) / 240)
        np.testing.assert_allclose(result["label"][0, 0], areas[-1], atol=1e-6)
        np.testing.assert_allclose(result["label"].sum(axis=1), 1, atol=1e-6)
        if len(rows):
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            places.add((rows.min(), columns.min()))
    assert min(areas) < 0.5
    assert max(areas) > 0.9
    assert len(places) > 20


def test_uncut_rectangles_of_cutmix_keep_the_aspect_and_have_uniform_areas():
    # With Beta(1, 1) the share of the rectangle is uniform before it is cut at the edges.
    image = np.zeros((2, 100, 100, 1), np.float32)
    image[1] = 1
    batch = {"image": image, "label": np.arange(2)}
    sides = []
    for seed in range(300):
        inside = mixed(batch, seed, cutmix=1.0)["image"][0, ..., 0] == 1
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        edges = {*rows[[0, -1]], *columns[[0, -1]]} if len(rows) else {0}
        if not edges & {0, 99}:
            sides.append((len(rows), len(columns)))
    heights, widths = np.array(sides).T
    assert len(sides) > 50
    assert np.abs(heights - widths).max() <= 1


def test_with_both_each_does_about_half_of_the_batches():
    batch = batch_of(n=2)
    before = np.roll(batch["image"], 1, axis=0)
    cut = 0
    for seed in range(100):
        image = mixed(batch, seed, mixup=0.5, cutmix=1.0)["image"]
        cut += bool(((image == batch["image"]) | (image == before)).all())
    assert 25 < cut < 75


def test_float_labels_are_mixed_as_they_are():
    batch = batch_of(n=4)
    labels = np.random.default_rng(1).uniform(0, 1, (4, CLASSES)).astype(np.float32)
    one_hot = np.eye(CLASSES, dtype=np.float32)[batch["label"]]
    a, b = mixed(batch, 3, mixup=0.5), mixed(batch | {"label": one_hot}, 3, mixup=0.5)
    np.testing.assert_array_equal(a["label"], b["label"])
    assert mixed(batch | {"label": labels}, 3, mixup=0.5)["label"].shape == (4, CLASSES)


def test_images_to_look_at_are_mixed_as_the_step_does_it():
    images = batch_of(n=4)["image"]
    shown, share = mix_images(images, 7, seed=5, mixup=0.4)
    key = TrainState.create(params={}, tx=plain_sgd(), seed=5).replace(step=jnp.int32(7))
    batch = {"image": images, "label": np.arange(4) % 2}
    result = mixed_with(key.dropout_key(), batch)
    np.testing.assert_allclose(shown, result["image"], atol=1e-6)
    assert share == pytest.approx(result["label"][0, 0])


def mixed_with(key, batch):
    return compiled_mix(batch, key, 2, mixup=0.4, cutmix=0.0)


# In the step.


@functools.cache
def compiled_step(**options):
    return make_train_step(SmallModel(), plain_sgd(0.1), **options)


def losses(steps=3, seed=0, first=0, n=16, **options):
    params = small_params(SmallModel())
    state = TrainState.create(params=params, tx=plain_sgd(0.1), seed=seed)
    state = state.replace(step=state.step + first)
    values = []
    for i in range(steps):
        state, metrics = compiled_step(**options)(state, small_batch(n, seed=i))
        values.append(float(metrics["loss"]))
    return values


def test_mixing_follows_from_seed_and_step_alone_whatever_the_slices():
    both = dict(mixup=0.5, cutmix=1.0)
    once = losses(**both)
    assert once == losses(**both)
    for others in (losses(), losses(seed=1, **both), losses(first=5, **both)):
        assert len({*once, *others}) == 6
    np.testing.assert_allclose(losses(accum_steps=4, **both), once, rtol=1e-5)


def test_the_loss_is_that_of_the_mixed_batch():
    model, batch = SmallModel(), small_batch()
    key = TrainState.create(params={}, tx=plain_sgd()).dropout_key()
    by_hand = mix(batch, key, CLASSES, mixup=0.5, cutmix=0.0)
    z = model.apply({"params": small_params(model)}, by_hand["image"])
    expected = -(jax.nn.log_softmax(z) * by_hand["label"]).sum(axis=1).mean()
    assert losses(steps=1, mixup=0.5)[0] == pytest.approx(float(expected), rel=1e-6)


def test_without_mixing_the_program_is_the_one_that_knows_nothing_of_it():
    model, tx = SmallModel(), plain_sgd()
    state = TrainState.create(params=small_params(model), tx=tx)

    def program(**options):
        return make_train_step(model, tx, **options).lower(state, small_batch()).as_text()

    assert program(mixup=0.0, cutmix=0.0) == program()
    assert len(program(mixup=0.2)) > 1.1 * len(program())


EIGHT_DEVICES = """
    import json
    import jax
    from tests.training import test_mixing as t
    from vit_jax.training import TrainState

    assert jax.device_count() == 8
    options = dict(mixup=0.5, cutmix=1.0, accum_steps=2)
    state = TrainState.create(params=t.small_params(t.SmallModel()), tx=t.plain_sgd())
    program = t.compiled_step(**options).lower(state, t.small_batch(32)).compile().as_text()
    print(json.dumps([t.losses(n=32, **options), "all-gather" in program]))
"""


@pytest.mark.slow
def test_eight_devices_mix_as_one_and_send_only_neighbouring_images():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)],
        env=environment | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values, gathers = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(values, losses(n=32, mixup=0.5, cutmix=1.0), rtol=1e-5)
    assert not gathers
