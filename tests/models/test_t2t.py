"""T2T-ViT: against the paper in float64, and what it shares with every family."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import t2t
from tests.models.networks import apply, feature_shapes, key, random_images, shapes_of
from vit_jax import create_model, list_models
from vit_jax.checkpoints import read_layout, read_spec, to_tree
from vit_jax.errors import UserError
from vit_jax.models import Kernels, Spec, T2TViT
from vit_jax.models.kernels import cpu_kernels
from vit_jax.models.positions import resample
from vit_jax.models.stack import BlockLoop, stack_blocks
from vit_jax.models.t2t import linear_attention, random_features, sinusoid, soft_split

# With a head of 1,000 classes, at 224 and where another number is, at 384 pixels.
PARAMETERS = {
    "T2T-ViT-7": 4_310_222,
    "T2T-ViT-10": 5_889_230,
    "T2T-ViT-12": 6_941_902,
    "T2T-ViT-14": 21_545_550,
    "T2T-ViT-19": 39_177_422,
    "T2T-ViT-24": 64_105_934,
    "T2T-ViT-t-14": 21_541_070,
    "T2T-ViT-t-19": 39_172_942,
    "T2T-ViT-t-24": 64_101_454,
    "T2T-ViT-14-resnext": 21_545_550,
    "T2T-ViT-14-wide": 25_156_302,
}
POSITIONS = "Transformer/posembed_input/pos_embedding"


def model_of(kind: str, **changes) -> T2TViT:
    return T2TViT(**(t2t.SMALL | dict(token_attention=kind) | changes))


def theirs_and_ours(kind: str, grid=(2, 2), **sizes):
    theirs = t2t.official_arrays(kind, grid=grid, **sizes)
    return theirs, read_layout(theirs, heads=3).arrays


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_variant_has_the_published_parameters(name):
    model = create_model(name, num_classes=1000)
    spec = Spec(model, (224, 224), 3)

    assert spec.num_parameters == PARAMETERS[name]
    assert spec.name == name
    # What is trained of them; the positions of 384 pixels are more.
    frozen = [np.prod(spec.shapes()[name]) for name in model.frozen if name in spec.shapes()]
    positions = 197 * model.hidden_size
    assert sum(frozen) == positions + (2 * 32 * 64 if model.token_attention == "performer" else 0)
    larger = spec.replace(image_size=(384, 384)).num_parameters
    assert larger - spec.num_parameters == (577 - 197) * model.hidden_size


def test_all_variants_are_known():
    assert [name for name in list_models() if name.startswith("T2T")] == list(PARAMETERS)


# Numbers.


@pytest.mark.parametrize("split", [(7, 4, 2), (3, 2, 1)])
@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 13, 6, 2), (1, 7, 18, 1)])
def test_a_soft_split_is_a_loop_over_windows(shape, split):
    images = random_images(*shape)
    np.testing.assert_array_equal(soft_split(images, *split), t2t.unfold(images, *split))


def test_the_positions_are_sines_and_cosines():
    found = sinusoid(5, 6)
    for token in range(5):
        for channel in range(6):
            angle = token / 10_000 ** (2 * (channel // 2) / 6)
            wave = math.cos(angle) if channel % 2 else math.sin(angle)
            assert found[0, token, channel] == np.float32(wave)


def test_linear_attention_is_its_quadratic_form():
    rng = np.random.default_rng(0)
    query, key_, value = rng.normal(0, 0.5, (3, 2, 9, 64)).astype(np.float32)
    features = rng.normal(0, 0.5, (32, 64)).astype(np.float32)

    found, received = linear_attention(query, key_, value, features)

    weights = t2t.performer_weights(*map(np.float64, (query, key_, features)))
    np.testing.assert_allclose(found, weights @ value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(received(), weights.mean(axis=1), rtol=1e-5)


def test_random_features_stand_for_the_exponential_of_a_product():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 0.15, (2, 1, 1, 64)).astype(np.float32)
    many = rng.normal(size=(200_000, 64)).astype(np.float32)
    product = (random_features(x, many) * random_features(y, many)).sum()
    np.testing.assert_allclose(product, np.exp((x * y).sum()), rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("performer", (2, 41, 23, 3)),
        ("transformer", (1, 16, 50, 1)),
    ],
)
def test_the_network_is_the_papers(kind, shape):
    model, images = model_of(kind), random_images(*shape)
    grid = model.grid_size(shape[1:3])
    theirs, ours = theirs_and_ours(kind, grid, channels=shape[3])

    logits = apply(model, ours, images)

    expected = t2t.forward(theirs, images, heads=3)
    np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", t2t.KINDS)
@pytest.mark.parametrize("form", ["cpu", "padded", "scan", "remat"])
def test_every_form_computes_the_same(kind, form):
    images = random_images(2, 32, 48, 3)
    _, arrays = theirs_and_ours(kind, (2, 3))
    model, expected = model_of(kind), apply(model_of(kind), arrays, images)
    if form == "scan":
        tree = flatten_dict(stack_blocks(to_tree(arrays)), sep="/")
        found = apply(model.clone(loop=BlockLoop(scan=True)), tree, images)
    elif form == "remat":
        found = apply(model.clone(loop=BlockLoop(remat="full")), arrays, images)
    else:
        kernels = cpu_kernels(1) if form == "cpu" else Kernels(token_multiple=5)
        found = apply(model.clone(kernels=kernels), arrays, images)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", t2t.KINDS)
def test_bfloat16_keeps_float32_parameters_and_logits(kind):
    images = random_images(2, 32, 32, 3)
    _, arrays = theirs_and_ours(kind)
    rounded = model_of(kind, dtype=jnp.bfloat16)

    logits, features = apply(rounded, arrays, images, return_features=True)

    exact = apply(model_of(kind), arrays, images)
    initial = jax.eval_shape(rounded.init, key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    assert {features[name].dtype for name in ("tokens_1", "embedding", "encoderblock_0")} == {
        jnp.dtype("bfloat16")
    }
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.slow
@pytest.mark.ci
def test_the_performer_drops_out_in_training_and_the_transformer_does_not():
    images = random_images(2, 32, 32, 3)
    for kind in t2t.KINDS:
        _, arrays = theirs_and_ours(kind)
        model = model_of(kind)
        outputs = [apply(model, arrays, images, seed, train=True) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(*outputs[:2])
        assert (np.abs(outputs[0] - outputs[2]).max() > 0.01) == (kind == "performer")
        if kind == "transformer":
            np.testing.assert_array_equal(outputs[0], apply(model, arrays, images))


def test_at_first_features_are_orthogonal_positions_sines_and_attention_is_alive():
    images = random_images(1, 32, 48, 3)
    tree = jax.jit(model_of("performer").init)(key(0), images)["params"]
    params = flatten_dict(tree, sep="/")
    _, state = model_of("performer").apply({"params": tree}, images, mutable=["intermediates"])
    for map_ in model_of("performer").further_maps(state["intermediates"]).values():
        assert map_.sum() == pytest.approx(1, abs=1e-3)  # Of vanishing features it would be less.
    for step in (1, 2):
        rows = params[f"tokens_to_token/attention{step}/features"]
        np.testing.assert_allclose(rows @ rows.T, 32 * np.eye(32), atol=1e-4)
    np.testing.assert_array_equal(params[POSITIONS], sinusoid(7, 12))


@pytest.mark.reference
@pytest.mark.parametrize("kind", t2t.KINDS)
@pytest.mark.parametrize("size", [(224, 224), (80, 144)])
def test_pytorch_computes_the_same(kind, size):
    """The plain network of `tests.torch_t2t`, of the width and heads of T2T-ViT-7."""
    torch = pytest.importorskip("torch")
    from tests.torch_t2t import T2T

    model = create_model("T2T-ViT-7", 10, num_layers=2, token_attention=kind)
    rows, columns = model.grid_size(size)
    sizes = dict(grid=(rows, columns), width=256, depth=2, mlp_dim=512, classes=10)
    arrays, images = t2t.official_arrays(kind, **sizes), random_images(2, *size, 3)
    fields = {name: getattr(model, name) for name in t2t.SMALL}
    theirs = T2T(kind, patches=rows * columns, **fields).eval()
    theirs.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})

    logits = apply(model, read_layout(arrays).arrays, images)

    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


# Sizes.


def test_the_features_have_the_documented_names_and_shapes():
    assert feature_shapes(model_of("performer"), np.zeros((2, 50, 33, 3))) == {
        "tokens_1": (2, 12, 8, 64),
        "tokens_2": (2, 6, 4, 64),
        "embedding": (2, 3, 2, 12),
        "encoderblock_0": (2, 7, 12),
        "encoderblock_1": (2, 7, 12),
        "encoder_norm": (2, 7, 12),
        "pre_logits": (2, 12),
    }


@pytest.mark.parametrize(
    ("size", "grid"),
    [((224, 224), (14, 14)), ((384, 384), (24, 24)), ((3, 3), (1, 1)), ((100, 64), (7, 4))],
)
def test_the_grid_of_a_size(size, grid):
    assert model_of("performer").grid_size(size) == grid


def test_too_small_images_and_other_channels_are_refused():
    with pytest.raises(UserError, match="2x40 pixels is smaller than a window"):
        model_of("performer").grid_size((2, 40))
    with pytest.raises(UserError, match="can't be made ready for images of 1 channels"):
        model_of("performer").with_channels({}, 1)
    with pytest.raises(UserError, match="not divisible by num_heads 5"):
        shapes_of(model_of("performer", num_heads=5), np.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match="unknown token_attention 'conv'"):
        shapes_of(model_of("conv"), np.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("kind", t2t.KINDS)
def test_the_architecture_is_read_from_the_arrays(kind):
    _, arrays = theirs_and_ours(kind, (3, 3), channels=2)
    spec = read_spec(arrays)
    assert (spec.module, spec.image_size, spec.channels) == (model_of(kind), (48, 48), 2)


def test_positions_of_another_size_are_resampled_and_the_class_tokens_kept():
    _, arrays = theirs_and_ours("performer", (4, 4))
    model = model_of("performer")

    resized = model.resize(arrays, (64, 64), (48, 96))[POSITIONS]

    np.testing.assert_array_equal(resized[:, 0], arrays[POSITIONS][:, 0])
    expected = resample(arrays[POSITIONS], (4, 4), (3, 6), prefix=1, rule="torch")
    np.testing.assert_array_equal(resized, expected)
    assert resized.shape == (1, 19, 12)
