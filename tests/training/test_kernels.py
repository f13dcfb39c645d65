"""The kernels of a run and of loaded weights: chosen from the devices, told, or refused."""

import jax
import numpy as np
import pytest

from tests import families
from vit_jax.errors import UserError
from vit_jax.models import kernels
from vit_jax.models.kernels import SlicedAttention
from vit_jax.training import run


def test_what_can_not_be_is_refused_before_anything_is_trained(tiny, tmp_path):
    with pytest.raises(UserError, match=r"config\.attention is cudnn, but JAX sees no GPU here"):
        run(tiny("attention=cudnn", "dtype=bfloat16"), tmp_path / "run")

    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_by_cudnn_says_so_and_pads_what_a_class_token_makes_odd(
    tiny, monkeypatch, tmp_path, capfd, no_image
):
    """As on a GPU, with XLA's attention where cuDNN's would be."""
    real, tokens = jax.nn.dot_product_attention, set()

    def attention(*rows, implementation, key_value_seq_lengths):
        assert implementation == "cudnn"
        tokens.add(rows[0].shape[1])
        return real(*rows, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(kernels, "platform_of", lambda devices: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    config = tiny("dtype=bfloat16", "total_steps=4", "attention=cudnn")

    assert run(config, tmp_path / "run").finished
    assert "attention by cudnn (5 tokens padded to 8)" in capfd.readouterr().err
    assert tokens == {8}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_loaded_weights_answer_by_the_kernels_of_their_device(monkeypatch, platform, tmp_path):
    vit = families.make("MAP", tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    real, used = SlicedAttention.__call__, []
    monkeypatch.setattr(SlicedAttention, "__call__", lambda *args: used.append(args) or real(*args))
    monkeypatch.setattr(kernels, "platform_of", lambda devices: platform)

    answers = vit(images)

    assert bool(used) == (platform == "cpu")
    expected = vit.model.apply({"params": vit.params}, images)
    np.testing.assert_allclose(answers, expected, atol=2e-5)
