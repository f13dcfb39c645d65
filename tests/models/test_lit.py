"""LiT has the published models' parameters and gives the original's embeddings."""

import functools
import importlib.util
import json
import math

import flax
import jax
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.models.lit import LIT_VARIANTS, LiT, create_lit

SMALL = LiT(
    image=dict(patch_size=(8, 8), hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32),
    text_model="text_transformer",
    text=dict(hidden_size=12, num_layers=1, num_heads=2, mlp_dim=24, vocab_size=50, max_len=6),
    out_dim=(None, 16),
)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(1, 50, (3, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(
        lambda: SMALL.init(jax.random.key(0), images=IMAGES, tokens=TOKENS)["params"]
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


compiled = jax.jit(SMALL.apply)


def apply(params, **inputs):
    return compiled({"params": params}, **inputs)


@functools.cache
def traced(name):
    """Shapes of a published model's outputs for one image and one text, and of its weights."""
    model = create_lit(name)
    images, tokens = np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 16), np.int32)
    outputs, variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images=images, tokens=tokens)
    )
    flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    return outputs, {key: leaf.shape for key, leaf in flat.items()}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("LiT-B16B", 195_871_489),
        ("LiT-B16B_2", 195_280_897),
        ("LiT-L16L", 638_443_521),
        ("LiT-L16S", 331_140_353),
        ("LiT-L16Ti", 311_913_089),
    ],
)
def test_a_published_model_has_as_many_parameters(name, parameters):
    _, shapes = traced(name)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("name", LIT_VARIANTS)
def test_parameters_have_the_published_names_and_shapes(name, shared):
    manifest = json.loads((shared / "official" / "manifests" / f"{name}.json").read_text())
    _, shapes = traced(name)
    assert shapes == {k: tuple(v) for k, v in manifest["params"].items()}


@pytest.mark.slow
def test_embeddings_are_the_original_ones(shared):
    official = shared / "official"
    spec = importlib.util.spec_from_file_location("make_npz", official / "make_npz.py")
    make_npz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_npz)
    fixture = json.loads((official / "expected" / "fwd.json").read_text())["LiT-L16Ti"]
    manifest = make_npz.spec(official / "manifests" / "LiT-L16Ti.json", head=None)
    params = make_npz.make_params(manifest, fixture["seed"])
    images = make_npz.make_images(fixture["image_seed"], 2, 224, fixture["image_scale"])
    with np.load(official / "expected" / "fwd_LiT-L16Ti.npz") as file:
        expected = dict(file)

    with jax.default_matmul_precision("highest"):
        zimg, ztxt, out = jax.jit(create_lit("LiT-L16Ti").apply)(
            {"params": flax.traverse_util.unflatten_dict(params, sep="/")},
            images=images,
            tokens=expected["tokens"],
        )

    np.testing.assert_allclose(zimg, expected["zimg"], atol=2e-6)
    np.testing.assert_allclose(ztxt, expected["ztxt"], atol=2e-6)
    np.testing.assert_allclose(out["t"], expected["t"], rtol=1e-6)
    np.testing.assert_allclose(out["img/norm"], expected["img_norm"], rtol=1e-5)
    np.testing.assert_allclose(out["txt/norm"], expected["txt_norm"], rtol=1e-5)
    np.testing.assert_allclose(out["txt/pre_logits"], expected["txt_pre_logits"], atol=2e-5)
    logits = out["t"] * zimg @ ztxt.T
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5)


def test_embeddings_have_length_one_and_the_lengths_before_are_told(params):
    zimg, ztxt, out = apply(params, images=IMAGES, tokens=TOKENS)
    assert zimg.shape == (2, 16)
    assert ztxt.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(zimg, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ztxt, axis=1), 1, atol=1e-6)
    assert out["img/norm"].shape == (2, 1)
    assert out["txt/norm"].shape == (3, 1)
    np.testing.assert_allclose(out["t"], np.exp(params["t"]), rtol=1e-6)


def test_each_tower_works_without_the_other_and_without_its_weights(params):
    zimg, ztxt, _ = apply(params, images=IMAGES, tokens=TOKENS)
    image_side = apply({"img": params["img"], "t": params["t"]}, images=IMAGES)
    text_side = apply({"txt": params["txt"], "t": params["t"]}, tokens=TOKENS)
    np.testing.assert_allclose(image_side[0], zimg, atol=1e-6)
    np.testing.assert_allclose(text_side[1], ztxt, atol=1e-6)
    assert image_side[1] is None
    assert text_side[0] is None


def test_a_model_is_found_without_its_prefix_and_misspelt_names_are_answered():
    assert create_lit("L16Ti") == create_lit("LiT-L16Ti")
    with pytest.raises(UserError, match="unknown model 'L16XL': did you mean LiT-L16L"):
        create_lit("L16XL")


def test_towers_that_do_not_meet_are_refused():
    with pytest.raises(UserError, match="image tower gives 16 numbers and the text tower 8"):
        SMALL.copy(out_dim=(None, 8))


@pytest.mark.parametrize("name", LIT_VARIANTS)
def test_embeddings_are_as_wide_as_the_model_says(name):
    (zimg, ztxt, _), _ = traced(name)
    assert zimg.shape == ztxt.shape == (1, create_lit(name).embedding_size)


def test_a_bundle_has_a_hash_and_its_equals_have_the_same():
    one, other = create_lit("LiT-B16B_2"), create_lit("LiT-B16B_2")
    assert one == other
    assert hash(one) == hash(other)
    assert one != create_lit("LiT-B16B")
