"""Hybrids, attention pooling, fixed positions and Mixer are trained as a ViT is."""

import jax
import numpy as np
import pytest

from tests.training.conftest import TINY
from vit_jax.errors import UserError
from vit_jax.models import MlpMixer, SwinTransformer, T2TViT, VisionTransformer
from vit_jax.pretrained import load
from vit_jax.training import run
from vit_jax.training.options import load_config, override


def config_of(*fields: str):
    """The configuration of a run of two steps on digits."""
    config = load_config(str(TINY))
    for field in ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim"):
        del config.model[field]
    config.model.dropout_rate = 0.0
    config.total_steps, config.warmup_steps = 2, 0
    if any(field.startswith("model_or_filename=") for field in fields):
        config.model.name = ""  # The file says what it is.
    return override(config, [f"--config.{field}" for field in fields])


_SIZES = ("model.hidden_size=16", "model.num_layers=1")
_HEADS = (*_SIZES, "model.num_heads=2", "model.mlp_dim=16")
FROM_SCRATCH = {
    "hybrid": ("model.name=R26+ViT-S_32", "model.resnet=(1,)", "model.patch_size=(2,2)", *_HEADS),
    "root": ("model.name=R+ViT-Ti_16", "model.patch_size=(1,1)", *_HEADS),
    "MAP": ("model.name=ViT-mu_16", "model.patch_size=(4,4)"),
    "sincos2d": (
        *("model.name=ViT-Ti_16", "model.patch_size=(4,4)", *_HEADS),
        "model.position_embedding=sincos2d",
    ),
    "Mixer": (
        *("model.name=Mixer-B_16", "model.patch_size=(4,4)", *_SIZES, "model.tokens_mlp_dim=4"),
        *("model.channels_mlp_dim=24", "model.stochastic_depth_rate=0.1"),
    ),
    "T2T": ("model.name=T2T-ViT-7", *_HEADS),
    "Swin": (
        *("model.name=Swin-T_4-w7", "model.patch_size=(1,1)", "model.hidden_size=8"),
        *("model.depths=(1,2)", "model.heads=(2,2)", "model.pretrained_windows=(0,0)"),
        *("model.window=2", "model.stochastic_depth_rate=0.1"),
    ),
    "Swin v2": (
        *("model.name=SwinV2-T_4-w8", "model.patch_size=(1,1)", "model.hidden_size=8"),
        *("model.depths=(1,2)", "model.heads=(2,2)", "model.pretrained_windows=(0,0)"),
        "model.window=3",
    ),
}


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("family", FROM_SCRATCH)
def test_any_family_is_trained_from_scratch_and_then_from_its_file(family, tmp_path):
    fields = FROM_SCRATCH[family]

    assert run(config_of(*fields), tmp_path / "a").finished
    weights = tmp_path / "a" / "weights.npz"
    assert run(config_of(f"model_or_filename={weights}"), tmp_path / "b").finished

    first, second = load(tmp_path / "a"), load(tmp_path / "b")
    assert first.spec == second.spec
    families = {"Mixer": MlpMixer, "T2T": T2TViT}
    families |= dict.fromkeys(("Swin", "Swin v2"), SwinTransformer)
    assert type(first.model) is families.get(family, VisionTransformer)
    assert first.labels == tuple("0123456789")
    assert np.any(second.params["head"]["kernel"])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.params, second.params)
    assert np.mean(jax.tree.leaves(changed)) > 0.8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(second.params))


@pytest.mark.slow
@pytest.mark.ci
def test_a_t2t_vit_learns_the_digits_in_half_the_steps(tmp_path):
    """Of 32 pixels, as wide and deep as the ViT of configs/digits.py, which gets 97 % in 1,000."""
    config = load_config("digits")
    del config.model["patch_size"]
    config.model.name = "T2T-ViT-7"
    config.pp.train = config.pp.eval = "resize(32)|value_range(-1, 1)"
    config.total_steps, config.eval_every, config.checkpoint_every = 500, 0, 0

    result = run(config, tmp_path / "run")

    assert result.test["test/top1"] >= 0.96


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("Mixer", ["model.num_heads=3"], r"num_heads is 3, but the weights .* no such field"),
        ("Mixer", ["model.tokens_mlp_dim=9"], r"mlp_dim is 9, but the weights in .* have 12"),
        ("Mixer", ["model.dropout_rate=0.1"], "has no dropout_rate: leave it out"),
        ("Mixer", ["pp.eval=resize(16)"], "can't take 16x16: the number of tokens of a Mixer"),
        ("hybrid", ["model.resnet=(2,)"], r"resnet is \(2,\), but the weights in .* have \(1, 1\)"),
    ],
)
def test_weights_that_do_not_fit_a_run_are_refused(family, fields, message, saved, tmp_path):
    path = saved(family, channels=1, image_size=(8, 8))
    fields += [f"pp.train={field[8:]}" for field in fields if field.startswith("pp.eval=")]

    with pytest.raises(UserError, match=message):
        run(config_of(f"model_or_filename={path}", *fields), tmp_path / "run")


def test_weights_of_another_model_than_the_named_one_are_refused(saved, tmp_path):
    path = saved("hybrid", channels=1, image_size=(8, 8))
    with pytest.raises(UserError, match=r"name is ViT-S_16, but the weights .* are a ViT of width"):
        run(config_of(f"model_or_filename={path}", "model.name=ViT-S_16"), tmp_path / "run")


def test_a_run_that_names_neither_model_nor_weights_has_nothing_to_start_from(tmp_path):
    with pytest.raises(UserError, match="nothing to start from: give --weights"):
        run(config_of("model.name="), tmp_path / "run")


def test_a_lit_bundle_is_not_trained(saved, tmp_path):
    with pytest.raises(UserError, match="a LiT bundle, which has no classes"):
        run(config_of(f"model_or_filename={saved('LiT')}"), tmp_path / "run")


def test_fields_that_a_model_does_not_have_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown field 'dropout_rate' of model Mixer-B_16"):
        run(config_of("model.name=Mixer-B_16", "model.dropout_rate=0.1"), tmp_path)
    with pytest.raises(UserError, match="classifier 'unpooled' gives no classes: use token, gap"):
        run(config_of("model.name=ViT-mu_16", "model.classifier=unpooled"), tmp_path)
    with pytest.raises(UserError, match=r"resnet is \(2, 0\), expected the number of units"):
        run(config_of("model.name=R26+ViT-S_32", "model.resnet=(2,0)"), tmp_path)


_SWIN = (
    *("model.name=Swin-T_4-w7", "model.patch_size=(4,4)", "model.hidden_size=32", "model.window=4"),
    *("model.depths=(2,2)", "model.heads=(2,4)", "model.pretrained_windows=(0,0)"),
    *("pp.train=resize(32)|value_range(-1, 1)", "pp.eval=resize(32)|value_range(-1, 1)"),
    *("batch=64", "optim=adamw", "optim_dtype=float32", "base_lr=2e-3", "weight_decay=0.5"),
)


@pytest.mark.slow
@pytest.mark.ci
def test_a_swin_transformer_learns_digits_of_32_pixels(tmp_path):
    result = run(config_of(*_SWIN, "total_steps=400", "warmup_steps=50"), tmp_path / "run")
    assert result.test["test/top1"] > 0.85


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("version", [1, 2])
def test_stages_in_loops_and_in_parts_learn_the_same(version, tmp_path):
    """Their blocks, of which every second is shifted, in a loop, and each weight in parts."""
    fields = (*_SWIN, f"model.version={version}", "total_steps=4", "warmup_steps=0", "batch=16")
    loops = ("scan_layers=True", "sharding=fsdp", "remat=full")
    for name, more in (("plain", ()), ("loops", loops)):
        assert run(config_of(*fields, *more), tmp_path / name).finished
    plain, loops = load(tmp_path / "plain"), load(tmp_path / "loops")
    assert plain.spec == loops.spec
    assert plain.spec.version == version
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        plain.params,
        loops.params,
    )


def test_the_windows_of_weights_may_be_changed_for_a_run(saved, tmp_path):
    path = saved("Swin", channels=1, image_size=(8, 8))
    sizes = [f"pp.{split}=resize(16)|value_range(-1, 1)" for split in ("train", "eval")]
    assert run(
        config_of(f"model_or_filename={path}", "model.window=4", *sizes), tmp_path / "run"
    ).finished
    assert load(tmp_path / "run").spec.window == 4
