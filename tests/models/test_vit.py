"""What the network computes: shapes, numbers, dropout, data types and refusals."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import published, reference
from vit_jax import create_model
from vit_jax.errors import UserError
from vit_jax.models import CLASSIFIERS, VisionTransformer
from vit_jax.models.layers import Mlp
from vit_jax.models.vit import EncoderBlock

TINY = dict(patch_size=(4, 4), hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24)


def tiny(num_classes: int | None = 5, **fields) -> VisionTransformer:
    return VisionTransformer(num_classes=num_classes, **(TINY | fields))


def seeded(model: nn.Module, x: np.ndarray, **kwargs):
    """The model's variables, with the seeded numbers of the reference in place of initial ones."""
    variables = jax.eval_shape(functools.partial(model.init, **kwargs), key(0), x)
    shapes = {k: v.shape for k, v in flatten_dict(variables["params"], sep="/").items()}
    arrays = reference.make_params(shapes, seed=0)
    return {"params": unflatten_dict(arrays, sep="/")}, arrays


def key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="rbg")  # Several times faster to compile than the default.


def apply(model: nn.Module, variables, x: np.ndarray, seed: int = 0, **kwargs):
    """`model.apply`, compiled as a whole, with a seed for dropout."""
    return _compiled(model, **kwargs)(variables, x, key(seed))


@functools.cache
def _compiled(model: nn.Module, **kwargs):
    return jax.jit(lambda v, x, rng: model.apply(v, x, rngs={"dropout": rng}, **kwargs))


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# Numbers.


def _is_conv_root(module: nn.Module, _) -> bool:
    return module.name == "conv_root"


@pytest.mark.parametrize("case", list(reference.facts("fwd")))
def test_the_original_codes_numbers_come_out(case):
    """Logits, the head's input and statistics of every block, on seeded weights and images."""
    facts = reference.facts("fwd")[case]
    expected = np.load(reference.OFFICIAL / f"fwd_{case}.npz")
    if facts["config"].startswith("ViT-"):
        shapes = reference.official_shapes(facts["config"], facts["head"], facts["res"])
    else:
        shapes = published.official_shapes(facts["config"])
    arrays = reference.make_params(shapes, facts["seed"])
    assert reference.digest(arrays) == facts["params_sha256"]
    images = reference.make_images(facts["image_seed"], 2, facts["res"])
    model = create_model(facts["config"], num_classes=1000)
    variables = {"params": unflatten_dict(arrays, sep="/")}

    with jax.default_matmul_precision("highest"):
        (logits, features), captured = apply(
            model, variables, images, return_features=True, capture_intermediates=_is_conv_root
        )
    if "conv_root" in facts["inter_names"]:
        (features["conv_root"],) = captured["intermediates"]["conv_root"]["__call__"]

    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
    np.testing.assert_allclose(features["pre_logits"], expected["pre_logits"], atol=1e-5)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), expected["argmax"])
    for name, statistics in zip(facts["inter_names"], expected["inter"], strict=True):
        x = np.asarray(features[name.removeprefix("Transformer/")], np.float64).reshape(2, -1)
        found = np.stack([np.linalg.norm(x, axis=1), x.mean(axis=1), x[:, 0]], axis=1)
        np.testing.assert_allclose(found, statistics, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"num_layers": 2}, (2, 8, 8, 3)),
        ({"classifier": "gap"}, (3, 8, 12, 3)),
        ({"classifier": "first"}, (2, 8, 12, 3)),
        ({"classifier": "unpooled"}, (2, 8, 8, 1)),
        ({"classifier": "token_unpooled", "representation_size": 7}, (2, 8, 8, 3)),
        ({"representation_size": 16}, (1, 12, 8, 3)),
        ({"classifier": "gap", "representation_size": 9, "patch_size": (3, 5)}, (2, 7, 21, 2)),
        ({"num_heads": 4, "num_layers": 3, "mlp_dim": 5}, (2, 4, 4, 3)),
        ({"num_heads": 1, "hidden_size": 6}, (1, 9, 16, 4)),
        ({"num_classes": None, "representation_size": 11}, (2, 8, 8, 3)),
        ({"num_classes": None, "classifier": "gap"}, (2, 8, 8, 3)),
    ],
)
def test_the_network_is_the_papers(fields, shape):
    """Against the equations in float64 NumPy, which share no code with the network."""
    model = tiny(**fields)
    images = random_images(*shape)
    variables, arrays = seeded(model, images)

    with jax.default_matmul_precision("highest"):
        logits = apply(model, variables, images)

    expected = reference.forward(arrays, images, classifier=model.classifier)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_each_image_of_a_batch_is_classified_on_its_own():
    images = random_images(3, 8, 8, 3)
    variables, _ = seeded(tiny(), images)

    together = apply(tiny(), variables, images)
    alone = [apply(tiny(), variables, image[None])[0] for image in images]

    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


# Shapes.


def test_a_image_that_is_not_square_gives_a_grid_that_is_not_square():
    model = create_model("ViT-Ti_16", 10, patch_size=(20, 20), num_layers=1, classifier="gap")
    images = random_images(1, 60, 100, 1)

    variables = jax.jit(model.init)(key(0), images)
    logits, features = apply(model, variables, images, return_features=True)

    assert model.grid_size((60, 100)) == (3, 5)
    assert features["embedding"].shape == (1, 3, 5, 192)
    assert features["encoder_norm"].shape == (1, 15, 192)
    assert variables["params"]["embedding"]["kernel"].shape == (20, 20, 1, 192)
    assert logits.shape == (1, 10)


def test_pixels_that_fill_no_patch_are_cut():
    images = random_images(2, 11, 9, 3)
    variables, _ = seeded(tiny(), images[:, :8, :8])

    np.testing.assert_array_equal(
        apply(tiny(), variables, images), apply(tiny(), variables, images[:, :8, :8])
    )


@pytest.mark.parametrize(
    ("classifier", "shape"),
    [("token", (2, 5)), ("gap", (2, 5)), ("unpooled", (2, 6, 5)), ("token_unpooled", (2, 7, 5))],
)
def test_the_classifier_says_what_the_head_sees(classifier, shape):
    assert classifier in CLASSIFIERS
    model = tiny(classifier=classifier)
    images = random_images(2, 8, 12, 3)

    assert apply(model, seeded(model, images)[0], images).shape == shape
    assert model.has_class_token == ("token" in classifier)


def test_features_have_the_documented_names_and_shapes():
    model = tiny(representation_size=9, num_layers=3)
    images = random_images(2, 8, 12, 3)
    variables, _ = seeded(model, images)

    logits, features = apply(model, variables, images, return_features=True)

    assert {name: value.shape for name, value in features.items()} == {
        "embedding": (2, 2, 3, 16),
        "encoderblock_0": (2, 7, 16),
        "encoderblock_1": (2, 7, 16),
        "encoderblock_2": (2, 7, 16),
        "encoder_norm": (2, 7, 16),
        "pre_logits": (2, 9),
    }
    np.testing.assert_array_equal(logits, apply(model, variables, images))


# Initial values.


def test_a_new_head_gives_its_bias_for_any_image():
    model = tiny(head_bias_init=-6.5)

    logits, _ = jax.jit(model.init_with_output)(key(0), random_images(2, 8, 8, 3))

    np.testing.assert_array_equal(logits, np.full((2, 5), -6.5))


def test_initial_weights_have_the_official_spread():
    model = tiny(hidden_size=64, mlp_dim=256, patch_size=(2, 2))
    params = jax.jit(model.init)(key(0), random_images(1, 32, 32, 3))["params"]
    encoder = params["Transformer"]
    mlp = encoder["encoderblock_0"]["MlpBlock_0"]

    assert np.std(encoder["posembed_input"]["pos_embedding"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(mlp["Dense_0"]["kernel"]) == pytest.approx((2 / (64 + 256)) ** 0.5, rel=0.05)
    assert 0 < np.abs(mlp["Dense_0"]["bias"]).max() < 1e-5
    assert not np.any(params["cls"])


# Dropout and stochastic depth.


@pytest.mark.parametrize(
    "rate", ["dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"]
)
def test_dropout_is_off_unless_training_and_then_seeded(rate):
    images = random_images(4, 8, 8, 3)
    variables, _ = seeded(tiny(num_layers=2), images)
    model = tiny(num_layers=2, **{rate: 0.5})

    def train(seed):
        return apply(model, variables, images, seed, train=True)

    expected = apply(tiny(num_layers=2), variables, images)
    np.testing.assert_array_equal(apply(model, variables, images, train=False), expected)
    np.testing.assert_array_equal(train(1), train(1))
    assert not np.allclose(train(1), train(2))
    assert not np.allclose(train(1), expected)


def _copies(x: np.ndarray, n: int) -> np.ndarray:
    return np.broadcast_to(x, (n, *x.shape))


def _assert_mean(samples: np.ndarray, expected: np.ndarray) -> None:
    """The mean over the first axis is the expected one, within five standard errors."""
    error = samples.std(axis=0) / len(samples) ** 0.5
    assert np.all(np.abs(samples.mean(axis=0) - expected) < 5 * error + 1e-6)
    assert np.all(error > 0)


def test_dropout_preserves_the_expected_output_of_the_mlp():
    x = _copies(random_images(3, 16), 4000)
    plain, dropping = Mlp(24), Mlp(24, dropout_rate=0.3)
    params, _ = seeded(plain, x, deterministic=True)

    samples = apply(dropping, params, x, seed=1, deterministic=False)

    _assert_mean(np.asarray(samples), apply(plain, params, x[:1], deterministic=True)[0])
    assert np.mean(np.asarray(samples) == 0) == pytest.approx(0.3, abs=0.01)


def _silent(params, *names: str):
    """The parameters with some dense layers' outputs turned to zero."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {k: v * 0 if any(f"/{n}/" in k for n in names) else v for k, v in flat.items()}, sep="/"
    )


def test_attention_dropout_preserves_the_expected_output_of_attention():
    x = _copies(random_images(5, 16), 4000)
    block = EncoderBlock(2, 24, attention_dropout_rate=0.3)
    params = _silent(seeded(block, x, deterministic=True)[0], "Dense_1")

    samples = apply(block, params, x, seed=1, deterministic=False)

    _assert_mean(np.asarray(samples), apply(block, params, x[:1], deterministic=True)[0])


def test_stochastic_depth_leaves_out_whole_branches_of_single_images():
    x = _copies(random_images(5, 16), 4000)
    block = EncoderBlock(2, 24)
    params = _silent(seeded(block, x, deterministic=True)[0], "out")

    samples = apply(block, params, x, seed=1, deterministic=False, drop_path_rate=0.25)
    branch = apply(block, params, x[:1], deterministic=True)[0] - x[0]

    factors = np.asarray(samples - x) / np.asarray(branch)
    dropped = np.all(np.abs(factors) < 1e-3, axis=(1, 2))
    kept = np.all(np.abs(factors - 1 / 0.75) < 1e-2, axis=(1, 2))
    assert np.all(dropped | kept)
    assert dropped.mean() == pytest.approx(0.25, abs=0.035)


def test_the_two_branches_of_a_block_are_left_out_independently():
    x = _copies(random_images(5, 16), 2000)
    block = EncoderBlock(2, 24)
    params, _ = seeded(block, x, deterministic=True)

    samples = apply(block, params, x, seed=1, deterministic=False, drop_path_rate=0.5)

    outcomes, counts = np.unique(np.round(samples[:, 0, 0], 4), return_counts=True)
    assert len(outcomes) == 4
    assert np.all(np.abs(counts / len(x) - 0.25) < 0.05)


@pytest.mark.parametrize(("depth", "expected"), [(5, [0, 0.1, 0.2, 0.3, 0.4]), (1, [0])])
def test_the_rate_of_stochastic_depth_grows_linearly(depth, expected):
    model = tiny(num_layers=depth, stochastic_depth_rate=0.4)
    rates = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, EncoderBlock):
            rates[context.module.name] = kwargs["drop_path_rate"]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, key(0), random_images(1, 8, 8, 3))

    assert list(rates) == [f"encoderblock_{i}" for i in range(depth)]
    np.testing.assert_allclose(list(rates.values()), expected)


# Data types.


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_bfloat16_keeps_float32_parameters_and_logits(classifier):
    images = random_images(4, 16, 16, 3)
    variables, _ = seeded(tiny(classifier=classifier), images)
    model = tiny(classifier=classifier, dtype=jnp.bfloat16)

    logits, features = apply(model, variables, images, return_features=True)
    exact = apply(tiny(classifier=classifier), variables, images)

    initial = jax.eval_shape(model.init, key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    assert features["encoderblock_0"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.std(exact)


# Refusals.


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (8, 8, 3), r"shape \(8, 8, 3\), expected \(n, height, width, channels\).*\[None\]"),
        ({}, (1, 3, 8, 3), "image of 3x8 pixels is smaller than one patch of 4x4"),
        ({"patch_size": (9, 9)}, (1, 8, 8, 3), "8x8 pixels is smaller than one patch of 9x9"),
        ({"patch_size": 4}, (1, 8, 8, 3), r"patch_size is 4, expected \(height, width\)"),
        ({"patch_size": (4, 0)}, (1, 8, 8, 3), r"patch_size is \(4, 0\)"),
        ({"num_heads": 3}, (1, 8, 8, 3), "hidden_size 16 is not divisible by num_heads 3"),
        ({"classifier": "mean"}, (1, 8, 8, 3), "unknown classifier 'mean', expected one of token"),
        ({"position_embedding": "rotary"}, (1, 8, 8, 3), "unknown position_embedding 'rotary'"),
        (
            {"position_embedding": "sincos2d", "hidden_size": 18},
            (1, 8, 8, 3),
            "hidden_size is 18, expected a multiple of 4 from 8 for sincos2d",
        ),
        ({"resnet": (2, 0)}, (1, 64, 64, 3), r"resnet is \(2, 0\), expected the number of units"),
        (
            {"resnet": (1,)},
            (1, 12, 64, 3),
            "image of 12x64 pixels is smaller than one patch of 16x16",
        ),
        ({"dropout_rate": 1.5}, (1, 8, 8, 3), "dropout_rate is 1.5, expected a probability"),
        ({"stochastic_depth_rate": -0.1}, (1, 8, 8, 3), "stochastic_depth_rate is -0.1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(fields, shape, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields).init(key(0), jnp.zeros(shape))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool"])
def test_raw_pixels_are_refused(dtype):
    with pytest.raises(UserError, match=f"images are {dtype}, expected floats"):
        tiny().init(key(0), jnp.zeros((1, 8, 8, 3), dtype))


def test_a_network_is_exported_for_any_number_of_images():
    model = tiny()
    x = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    variables = jax.jit(model.init)(key(0), x)
    many = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *x.shape[1:]), x.dtype)
    exported = jax.export.export(jax.jit(functools.partial(model.apply, variables)))(many)
    for batch in (x[:1], x):
        expected = apply(model, variables, batch)
        np.testing.assert_allclose(exported.call(batch), expected, atol=1e-6)
