"""The Swin Transformer, of both versions, against its equations and brute force."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests import published, swin_reference
from tests.models.networks import apply, arrays_of, feature_shapes, key, random_images
from vit_jax import create_model, list_models
from vit_jax.checkpoints import read_spec
from vit_jax.errors import UserError
from vit_jax.models import Spec, SwinTransformer, layers, variant
from vit_jax.models.kernels import cpu_kernels
from vit_jax.models.stack import BlockLoop, stack_blocks, unstack_blocks
from vit_jax.models.swin import (
    cut_windows,
    join_windows,
    relative_coordinates,
    relative_index,
    shift_mask,
    window_and_shift,
)

# With a head of 1,000 classes; of the published code.
PARAMETERS = {
    "Swin-T_4-w7": 28_288_354,
    "Swin-S_4-w7": 49_606_258,
    "Swin-B_4-w7": 87_768_224,
    "Swin-L_4-w7": 196_532_476,
    "Swin-B_4-w12": 87_903_584,
    "Swin-L_4-w12": 196_735_516,
    "Swin-T_4-c24-w8": 28_306_432,
    "SwinV2-T_4-w8": 28_347_154,
    "SwinV2-T_4-w16": 28_347_154,
    "SwinV2-S_4-w8": 49_728_418,
    "SwinV2-S_4-w16": 49_728_418,
    "SwinV2-B_4-w8": 87_918_816,
    "SwinV2-B_4-w16": 87_918_816,
    "SwinV2-B_4-w12to16": 87_918_816,
    "SwinV2-B_4-w12to24": 87_918_816,
}
# With one of ImageNet-21k's 21,841 classes.
OF_21841 = {
    "Swin-T_4-w7": 44_315_083,
    "Swin-B_4-w7": 109_130_249,
    "Swin-L_4-w7": 228_565_093,
    "SwinV2-L_4-w12": 228_772_549,
}
FAST = ("Swin-T_4-w7", "SwinV2-T_4-w8")
MINI = dict(patch_size=(2, 2), hidden_size=8, depths=(2, 2), heads=(2, 4), window=3, mlp_ratio=1.5)
V2 = dict(version=2, pretrained_windows=(0, 0))


def mini(num_classes=5, **fields) -> SwinTransformer:
    return SwinTransformer(num_classes, **(MINI | dict(pretrained_windows=(0, 0)) | fields))


@pytest.mark.parametrize(
    ("name", "classes", "total"),
    [
        pytest.param(*row, marks=[] if row[0] in FAST else pytest.mark.slow)
        for row in [
            *((name, 1000, total) for name, total in PARAMETERS.items()),
            *((name, 21_841, total) for name, total in OF_21841.items()),
        ]
    ],
)
def test_a_variant_has_the_published_number_of_parameters(name, classes, total):
    model = create_model(name, classes)
    assert published.count(model.shapes(model.usual_size, 3)) == total


def test_the_variants_are_listed():
    names = {name for name in list_models() if name.startswith("Swin")}
    assert names >= PARAMETERS.keys() | OF_21841.keys()
    assert variant("SwinV2-B_4-w12to24")["pretrained_windows"] == (12, 12, 12, 6)
    assert create_model("Swin-B_4-w12", 10).official_name() == "Swin-B_4-w12"


# Parts, by brute force.


@pytest.mark.parametrize(("grid", "window"), [((6, 9), (3, 3)), ((4, 4), (4, 2)), ((2, 8), (2, 4))])
def test_windows_are_cut_row_by_row_and_joined_again(grid, window):
    x = random_images(2, *grid, 3)
    windows = cut_windows(x, window)
    across = grid[1] // window[1]
    for b, r, c in np.ndindex(2, *grid):
        place = r // window[0] * across + c // window[1], r % window[0] * window[1] + c % window[1]
        np.testing.assert_array_equal(windows[b][place], x[b, r, c])
    np.testing.assert_array_equal(join_windows(jnp.asarray(windows), window, grid), x)


@pytest.mark.parametrize(
    ("grid", "window", "expected"),
    [
        ((56, 56), 7, ((7, 7), (3, 3))),
        ((7, 7), 7, ((7, 7), (0, 0))),
        ((16, 8), 12, ((12, 8), (6, 0))),
        ((4, 9), 8, ((4, 8), (0, 4))),
    ],
)
def test_window_and_shift_are_decided_for_each_axis(grid, window, expected):
    assert window_and_shift(grid, window) == expected


@pytest.mark.parametrize(
    ("grid", "window"), [((14, 14), 7), ((14, 7), 7), ((12, 4), 4), ((9, 6), 3)]
)
def test_the_mask_keeps_apart_what_was_rolled_around(grid, window):
    sides, shift = window_and_shift(grid, window)
    mask = shift_mask(grid, sides, shift)
    _, added = swin_reference.places_and_scores(grid, window, True)
    numbers = cut_windows(np.arange(grid[0] * grid[1]).reshape(1, *grid), sides)[0]
    assert (mask.shape, mask.dtype) == ((len(numbers), 1, *[numbers.shape[1]] * 2), np.float32)
    for i, own in enumerate(numbers):
        np.testing.assert_array_equal(mask[i, 0], added[np.ix_(own, own)])
    apart = added > -np.inf
    assert (added[apart] == -100).any() == any(shift)


@pytest.mark.parametrize("window", [(7, 7), (2, 5), (1, 3), (1, 1)])
def test_a_bias_belongs_to_query_less_key(window):
    index = relative_index(window)
    places = list(itertools.product(*map(range, window)))
    for (q, (qr, qc)), (k, (kr, kc)) in itertools.product(enumerate(places), repeat=2):
        row = (qr - kr + window[0] - 1) * (2 * window[1] - 1) + qc - kc + window[1] - 1
        assert index[q, k] == row


def test_coordinates_are_logarithms_of_which_the_window_of_training_sets_the_scale():
    found = relative_coordinates((3, 2), 0)
    log = [np.log2(1 + 8 * d / (w - 1)) / 3 for w, d in ((3, 1), (3, 2), (2, 1))]
    assert found.shape == (5 * 3, 2)
    np.testing.assert_allclose(found[:3, 0], -log[1], rtol=1e-6)
    np.testing.assert_allclose(found[:3, 1], [-log[2], 0, log[2]], rtol=1e-6)
    np.testing.assert_allclose(found[9:12, 0], log[0], rtol=1e-6)
    # Of windows of 8, trained with 4: beyond 1.
    assert relative_coordinates((8, 8), 4).max() > relative_coordinates((8, 8), 0).max()
    assert relative_coordinates((1, 1), 0).tolist() == [[0, 0]]


# The whole of it.

CASES = {
    "v1": ({}, (2, 12, 12, 3)),
    "v1, padded": ({}, (2, 16, 20, 3)),
    "v1, one axis is a window": ({}, (1, 6, 18, 3)),
    "v1, odd": (dict(window=2), (2, 10, 14, 1)),
    "v2": (V2, (2, 12, 12, 3)),
    "v2, padded": (V2, (1, 16, 22, 3)),
    "v2, of other windows": (V2 | dict(pretrained_windows=(2, 4)), (2, 12, 18, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_papers_equations(case):
    fields, shape = CASES[case]
    model, images = mini(**fields), random_images(*shape)
    arrays = arrays_of(model, images)
    expected = swin_reference.forward(
        arrays, images, window=model.window, pretrained=model.pretrained_windows
    )
    for own in (model, model.clone(kernels=cpu_kernels(1))):
        found = apply(own, arrays, images)
        np.testing.assert_allclose(found, expected, atol=1e-6 * max(1, np.abs(expected).max()))


def test_features_are_maps_of_each_stage_and_tokens_of_the_last():
    assert feature_shapes(mini(), np.zeros((2, 12, 18, 3), np.float32)) == {
        "embedding": (2, 6, 9, 8),
        "stage_0/encoderblock_0": (2, 6, 9, 8),
        "stage_0/encoderblock_1": (2, 6, 9, 8),
        "stage_0": (2, 6, 9, 8),
        "stage_1/encoderblock_0": (2, 3, 5, 16),
        "stage_1/encoderblock_1": (2, 3, 5, 16),
        "stage_1": (2, 3, 5, 16),
        "encoder_norm": (2, 15, 16),
        "pre_logits": (2, 16),
    }


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("fields", [{}, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("loop", [BlockLoop(remat="full"), BlockLoop(scan=True, remat="dots")],
                         ids=str)  # fmt: skip
def test_in_a_loop_loss_and_gradient_are_the_same(fields, loop):
    plain = mini(**fields, depths=(2, 3))
    images = random_images(2, 14, 10, 3)
    params = unflatten_dict(arrays_of(plain, images), sep="/")

    def gradient(model, params):
        def loss(params):
            logits = model.apply({"params": params}, images, train=True)
            return (jax.nn.log_softmax(logits)[:, 0] ** 2).mean()

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradient(plain, params)
    stacked = stack_blocks(params) if loop.scan else params
    value, found = gradient(plain.clone(loop=loop), stacked)
    found = unstack_blocks(found) if loop.scan else found
    for a, b in (
        (value, expected[0]),
        *zip(*map(jax.tree.leaves, (found, expected[1])), strict=True),
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    kernels = plain.clone(kernels=cpu_kernels(1))
    for a, b in zip(*map(jax.tree.leaves, (gradient(kernels, params), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_stochastic_depth_grows_over_all_stages():
    rates = []
    original = layers.DropPath.__call__

    def seen(self, branch, rate, *, deterministic):
        rates.append(rate)
        return original(self, branch, rate, deterministic=deterministic)

    model, images = mini(depths=(2, 3), stochastic_depth_rate=0.4), random_images(1, 8, 8, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.DropPath, "__call__", seen)
        jax.eval_shape(
            functools.partial(model.init, train=True),
            {"params": key(0), "dropout": key(1)},
            images,
        )
    np.testing.assert_allclose(rates, np.repeat([0, 0.1, 0.2, 0.3, 0.4], 2), atol=1e-7)


def test_stochastic_depth_leaves_out_a_whole_branch_of_an_image():
    model = mini(depths=(2,), heads=(2,), pretrained_windows=(0,), stochastic_depth_rate=0.5)
    images = np.repeat(random_images(1, 8, 8, 3), 64, axis=0)
    arrays = arrays_of(model, images[:1])
    _, features = apply(model, arrays, images, train=True, return_features=True)
    outputs = np.asarray(features["stage_0/encoderblock_1"]).reshape(64, -1)
    assert len(np.unique(outputs.round(3), axis=0)) == 4


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("fields", [{}, V2], ids=["v1", "v2"])
def test_bfloat16_keeps_float32_parameters_and_logits(fields):
    model, images = mini(**fields), random_images(4, 16, 12, 3)
    arrays = arrays_of(model, images)
    rounded = model.clone(dtype=jnp.bfloat16)
    logits, features = apply(rounded, arrays, images, return_features=True)
    exact = apply(model, arrays, images)
    initial = jax.eval_shape(rounded.init, key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    assert features["stage_0"].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.std(exact)


def test_version_2_starts_as_nothing_but_merging_and_its_gradient_is_finite():
    fields = dict(V2, depths=(2,), heads=(2,), pretrained_windows=(0,))
    model, images = mini(**fields), random_images(2, 10, 10, 3)
    params = jax.jit(model.init)(key(0), images)["params"]
    _, features = apply(model, flatten_dict(params, sep="/"), images, return_features=True)
    np.testing.assert_array_equal(
        features["stage_0/encoderblock_0"], features["stage_0/encoderblock_1"]
    )
    scale = params["stage_0"]["encoderblock_0"]["WindowAttention_0"]["logit_scale"]
    np.testing.assert_allclose(scale, np.log(10), rtol=1e-6)
    # Keys of padding are zeros, whose length has no derivative.
    arrays = unflatten_dict(arrays_of(model, images), sep="/")
    gradient = jax.jit(jax.grad(lambda p: model.apply({"params": p}, images).sum()))(arrays)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_network_is_read_from_its_shapes():
    for model, size in ((mini(), (12, 12)), (mini(**V2, depths=(1, 3)), (12, 20))):
        spec = Spec(model, size, 3)
        arrays = {k: np.zeros(v, np.float32) for k, v in spec.shapes().items()}
        untold = {"window": model.window} if model.version == 2 else None
        assert read_spec(arrays, image_size=size, untold=untold) == spec


# Other images and windows.


def test_tables_of_biases_are_resized_with_the_window():
    spec = Spec(mini(), (12, 12), 3)
    arrays = arrays_of(spec.module, np.zeros((1, 12, 12, 3), np.float32))
    found, new = spec.adapt(arrays, window=6, image_size=(24, 24))
    assert (new.window, new.image_size) == (6, (24, 24))
    name = "stage_0/encoderblock_0/WindowAttention_0/relative_position_bias"
    assert {k: v.shape for k, v in found.items()} == new.shapes()
    for head in range(2):
        old = arrays[name][:, head].reshape(5, 5).astype(np.float64)
        np.testing.assert_allclose(
            found[name][:, head].reshape(11, 11), bicubic(old, 11), atol=1e-5
        )
    same, kept = spec.adapt(arrays, image_size=(24, 24))
    assert kept.window == 3
    np.testing.assert_array_equal(same[name], arrays[name])
    # A map that is smaller than a window is one.
    small, less = spec.adapt(arrays, image_size=(8, 4))
    assert {k: v.shape for k, v in small.items()} == less.shapes()
    assert small["stage_1/encoderblock_0/WindowAttention_0/relative_position_bias"].shape == (3, 4)


def bicubic(table: np.ndarray, new: int) -> np.ndarray:
    """Keys' kernel with a of -0.75, by a loop over taps."""

    def kernel(t: float, a: float = -0.75) -> float:
        t = abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    old = len(table)
    out = np.zeros((new, new))
    for i, j in np.ndindex(out.shape):
        y, x = ((k + 0.5) * old / new - 0.5 for k in (i, j))
        first = int(np.floor(y)) - 1, int(np.floor(x)) - 1
        for r, c in itertools.product(*(range(start, start + 4) for start in first)):
            value = table[min(max(r, 0), old - 1), min(max(c, 0), old - 1)]
            out[i, j] += value * kernel(y - r) * kernel(x - c)
    return out


def test_version_2_remembers_for_which_windows_it_was_trained():
    spec = Spec(mini(**V2), (12, 12), 3)
    arrays = arrays_of(spec.module, np.zeros((1, 12, 12, 3), np.float32))
    found, new = spec.adapt(arrays, window=6, image_size=(20, 20))
    assert (new.window, new.pretrained_windows) == (6, (3, 3))
    assert all(found[name] is arrays[name] for name in arrays)
    assert spec.adapt(arrays, image_size=(20, 20))[1].pretrained_windows == (0, 0)
    assert new.replace(window=12).module.clone(window=9).pretrained_windows == (3, 3)
    with pytest.raises(UserError, match="stage 2 has windows of 3x2, which are not square"):
        Spec(mini(**V2), (12, 6), 3).adapt(arrays, image_size=(20, 20))


@pytest.mark.parametrize(
    ("fields", "size", "message"),
    [
        (dict(heads=(2, 3)), (8, 8), "3 heads don't divide the width 16 of stage 2"),
        (dict(heads=(2,)), (8, 8), "expected a number for each stage"),
        (dict(depths=(2, 0)), (8, 8), "of blocks at least 1"),
        (dict(window=0), (8, 8), "window is 0, expected at least 1"),
        (dict(version=3), (8, 8), "version is 3, expected 1 or 2"),
        (dict(pretrained_windows=(3, 3)), (8, 8), "pretrained_windows are of version 2"),
        ({}, (8, 1), "the image of 8x1 pixels is smaller than one patch of 2x2"),
    ],
)
def test_what_makes_no_network_is_refused(fields, size, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(mini(**fields).init, key(0), jnp.zeros((1, *size, 3)))


def test_other_families_have_no_windows():
    vit = Spec(create_model("ViT-mu_16", 5), (32, 32), 3)
    with pytest.raises(UserError, match="a ViT has no windows: leave window out"):
        vit.adapt(arrays_of(vit.module, np.zeros((1, 32, 32, 3), np.float32)), window=4)


def test_flattened_weights_keep_their_names_through_a_stack():
    params = jax.eval_shape(mini().init, key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    again = unstack_blocks(stack_blocks(zeros))
    assert flatten_dict(again, sep="/").keys() == flatten_dict(zeros, sep="/").keys()


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("fields", [{}, V2], ids=["v1", "v2"])
def test_it_is_exported_for_any_number_of_images(fields):
    model, x = mini(**fields), random_images(2, 10, 14, 3)
    arrays = unflatten_dict(arrays_of(model, x), sep="/")
    many = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *x.shape[1:]), x.dtype)
    for platforms in (("cpu",), ("cuda", "tpu")):
        program = jax.export.export(
            jax.jit(lambda x: model.apply({"params": arrays}, x)), platforms=platforms
        )(many)
        if platforms == ("cpu",):
            found = program.call(x)
            np.testing.assert_allclose(found, model.apply({"params": arrays}, x), atol=1e-5)
            assert program.call(x[:1]).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("fields", [{}, V2], ids=["v1", "v2"])
def test_it_has_no_gathers_but_those_of_the_biases(fields):
    """Nor forms that XLA compiles to any on the way back: a scatter for each table."""
    model, x = mini(**fields), random_images(2, 12, 12, 3)
    arrays = unflatten_dict(arrays_of(model, x), sep="/")
    gradient = jax.jit(jax.grad(lambda p, x: model.apply({"params": p}, x).sum()))
    text = gradient.lower(arrays, x).as_text()
    for operation in ("gather", "scatter"):  # Equal blocks may share theirs.
        assert 0 < text.count(f'"stablehlo.{operation}"') <= 4
