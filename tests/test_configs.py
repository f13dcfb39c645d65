"""The configurations that come with the package."""

import json
import statistics
from pathlib import Path

import pytest

from vit_jax import data, list_models
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.training import check_config, make_schedule
from vit_jax.training.config import weights_source
from vit_jax.training.options import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

ARGUMENTS = {
    "digits": "",
    "vit": "b16,cifar10",
    "augreg": "Ti_16",
    "finetune_folder": "digits",
    "t2t": "14",
    "swin": "SwinV2-B_4-w16",
}


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.py")))
def test_every_configuration_loads_and_passes_the_check(name):
    config = load_config(f"{CONFIGS / name}.py:{ARGUMENTS[name]}")
    assert check_config(config).model.name in {*list_models(), ""}


@pytest.mark.parametrize(
    ("arg", "model"),
    [
        ("R_Ti_16", "R+ViT-Ti_16"),
        ("R26_S_32", "R26+ViT-S_32"),
        ("B_16", "ViT-B_16"),
        ("S_16-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0", "ViT-S_16"),
    ],
)
def test_augreg_names_the_model_and_its_published_weights(arg, model):
    config = check_config(load_config(f"configs/augreg.py:{arg}"))
    assert (config.model.name, weights_source(config)) == (model, arg)


def test_what_needs_an_argument_says_so():
    with pytest.raises(UserError, match=r"vit\.py needs MODEL,DATASET, found '': e\.g\. vit\.py:b"):
        load_config("vit")
    with pytest.raises(UserError, match="finetune_folder needs a folder"):
        load_config("finetune_folder")
    with pytest.raises(UserError, match="unknown model 'Ti_17': did you mean ViT-"):
        load_config("augreg:Ti_17")
    with pytest.raises(UserError, match="digits takes no argument, found 'foo'"):
        load_config("digits:foo")


@pytest.mark.parametrize(
    ("arg", "model", "steps", "lr"),
    [
        ("b16,cifar10", "ViT-B_16", 10_000, 0.01),
        ("b32,cifar100", "ViT-B_32", 10_000, 0.03),
        ("l16,imagenet2012", "ViT-L_16", 20_000, 0.03),
        ("ViT-S_16,photos", "ViT-S_16", 500, 0.03),
        ("b32_gap_norep,photos", "ViT-B_32-gap-norep", 500, 0.03),
    ],
)
def test_vit_is_the_published_recipe(arg, model, steps, lr):
    config = check_config(load_config(f"vit:{arg}"))
    assert (config.model.name, config.total_steps, config.base_lr) == (model, steps, lr)
    assert (config.batch, config.accum_steps, config.pp.crop) == (512, 8, 384)
    assert (config.optim, config.momentum, config.grad_norm_clip) == ("sgd", 0.9, 1.0)


@pytest.mark.parametrize(
    ("arg", "model", "rates"),
    [
        ("7", "T2T-ViT-7", (1e-3, 0.03)),
        ("T2T-ViT-14", "T2T-ViT-14", (5e-4, 0.05)),
        ("t-24", "T2T-ViT-t-24", (5e-4, 0.065)),
    ],
)
def test_t2t_is_the_published_recipe(arg, model, rates):
    config = check_config(load_config(f"configs/t2t.py:{arg}"))
    assert (config.model.name, config.model.stochastic_depth_rate) == (model, 0.1)
    assert (config.base_lr, config.weight_decay, config.ema_decay) == (*rates, 0.99996)
    assert (config.batch, config.total_steps, config.warmup_steps) == (512, 775_620, 25_020)
    assert (config.mixup, config.cutmix, config.label_smoothing) == (0.8, 1.0, 0.1)
    assert data.parse(config.pp.eval).output_size == (224, 224)


@pytest.mark.parametrize(
    ("name", "rate", "size", "resized"),
    [
        ("Swin-T_4-w7", 0.2, 224, 256),
        ("Swin-S_4-w7", 0.3, 224, 256),
        ("Swin-B_4-w7", 0.5, 224, 256),
        ("SwinV2-T_4-w8", 0.2, 256, 292),
    ],
)
def test_swin_is_the_published_recipe(name, rate, size, resized):
    """Section "Image classification" of arXiv:2103.14030, A2.1."""
    config = check_config(load_config(f"configs/swin.py:{name}"))
    assert (config.model.name, config.model.stochastic_depth_rate) == (name, rate)
    assert (config.optim, config.base_lr, config.weight_decay) == ("adamw", 1e-3, 0.05)
    assert (config.grad_norm_clip, config.label_smoothing) == (5.0, 0.1)
    assert (config.batch, config.mixup, config.cutmix) == (1024, 0.8, 1.0)
    steps = 1_281_167 // 1024
    assert (config.total_steps, config.warmup_steps) == (300 * steps, 20 * steps)
    assert f"inception_crop({size}, 0.08" in config.pp.train
    assert f"resize_small({resized}" in config.pp.eval


@pytest.mark.parametrize("name", ["Swin-L_4-w7", "Swin-B_4-w12", "SwinV2-B_4-w12to24", "ViT-B_16"])
def test_no_recipe_is_made_up_for_a_swin_that_was_trained_otherwise(name):
    with pytest.raises(UserError, match=f"found '{name}': others were trained on ImageNet-21k"):
        load_config(f"configs/swin.py:{name}")


def test_every_t2t_has_settings():
    names = [name for name in list_models() if name.startswith("T2T")]
    for name in names:
        assert load_config(f"configs/t2t.py:{name}").model.name == name
    with pytest.raises(UserError, match=r"t2t\.py needs one of 7, 10, .*, found '15'"):
        load_config("configs/t2t.py:15")


@pytest.mark.parametrize("images", [2, 20, 500, 20_000, 1_000_000])
def test_the_recipe_for_a_folder_grows_with_it(images, monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *args, **kwargs: range(images))
    config = check_config(load_config("finetune_folder:photos"))
    epochs = config.total_steps * config.batch / images
    # Each image is seen several times; a small folder's more often, a huge one's at least eight.
    assert epochs >= 7.9
    assert epochs <= 9 or config.total_steps == 100
    assert config.batch % 8 == 0
    assert 8 <= config.batch <= 512
    assert 0.03 / 8 <= config.base_lr <= 0.03
    # Memory holds what is computed at once, and the last step is tested and saved on the way.
    assert config.batch / config.accum_steps <= 32
    assert 3 <= config.total_steps / config.eval_every <= 6
    assert config.total_steps / config.progress_every >= 10
    schedule = make_schedule(
        config.total_steps, config.base_lr, config.decay_type, config.warmup_steps
    )
    assert float(schedule(config.warmup_steps)) == pytest.approx(config.base_lr)


def test_the_learning_rate_for_a_folder_follows_the_square_root_of_the_batch(monkeypatch):
    rates = {}
    for images in (200, 2_000, 50_000):
        monkeypatch.setattr(data, "open_source", lambda *args, n=images, **kw: range(n))
        config = load_config("finetune_folder:photos")
        rates[config.batch] = config.base_lr
    assert len(rates) == 3
    for batch, rate in rates.items():
        assert rate == pytest.approx(0.03 * (batch / 512) ** 0.5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_the_digits_are_learnt_in_bfloat16_too(tmp_path, capsys):
    """As in float32, of which README.md tells; the median of three seeds."""
    accuracies = []
    for seed in range(3):
        fields = (f"--config.seed={seed}", "--config.dtype=bfloat16", "--json")
        assert main(["train", "--config=digits", f"--workdir={tmp_path / str(seed)}", *fields]) == 0
        accuracies.append(json.loads(capsys.readouterr().out)["test"]["test/top1"])
    assert statistics.median(accuracies) >= 0.97, accuracies
