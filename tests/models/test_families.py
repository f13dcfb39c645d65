"""Hybrids, attention pooling and fixed positions, and the parameters of all published families."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import published, reference
from tests.models.networks import apply, arrays_of, feature_shapes, key, random_images, shapes_of
from vit_jax import create_model
from vit_jax.errors import UserError
from vit_jax.models import VisionTransformer, create_lit
from vit_jax.models.vit import sincos_positions

# As the original code counts them, with a head of 1000 classes.
PARAMETERS = {
    "R+ViT-Ti_16": 6_337_704,
    "R26+ViT-S_32": 36_431_912,
    "R26+ViT-B_32": 101_383_976,
    "R50+ViT-B_16": 98_659_112,
    "R50+ViT-L_32": 328_994_856,
    "Mixer-B_16": 59_880_472,
    "Mixer-B_32": 60_293_428,
    "Mixer-L_16": 208_196_168,
}
LITS = ("LiT-B16B", "LiT-B16B_2", "LiT-L16L", "LiT-L16S", "LiT-L16Ti")
HEADS = {
    "1000": (1000, False),
    "21843": (21843, False),
    "none": (None, False),
    "1000+rep": (1000, True),
    "21843+rep": (21843, True),
}
TINY = dict(patch_size=(1, 1), hidden_size=16, num_layers=1, num_heads=2, mlp_dim=24)


def hybrid(resnet=(1, 1), num_classes=5, **fields) -> VisionTransformer:
    return VisionTransformer(num_classes=num_classes, resnet=resnet, **(TINY | fields))


def vit(num_classes=5, **fields) -> VisionTransformer:
    return VisionTransformer(num_classes=num_classes, **(TINY | dict(patch_size=(4, 4)) | fields))


# Parameters.


def official(name: str, num_classes: int | None, has_representation: bool):
    """Names and shapes of the original code's model with a head."""
    shapes = published.official_shapes(name, num_classes or 1)
    if num_classes is None:
        del shapes["head/kernel"], shapes["head/bias"]
    if has_representation:
        (width,) = shapes["Transformer/encoder_norm/bias"]
        shapes |= {"pre_logits/kernel": (width, width), "pre_logits/bias": (width,)}
    return shapes


def some(names, fast):
    """The names as parameters; all but a few take seconds together and are marked slow."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", some(PARAMETERS, ("R+ViT-Ti_16", "R26+ViT-S_32", "Mixer-B_32")))
def test_a_model_has_the_official_parameters(name):
    shapes = shapes_of(create_model(name, num_classes=1000), np.zeros((1, 224, 224, 3), np.float32))

    assert shapes == official(name, *HEADS["1000"])
    assert published.count(shapes) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *[("R+ViT-Ti_16", head) for head in HEADS if head != "1000"],
        *[("Mixer-B_32", head) for head in ("21843", "none")],
    ],
)
def test_a_model_with_any_official_head_has_the_official_parameters(name, head):
    num_classes, has_representation = HEADS[head]
    fields = {"representation_size": 192} if has_representation else {}
    model = create_model(name, num_classes, **fields)

    shapes = shapes_of(model, np.zeros((1, 224, 224, 3), np.float32))

    assert shapes == official(name, num_classes, has_representation)


@pytest.mark.parametrize("name", [*PARAMETERS, *LITS])
def test_the_committed_shapes_are_those_of_the_full_manifests(name, shared):
    full = json.loads((shared / "official" / "manifests" / f"{name}.json").read_text())
    for head, added in full.get("heads", {"": {}}).items():
        expected = {k: tuple(v) for k, v in (full["params"] | added).items()}
        found = official(name, *HEADS[head]) if head else published.official_shapes(name)
        assert found == expected
        assert published.count(found) == full["n_params"][head or "all"]


@pytest.mark.parametrize("name", some(LITS, ("LiT-B16B_2",)))
def test_a_lit_model_has_the_committed_parameters(name):
    images, tokens = np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 16), np.int32)

    assert shapes_of(create_lit(name), images, tokens) == published.official_shapes(name)


# Numbers, against the equations in float64 NumPy, which share no code with the networks.


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({}, (2, 64, 64, 3)),
        ({"resnet": (), "patch_size": (2, 2)}, (2, 32, 48, 3)),
        ({"resnet": (2, 1, 1), "classifier": "gap"}, (1, 33, 70, 3)),
        ({"resnet": (1,), "patch_size": (2, 3), "num_classes": None}, (2, 31, 50, 1)),
        ({"representation_size": 7, "classifier": "map"}, (2, 41, 32, 3)),
    ],
)
def test_a_hybrid_is_the_papers(fields, shape):
    model, images = hybrid(**fields), random_images(*shape)
    for seed in range(2):
        arrays = arrays_of(model, images, seed)

        logits = apply(model, arrays, images)

        expected = reference.forward(arrays, images, classifier=model.classifier)
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, atol=6e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"classifier": "map"}, (2, 8, 12, 3)),
        ({"classifier": "map", "representation_size": 9, "num_layers": 2}, (2, 8, 8, 1)),
        ({"classifier": "map", "num_heads": 4, "num_classes": None}, (1, 9, 16, 3)),
        ({"position_embedding": "sincos2d", "classifier": "gap"}, (2, 8, 20, 3)),
        ({"position_embedding": "sincos2d", "classifier": "map"}, (2, 12, 8, 3)),
        ({"position_embedding": "sincos2d", "classifier": "token"}, (2, 12, 8, 3)),
        ({"position_embedding": "sincos2d", "classifier": "unpooled"}, (2, 8, 8, 3)),
        (
            {"position_embedding": "sincos2d", "classifier": "gap", "resnet": (1, 1)}
            | {"patch_size": (1, 1)},
            (1, 40, 56, 3),
        ),
    ],
)
def test_attention_pooling_and_fixed_positions_are_the_papers(fields, shape):
    model, images = vit(**fields), random_images(*shape)
    arrays = arrays_of(model, images)

    logits = apply(model, arrays, images)

    expected = reference.forward(arrays, images, classifier=model.classifier)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(("grid", "width"), [((1, 1), 8), ((3, 5), 12), ((24, 40), 64)])
def test_fixed_positions_are_sines_and_cosines(grid, width):
    found = sincos_positions(grid, width)

    assert (found.shape, found.dtype) == ((1, grid[0] * grid[1], width), jnp.float32)
    np.testing.assert_allclose(found[0], reference.sincos_positions(*grid, width), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "shape", "scale", "epsilons"),
    [
        (vit(num_layers=2), (2, 8, 12, 3), np.float32(1), ["NORM_EPSILON"]),
        (
            hybrid(classifier="gap"),
            (2, 48, 33, 3),
            reference.FAINT_IMAGES,
            ["NORM_EPSILON", "STANDARDISATION_EPSILON"],
        ),
    ],
    ids=["ViT", "hybrid"],
)
def test_the_epsilons_are_the_originals(model, shape, scale, epsilons, monkeypatch):
    """On numbers so small that they decide: without them something else would come out."""
    images = random_images(*shape) * scale
    arrays = arrays_of(model, images, seed=3, faint=True)

    logits = apply(model, arrays, images)

    def expected():
        return reference.forward(arrays, images, classifier=model.classifier)

    np.testing.assert_allclose(logits, expected(), atol=6e-5)
    for epsilon in epsilons:
        with monkeypatch.context() as patch:
            patch.setattr(reference, epsilon, 0.5 * getattr(reference, epsilon))
            assert np.abs(expected() - logits).max() > 2e-3


# Shapes.


@pytest.mark.parametrize(
    ("resnet", "patch_size", "stride"),
    [((), (8, 8), (32, 32)), ((1,), (2, 3), (8, 12)), ((1, 1, 1, 1), (1, 1), (32, 32))],
)
def test_the_grid_of_a_hybrid_is_counted_in_steps_of_its_features(resnet, patch_size, stride):
    model = hybrid(resnet, patch_size=patch_size, classifier="unpooled")
    assert model.stride == stride
    for height, width in ((64, 96), (65, 127), (97, 50)):
        rows, columns = model.grid_size((height, width))
        logits = jax.eval_shape(
            lambda x: model.init_with_output(key(0), x)[0], np.zeros((1, height, width, 3))
        )
        assert logits.shape == (1, rows * columns, 5)


def test_features_of_a_hybrid_have_the_documented_names_and_shapes():
    assert feature_shapes(hybrid(classifier="map"), np.zeros((2, 60, 40, 3))) == {
        "resnet": (2, 8, 5, 512),
        "embedding": (2, 8, 5, 16),
        "encoderblock_0": (2, 40, 16),
        "encoder_norm": (2, 40, 16),
        "pre_logits": (2, 16),
    }


# Initial values.


def test_a_new_residual_unit_passes_its_input_on_and_a_new_head_gives_its_bias():
    images = random_images(1, 32, 32, 3)
    one, two = (hybrid((units,), patch_size=(2, 2), head_bias_init=-3.0) for units in (1, 2))
    params = jax.jit(two.init)(key(0), images)["params"]
    first = {**params, "block1": {"unit1": params["block1"]["unit1"]}}

    outputs = [
        apply(model, flatten_dict(p, sep="/"), images, return_features=True)
        for model, p in ((one, first), (two, params))
    ]

    (logits, features), (_, more) = outputs
    np.testing.assert_array_equal(features["resnet"], more["resnet"])
    np.testing.assert_array_equal(logits, np.full((1, 5), -3.0))


# Data types.


@pytest.mark.parametrize(
    "model",
    [
        hybrid(),
        vit(classifier="map"),
        vit(position_embedding="sincos2d", classifier="gap"),
    ],
    ids=["hybrid", "MAP", "sincos2d"],
)
def test_bfloat16_keeps_float32_parameters_and_logits(model):
    images = random_images(4, 40, 40, 3)
    arrays = arrays_of(model, images)
    rounded = model.clone(dtype=jnp.bfloat16)

    logits, features = apply(rounded, arrays, images, return_features=True)
    exact = apply(model, arrays, images)

    initial = jax.eval_shape(rounded.init, key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    assert features["encoderblock_0"].dtype == jnp.bfloat16
    assert features.get("resnet", features["embedding"]).dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.std(exact)


# Refusals.


def test_fields_of_another_family_are_refused_by_name():
    with pytest.raises(UserError, match="unknown field 'num_heads' of model Mixer-B_16"):
        create_model("Mixer-B_16", 10, num_heads=3)
    with pytest.raises(UserError, match="unknown field 'tokens_mlp_dim' of model R26"):
        create_model("R26+ViT-S_32", 10, tokens_mlp_dim=3)
