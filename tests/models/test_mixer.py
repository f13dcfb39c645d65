"""MLP-Mixer: numbers, stochastic depth, data types and refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import reference
from tests.models.networks import apply, arrays_of, feature_shapes, key, random_images
from vit_jax.errors import UserError
from vit_jax.models import MlpMixer
from vit_jax.models.mixer import MixerBlock


def mixer(num_classes=5, **fields) -> MlpMixer:
    sizes = dict(patch_size=(8, 8), hidden_size=16, num_layers=2)
    sizes |= dict(tokens_mlp_dim=10, channels_mlp_dim=24)
    return MlpMixer(num_classes=num_classes, **(sizes | fields))


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (2, 32, 32, 3)),
        ({"num_classes": None}, (2, 24, 40, 3)),
        ({"patch_size": (5, 7), "num_layers": 3}, (2, 23, 31, 1)),
        ({"num_layers": 1, "channels_mlp_dim": 3}, (1, 1, 17, 4)),
    ],
)
def test_a_mixer_is_the_papers(fields, shape):
    model, images = mixer(**fields), random_images(*shape)
    for seed in range(2):
        arrays = arrays_of(model, images, seed)

        logits = apply(model, arrays, images)

        expected = reference.mixer_forward(arrays, images)
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_features_have_the_documented_names_and_shapes():
    assert feature_shapes(mixer(), np.zeros((2, 60, 40, 3))) == {
        "stem": (2, 8, 5, 16),
        "MixerBlock_0": (2, 40, 16),
        "MixerBlock_1": (2, 40, 16),
        "pre_head_layer_norm": (2, 40, 16),
        "pre_logits": (2, 16),
    }


def test_a_new_mixer_gives_the_bias_of_its_head():
    logits, _ = jax.jit(mixer(head_bias_init=-6.5).init_with_output)(
        key(0), random_images(2, 8, 8, 3)
    )

    np.testing.assert_array_equal(logits, np.full((2, 5), -6.5))


# Stochastic depth.


def test_stochastic_depth_of_a_mixer_is_off_unless_training_and_then_seeded():
    images = random_images(4, 16, 16, 3)
    model, plain = mixer(stochastic_depth_rate=0.5), mixer()
    arrays = arrays_of(plain, images)

    def train(seed):
        return apply(model, arrays, images, seed, train=True)

    expected = apply(plain, arrays, images)
    np.testing.assert_array_equal(apply(model, arrays, images), expected)
    np.testing.assert_array_equal(train(1), train(1))
    assert not np.allclose(train(1), train(2))
    assert not np.allclose(train(1), expected)


def test_the_branches_of_a_mixer_block_are_left_out_whole_and_independently():
    x = np.broadcast_to(random_images(5, 16), (2000, 5, 16))
    block = MixerBlock(10, 24)
    shapes = jax.eval_shape(functools.partial(block.init, deterministic=True), key(0), x[:1])
    flat = flatten_dict(shapes["params"], sep="/")
    arrays = reference.make_params({k: v.shape for k, v in flat.items()}, seed=0)

    samples = np.asarray(apply(block, arrays, x, 1, deterministic=False, drop_path_rate=0.25))

    outcomes, counts = np.unique(np.round(samples, 3), axis=0, return_counts=True)
    untouched = np.all(np.abs(outcomes - x[0]) < 2e-3, axis=(1, 2))
    shares = sorted(counts[counts > 20] / len(x))
    np.testing.assert_allclose(shares, [1 / 16, 3 / 16, 3 / 16, 9 / 16], atol=0.04)
    assert counts[untouched].sum() / len(x) == pytest.approx(1 / 16, abs=0.02)


@pytest.mark.parametrize(("depth", "expected"), [(5, [0, 0.1, 0.2, 0.3, 0.4]), (1, [0])])
def test_the_rate_of_stochastic_depth_of_a_mixer_grows_linearly(depth, expected):
    model = mixer(num_layers=depth, stochastic_depth_rate=0.4)
    rates = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, MixerBlock):
            rates[context.module.name] = kwargs["drop_path_rate"]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, key(0), random_images(1, 8, 8, 3))

    assert list(rates) == [f"MixerBlock_{i}" for i in range(depth)]
    np.testing.assert_allclose(list(rates.values()), expected)


# Data types.


def test_bfloat16_keeps_float32_parameters_and_logits():
    images = random_images(4, 40, 40, 3)
    arrays = arrays_of(mixer(), images)
    model = mixer(dtype=jnp.bfloat16)

    logits, features = apply(model, arrays, images, return_features=True)
    exact = apply(mixer(), arrays, images)

    initial = jax.eval_shape(model.init, key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    assert features["MixerBlock_0"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.std(exact)


# Refusals.


@pytest.mark.parametrize("size", [(32, 24), (40, 40)])
def test_a_mixer_refuses_images_of_another_number_of_tokens(size):
    model, images = mixer(), random_images(1, 32, 32, 3)
    params = unflatten_dict(arrays_of(model, images), sep="/")
    tokens = size[0] * size[1] // 64
    message = f"weights are for 16 tokens, the images make {tokens}: the number of tokens of a"

    with pytest.raises(UserError, match=message):
        model.apply({"params": params}, random_images(1, *size, 3))


def test_a_mixer_takes_images_whose_border_only_is_missing():
    model, images = mixer(), random_images(1, 32, 32, 3)
    arrays = arrays_of(model, images)
    padded = np.pad(images[:, 1:-1, :-1], ((0, 0), (1, 1), (0, 1), (0, 0)))

    # An odd pixel is missing at the end, of two one at each side.
    np.testing.assert_allclose(
        apply(model, arrays, images[:, 1:-1, :-1]), apply(model, arrays, padded), atol=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (8, 8, 3), r"shape \(8, 8, 3\), expected \(n, height, width, channels\).*\[None\]"),
        ({"patch_size": 8}, (1, 8, 8, 3), r"patch_size is 8, expected \(height, width\)"),
        ({"patch_size": (8, 0)}, (1, 8, 8, 3), r"patch_size is \(8, 0\)"),
        ({"stochastic_depth_rate": 1.0}, (1, 8, 8, 3), "stochastic_depth_rate is 1.0, expected a"),
    ],
)
def test_a_mixer_refuses_what_makes_no_sense(fields, shape, message):
    with pytest.raises(UserError, match=message):
        mixer(**fields).init(key(0), jnp.zeros(shape))
