"""By what a run computes attention: what is refused, what is tried, and what comes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import create_model
from vit_jax.errors import UserError
from vit_jax.training import make_mesh, run
from vit_jax.training.attention import choose_attention

SMALL = dict(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16, patch_size=(4, 4))


def choose(config, name="ViT-Ti_16", dtype=jnp.bfloat16, **fields):
    fields = (SMALL if name == "ViT-Ti_16" else {}) | fields
    model = create_model(name, num_classes=10, dtype=dtype, **fields)
    return choose_attention(config, model, (8, 8), make_mesh(config))


@pytest.fixture
def gpu(monkeypatch):
    """JAX says that there is one; that there is none shows in what it can't run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.fixture
def cudnn(gpu, monkeypatch):
    """What asks for cuDNN gets the same of XLA's; the shapes that were asked for."""
    real, shapes = jax.nn.dot_product_attention, []

    def attention(*rows, implementation):
        assert implementation == "cudnn"
        shapes.append(rows[0].shape)
        return real(*rows, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return shapes


def test_without_a_gpu_nothing_is_tried_or_told(tiny, cudnn, monkeypatch):
    monkeypatch.undo()

    assert choose(tiny()) == ("xla", "")
    assert cudnn == []


def test_what_can_not_be_is_refused_before_anything_is_trained(tiny, tmp_path):
    with pytest.raises(UserError, match=r"config\.attention is cudnn, but JAX sees no GPU"):
        run(tiny("attention=cudnn", "dtype=bfloat16"), tmp_path / "run")

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": jnp.float32}, "cuDNN takes bfloat16, and config.dtype is float32"),
        ({"attention_dropout_rate": 0.1}, "config.model.attention_dropout_rate is 0.1, not 0"),
        ({"name": "Mixer-B_16"}, "this network has no attention"),
        ({}, "cuDNN says: .+"),
    ],
)
def test_on_a_gpu_the_reason_is_told_or_an_error(tiny, gpu, fields, reason):
    chosen, told = choose(tiny(), **fields)

    assert chosen == "xla"
    assert told.startswith("attention by xla: ")
    assert "\n" not in told
    with pytest.raises(UserError, match=f"^config.attention is cudnn, but {reason}: use auto or"):
        choose(tiny("attention=cudnn"), **fields)


def test_it_is_tried_with_the_shape_of_the_run(tiny, cudnn):
    assert choose(tiny()) == ("cudnn", "attention by cudnn")
    # A picture for each device, 2 x 2 patches and the class token, 2 heads.
    assert {*cudnn} == {(jax.device_count(), 5, 2, 8)}


def test_a_network_gives_the_same_by_either_and_shows_the_same_weights(cudnn):
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    model = create_model("ViT-Ti_16", 10, dtype=jnp.bfloat16, head_bias_init=1.0, **SMALL)
    other = model.clone(attention="cudnn")
    variables = other.init(jax.random.key(0), images)

    np.testing.assert_allclose(
        other.apply(variables, images, return_features=True)[1]["encoder_norm"].astype("f4"),
        model.apply(variables, images, return_features=True)[1]["encoder_norm"].astype("f4"),
        atol=0.05,
    )
    assert len(cudnn) == 1  # Not to make the variables, which may be done on the host.
    shown = [m.apply(variables, images, mutable=["intermediates"])[1] for m in (model, other)]
    jax.tree.map(np.testing.assert_array_equal, *shown)
    assert len(cudnn) == 2  # The weights are computed beside the answer.


def test_a_run_by_cudnn_says_so(tiny, cudnn, tmp_path, capfd):
    result = run(tiny("dtype=bfloat16", "total_steps=4"), tmp_path / "run")

    assert result.finished
    assert "attention by cudnn" in capfd.readouterr().err
    assert len(cudnn) > 1
