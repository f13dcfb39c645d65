"""Fields that other families of ViTs need, against a plain formulation in float64."""

import jax
import numpy as np
import pytest
from scipy.special import erf, softmax

from tests import reference
from tests.families import vit_spec
from tests.models.networks import apply
from vit_jax import checkpoints, explain
from vit_jax.errors import UserError
from vit_jax.models.kernels import cpu_kernels
from vit_jax.models.positions import resample
from vit_jax.models.stack import BlockLoop, stack_blocks
from vit_jax.pretrained import Pretrained, load

ALL = dict(
    activation="gelu_erf", layer_norm_epsilon=0.1, qkv_bias=False, layer_scale=0.1, num_registers=3
)
CASES = {name: {name: value} for name, value in ALL.items()} | {
    "all": ALL,
    "all, pooled by mean": ALL | dict(classifier="gap"),
    "all, pooled by attention": ALL | dict(classifier="map"),
    "all, fixed positions": ALL | dict(position_embedding="sincos2d"),
}


def forward(spec, arrays, images: np.ndarray) -> np.ndarray:
    """Logits in float64."""
    w = {k: np.float64(v) for k, v in arrays.items()}
    d, patch = spec.hidden_size, spec.patch_size[0]
    rows = images.shape[1] // patch

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + spec.layer_norm_epsilon
        )
        return x * w[f"{name}/scale"] + w[f"{name}/bias"]

    def gelu(x):
        if spec.activation == "gelu_erf":
            return x * (1 + erf(x / np.sqrt(2))) / 2
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2

    def mlp(x, name):
        x = gelu(x @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"])
        return x @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]

    def attention(x, y, name):
        q, k, v = (
            np.einsum("ntd,dhe->nhte", z, w[f"{name}/{part}/kernel"])
            + w.get(f"{name}/{part}/bias", np.zeros((spec.num_heads, 1)))[:, None]
            for z, part in ((x, "query"), (y, "key"), (y, "value"))
        )
        y = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), axis=-1) @ v
        return np.einsum("nhte,hed->ntd", y, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]

    tiles = images.reshape(len(images), rows, patch, rows, patch, -1).swapaxes(2, 3)
    kernel = w["embedding/kernel"].reshape(-1, d)
    x = tiles.reshape(len(images), rows * rows, -1) @ kernel + w["embedding/bias"]
    prefix = [np.tile(w["cls"], (len(x), 1, 1))] if "cls" in w else []
    if "Transformer/posembed_input/pos_embedding" in w:
        positions = w["Transformer/posembed_input/pos_embedding"]
        prefix = [p + positions[:, :1] for p in prefix]
        x = x + positions[:, len(prefix) :]
    else:
        omega = 10_000.0 ** (-np.arange(d // 4) / (d // 4 - 1))
        y_angle, x_angle = (a.reshape(-1, 1) * omega for a in np.mgrid[:rows, :rows])
        x = x + np.concatenate(
            [np.sin(x_angle), np.cos(x_angle), np.sin(y_angle), np.cos(y_angle)], axis=1
        )
    if "registers" in w:
        prefix.append(np.tile(w["registers"], (len(x), 1, 1)))
    x = np.concatenate([*prefix, x], axis=1)
    for i in range(spec.num_layers):
        block = f"Transformer/encoderblock_{i}"
        y = norm(x, f"{block}/LayerNorm_0")
        y = attention(y, y, f"{block}/MultiHeadDotProductAttention_0")
        x = x + y * w.get(f"{block}/LayerScale_0/scale", 1)
        y = mlp(norm(x, f"{block}/LayerNorm_1"), f"{block}/MlpBlock_0")
        x = x + y * w.get(f"{block}/LayerScale_1/scale", 1)
    x = norm(x, "Transformer/encoder_norm")
    if spec.classifier == "token":
        x = x[:, 0]
    elif spec.classifier == "gap":
        x = x[:, -rows * rows :].mean(axis=1)
    else:
        probe = np.tile(w["MAPHead_0/probe"], (len(x), 1, 1))
        y = attention(probe, x, "MAPHead_0/MultiHeadDotProductAttention_0")
        x = (y + mlp(norm(y, "MAPHead_0/LayerNorm_0"), "MAPHead_0/MlpBlock_0"))[:, 0]
    return x @ w["head/kernel"] + w["head/bias"]


def images(spec, n: int = 2) -> np.ndarray:
    return np.random.default_rng(n).uniform(-1, 1, (n, *spec.image_size, 3)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_plain_formulation(case):
    spec = vit_spec(**CASES[case])
    arrays = reference.make_params(spec.shapes(), seed=4)
    x = images(spec)

    expected = forward(spec, arrays, x)

    np.testing.assert_allclose(apply(spec.model(), arrays, x), expected, atol=2e-5)
    for_cpus = apply(spec.model(kernels=cpu_kernels(1)), arrays, x)
    np.testing.assert_allclose(for_cpus, expected, atol=2e-5)


def test_in_a_loop_they_are_the_same():
    spec = vit_spec(**ALL)
    arrays = reference.make_params(spec.shapes(), seed=4)
    x, model = images(spec), spec.model(loop=BlockLoop(scan=True, remat="full"))
    stacked = stack_blocks(checkpoints.to_tree(arrays))
    found = model.apply({"params": stacked}, x)
    np.testing.assert_allclose(found, forward(spec, arrays, x), atol=1e-4)


def test_new_weights_have_the_initial_scales():
    spec = vit_spec(**ALL)
    params = spec.model().init(jax.random.key(0), images(spec))["params"]
    for name in ("LayerScale_0", "LayerScale_1"):
        np.testing.assert_array_equal(
            params["Transformer"]["encoderblock_1"][name]["scale"], np.full(16, 0.1, np.float32)
        )
    assert params["registers"].shape == (1, 3, 16)
    assert "bias" not in params["Transformer"]["encoderblock_0"][
        "MultiHeadDotProductAttention_0"
    ]["query"]  # fmt: skip


def make(spec) -> Pretrained:
    params = checkpoints.to_tree(reference.make_params(spec.shapes(), seed=4))
    return Pretrained(spec.model(), params, spec, None, "resize(16)|value_range(-1, 1)")


@pytest.mark.parametrize("case", CASES)
def test_saved_weights_come_back_with_what_no_array_tells(case, tmp_path):
    vit = make(vit_spec(**CASES[case]))
    vit.save(tmp_path / "w.npz")
    found = load(tmp_path / "w.npz")
    assert (found.spec, found.model) == (vit.spec, vit.model)
    assert found.spec.name is None


def test_notes_of_the_original_networks_are_as_before(tmp_path):
    make(vit_spec(num_registers=2)).save(tmp_path / "w.npz")
    assert "untold" not in (tmp_path / "w.json").read_text()


def test_notes_of_a_field_that_the_network_has_not_are_refused(tmp_path):
    make(vit_spec(activation="gelu_erf")).save(tmp_path / "w.npz")
    notes = (tmp_path / "w.json").read_text()
    (tmp_path / "w.json").write_text(notes.replace('"activation"', '"mlp_dim"'))
    with pytest.raises(UserError, match=r"w\.npz: mlp_dim is given or noted beside it, but a ViT"):
        load(tmp_path / "w.npz")
    (tmp_path / "w.json").write_text(notes.replace('"gelu_erf"', '"relu"'))
    with pytest.raises(UserError, match="unknown activation 'relu', expected one of gelu_tanh"):
        load(tmp_path / "w.npz")


def test_registers_have_no_place_and_stay_when_the_grid_changes(tmp_path):
    vit = make(vit_spec(num_registers=3))
    vit.save(tmp_path / "w.npz")
    found = load(tmp_path / "w.npz", image_size=(24, 20))
    assert (found.spec.grid_size, found.spec.num_tokens) == ((6, 5), 34)
    before = vit.params["Transformer"]["posembed_input"]["pos_embedding"]
    after = found.params["Transformer"]["posembed_input"]["pos_embedding"]
    np.testing.assert_array_equal(after, resample(before, (4, 4), (6, 5), prefix=1))
    np.testing.assert_array_equal(found.params["registers"], vit.params["registers"])


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_registers_are_no_patches_on_a_map(classifier):
    vit = make(vit_spec(num_registers=3, classifier=classifier))
    x = images(vit.spec)
    assert explain.attention_maps(vit, x).shape[-2:] == (vit.spec.num_tokens,) * 2
    assert explain.rollout(vit, x).shape == (2, 4, 4)
    assert explain.relevance(vit, x, [0]).shape == (2, 1, 4, 4)
    assert explain.position_similarity(vit).shape == (4, 4, 4, 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation", "relu", "unknown activation 'relu', expected one of gelu_tanh, gelu_erf"),
        ("position_resize", "near", "unknown position_resize 'near', expected one of official"),
        ("num_registers", -1, "num_registers is -1, expected at least 0"),
        ("layer_norm_epsilon", 0.0, "layer_norm_epsilon is 0.0, expected a small number over 0"),
    ],
)
def test_values_that_make_no_network_are_refused(field, value, message):
    spec = vit_spec(**{field: value})
    with pytest.raises(UserError, match=message):
        spec.shapes()


def test_what_is_not_as_in_the_original_is_told():
    assert "unlike the original" not in vit_spec().summary()
    computes = "gelu_tanh, LayerNorm's epsilon 1e-06, positions of other sizes by official"
    assert vit_spec().summary()["computes"] == computes
    lines = vit_spec(**ALL).summary()
    assert lines["registers"] == "3"
    assert lines["unlike the original"] == (
        "activation gelu_erf, layer_norm_epsilon 0.1, qkv_bias False, layer_scale 0.1"
    )


def test_stochastic_depth_is_the_same_in_all_blocks_or_grows():
    spec = vit_spec(num_layers=1, stochastic_depth_rate=0.9)
    arrays, x = reference.make_params(spec.shapes(), seed=4), images(spec, 8)
    still = apply(spec.model(), arrays, x)
    for mode, same in (("linear", True), ("constant", False)):
        model = spec.model(drop_path_mode=mode)
        tree = {"params": checkpoints.to_tree(arrays)}
        found = model.apply(tree, x, train=True, rngs={"dropout": jax.random.key(0)})
        assert np.allclose(found, still, atol=1e-5) == same


@pytest.mark.parametrize(
    "fields",
    [
        dict(distilled="heads"),
        dict(mlp="swiglu", layer_scale=0.1, classifier="token_gap", num_registers=2),
        *(
            pytest.param(fields, marks=[pytest.mark.slow, pytest.mark.ci])
            for fields in (
                dict(distilled="token", cls_has_position=False),
                dict(classifier="gap", fc_norm=True, unread_class_token=True),
            )
        ),
    ],
)
def test_fields_of_other_libraries_train_are_explained_and_come_back(fields, tmp_path):
    vit = make(vit_spec(**fields))
    vit.save(tmp_path / "w.npz")
    found = load(tmp_path / "w.npz", image_size=(24, 20))
    assert load(tmp_path / "w.npz").spec == vit.spec
    x = images(found.spec)
    assert found(x).shape == (2, 5)
    assert explain.rollout(found, x).shape == (2, 6, 5)
    maps = explain.relevance(found, x, [0])
    assert maps.shape == (2, 1, 6, 5)
    assert np.isfinite(maps).all()
    assert load(tmp_path / "w.npz", num_classes=3)(images(vit.spec)).shape == (2, 3)
