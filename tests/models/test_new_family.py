"""A family is a file: this one makes a network known that the package has never heard of, and all
of the package works with it."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import block_diag

import vit_jax
from tests.training.conftest import TINY
from vit_jax import explain, training
from vit_jax.errors import UserError
from vit_jax.models import ImageModel, Kernels, Spec, layers, register, unregister
from vit_jax.models import shapes as reading
from vit_jax.models.stack import BlockLoop, run_blocks
from vit_jax.training.options import load_config, override
from vit_jax.training.plan import plan


class WindowBlock(nn.Module):
    """Attention within windows of so many tokens, and an MLP. (n, t, d) -> (n, t, d)."""

    window: int
    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    layer_norm_epsilon: ClassVar = 1e-6

    @nn.compact
    def __call__(self, x, *, deterministic, drop_path_rate=0.0):
        place = self.param("place", nn.initializers.normal(0.02), (self.window, x.shape[-1]))
        y = layers.layer_norm(self, "LayerNorm_0")(x)
        y = y.reshape(-1, self.window, x.shape[-1]) + place.astype(x.dtype)
        attention = layers.MultiHeadAttention(
            **layers.fields_for(layers.MultiHeadAttention, self), name=layers.ATTENTION_NAME
        )
        x = x + attention(y, y).reshape(x.shape)
        y = layers.layer_norm(self, "LayerNorm_1")(x)
        return x + layers.Mlp(**layers.fields_for(layers.Mlp, self))(y)


class WindowViT(ImageModel):
    """Tokens attend within their window; positions are those in a window."""

    num_classes: int | None
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    window: int
    head_bias_init: float = 0.0
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    kind: ClassVar = "windowed ViT"
    variants: ClassVar = {
        "Window-mu_2": dict(
            patch_size=(2, 2), hidden_size=32, num_layers=3, num_heads=2, mlp_dim=64, window=4
        )
    }
    blocks: ClassVar = ("windowblock",)
    weightless: ClassVar = ("dtype",)
    shows_attention: ClassVar = True
    classifier: ClassVar = "gap"
    representation_size: ClassVar = None
    layer_norm_epsilon: ClassVar = 1e-6

    @nn.compact
    def __call__(self, images, *, train=False, return_features=False):
        layers.check_images(images)
        x = nn.Conv(self.hidden_size, self.patch_size, self.patch_size, name="tiles")(images)
        x, features = run_blocks(
            WindowBlock,
            layers.fields_for(WindowBlock, self),
            x.reshape(len(x), -1, self.hidden_size),
            name="windowblock",
            depth=self.num_layers,
            drop_path_rate=0.0,
            loop=self.loop,
            deterministic=not train,
        )
        x = features["encoder_norm"] = layers.layer_norm(self, "encoder_norm")(x)
        logits = layers.head(self, x.mean(axis=1))
        return (logits, features) if return_features else logits

    @property
    def stride(self):
        return self.patch_size

    def grid_size(self, image_size):
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]

    @classmethod
    def recognizes(cls, shapes):
        return "tiles/kernel" in shapes

    @classmethod
    def from_shapes(cls, shapes, hints):
        blocks = reading.Blocks(shapes, "windowblock_")
        heads = blocks.majority("query/kernel", 3, 1)
        mlp_dim = blocks.majority("Mlp_0/Dense_0/kernel", 2, 1)
        window = blocks.majority("place", 2, 0)
        required = {"tiles/kernel": 4}
        reading.check_required(shapes, required, blocks, (heads, mlp_dim, window), hints.where)
        *patch, channels, width = shapes["tiles/kernel"]
        classes = reading.num_outputs(shapes, "head")
        model = cls(classes, tuple(patch), width, blocks.depth, heads, mlp_dim, window)
        return Spec(model, hints.image_size or (8, 8), channels)

    def resize(self, arrays, old, new):
        if self.num_tokens(new) % self.window:
            raise UserError(f"{self.num_tokens(new)} tokens fill no windows of {self.window}")
        return arrays

    def attention_weights(self, collection):
        blocks = (collection[f"windowblock_{i}"] for i in range(self.num_layers))
        windows = [layers.shown_weights(block).swapaxes(0, 1) for block in blocks]
        return jnp.stack([jax.vmap(lambda w: block_diag(*w))(w) for w in windows]), None


@pytest.fixture(scope="module", autouse=True)
def family():
    register(WindowViT)
    yield
    unregister(WindowViT)
    assert "Window-mu_2" not in vit_jax.list_models()


def config_of(*fields: str):
    config = load_config(str(TINY))
    for field in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim"):
        del config.model[field]
    fields = ("model.name=Window-mu_2", "model.dropout_rate=0", "accum_steps=1", *fields)
    return override(config, [f"--config.{field}" for field in fields])


@pytest.fixture(scope="module")
def workdir(family, tmp_path_factory):
    """Of a run of a few steps on digits."""
    workdir = tmp_path_factory.mktemp("windows") / "run"
    assert training.run(config_of("total_steps=6", "model.window=8"), workdir).finished
    return workdir


def test_it_is_listed_and_made_by_name():
    assert vit_jax.list_models()[-1] == "Window-mu_2"
    model = vit_jax.create_model("Window-mu_2", 7, window=2)
    assert (type(model), model.window, model.num_classes) == (WindowViT, 2, 7)
    with pytest.raises(UserError, match="did you mean Window-mu_2"):
        vit_jax.create_model("Windo-mu_2")
    with pytest.raises(UserError, match=r"unknown field 'windows' .*did you mean window"):
        vit_jax.create_model("Window-mu_2", windows=3)


def test_what_was_trained_is_loaded_as_what_it_is(workdir):
    vit = vit_jax.load(workdir)

    assert (type(vit.model), vit.spec.window, vit.spec.name) == (WindowViT, 8, None)
    assert vit.spec.replace(window=4).name == "Window-mu_2"
    assert vit.spec.summary()["patches"] == "2x2 pixels, 4x4 of them, 16 tokens in all"
    assert vit.predict([np.zeros((8, 8, 1), np.uint8)])[0][0][0] in "0123456789"


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_it_is_saved_and_loaded(workdir, ending, tmp_path):
    vit = vit_jax.load(workdir)
    vit.save(tmp_path / f"w{ending}")
    found = vit_jax.load(tmp_path / f"w{ending}")
    assert (found.spec, found.model, found.labels) == (vit.spec, vit.model, vit.labels)
    jax.tree.map(np.testing.assert_array_equal, found.params, vit.params)


def test_a_file_of_it_that_lacks_an_array_is_refused_by_name(workdir, tmp_path):
    arrays = dict(np.load(workdir / "weights.npz"))
    del arrays["windowblock_1/place"]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(UserError, match=r"a windowed ViT of .*missing \(1\): windowblock_1/place"):
        vit_jax.load(tmp_path / "w.npz")


def test_it_takes_another_size_and_another_head(workdir):
    found = vit_jax.load(workdir, image_size=16, num_classes=3)
    assert (found.spec.num_tokens, found.image_size) == (64, (16, 16))
    assert found(np.zeros((2, 16, 16, 1), np.float32)).shape == (2, 3)
    with pytest.raises(UserError, match="25 tokens fill no windows of 8"):
        vit_jax.load(workdir, image_size=10)
    with pytest.raises(UserError, match="has no dropout_rate: leave it out"):
        vit_jax.load(workdir, dropout_rate=0.5)


def test_it_is_explained(workdir):
    vit, image = vit_jax.load(workdir), np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    maps = explain.attention_maps(vit, [image])
    assert maps.shape == (1, 3, 2, 16, 16)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=1e-5)
    assert not maps[..., :8, 8:].any()
    np.testing.assert_allclose(explain.rollout(vit, [image]).sum(), 1, rtol=1e-5)
    assert explain.relevance(vit, [image], [3]).max() > 0
    with pytest.raises(UserError, match="a windowed ViT has no position embeddings to look at"):
        explain.position_similarity(vit)


@pytest.mark.slow
@pytest.mark.ci
def test_it_is_planned():
    planned = plan(config_of(), classes=10, memory=1e9)
    model = vit_jax.create_model("Window-mu_2", 10)
    assert planned["parameters"] == Spec(model, (8, 8), 1).num_parameters
    assert planned["flops_per_step"] > 0
    assert planned["fits"]


@pytest.mark.slow
@pytest.mark.ci
def test_stacked_and_sharded_it_learns_the_same(workdir, tmp_path):
    """Its blocks in a loop, and each weight in parts over the devices."""
    fields = ("total_steps=6", "model.window=8", "scan_layers=True", "sharding=fsdp", "remat=full")
    assert training.run(config_of(*fields), tmp_path / "run").finished
    found, expected = vit_jax.load(tmp_path / "run"), vit_jax.load(workdir)
    assert found.spec == expected.spec
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
        found.params,
        expected.params,
    )


@pytest.mark.slow
@pytest.mark.ci
def test_it_is_trained_further_from_its_file_which_has_to_fit(workdir, tmp_path):
    weights = f"model_or_filename={workdir / 'weights.npz'}"
    assert training.run(config_of("total_steps=2", "warmup_steps=0", "model.name=", weights),
                        tmp_path / "run").finished  # fmt: skip
    with pytest.raises(UserError, match=r"window is 4, but .* keeps that of its weights, 8"):
        training.run(config_of(weights, "model.name=", "model.window=4"), tmp_path / "other")
