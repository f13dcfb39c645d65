"""What timm and transformers wrote beside weights is what is done to images, here and later."""

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from tests.test_pretrained import make
from vit_jax import data, load, training
from vit_jax.checkpoints.export import export
from vit_jax.checkpoints.huggingface import licence
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.training.config import check_config, eval_spec, train_spec

VALUES = "normalize((0.4, 0.5, 0.6), (0.2, 0.2, 0.3))"
CONFIG = {
    "tag": "augreg_in21k_ft_in1k",
    "license": "apache-2.0",
    "crop_pct": 0.8,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
}
TEXT = f"resize_small(20, method='pil_bicubic')|central_crop(16, round_even=True)|{VALUES}"


def written(folder, library: str):
    vit = make(labels=None)
    export(folder, library, flatten_dict(vit.params, sep="/"), vit.spec, preprocess=vit.preprocess)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder as timm leaves it."""
    path = written(tmp_path / "theirs", "timm") / "config.json"
    config = json.loads(path.read_text()) | {"architecture": "vit_tiny_patch16_224"}
    config["pretrained_cfg"] |= CONFIG
    path.write_text(json.dumps(config))
    return tmp_path / "theirs"


def test_a_folder_is_loaded_with_its_preprocessing(folder):
    vit = load(folder)

    assert vit.preprocess == TEXT
    image = np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8)
    small = Image.fromarray(image).resize((32, 20), Image.Resampling.BICUBIC)
    pixels = np.asarray(small)[2:18, 8:24] / 255
    expected = vit(((pixels - [0.4, 0.5, 0.6]) / [0.2, 0.2, 0.3]).astype(np.float32)[None])
    answer = dict(vit.predict([image], top=3)[0])
    probabilities = np.exp(expected[0]) / np.exp(expected[0]).sum()
    for label, probability in answer.items():
        assert probability == pytest.approx(probabilities[int(label)], rel=1e-4)


def test_another_size_and_a_saved_file_keep_it(folder, tmp_path):
    larger = f"resize_small(40, method='pil_bicubic')|central_crop(32, round_even=True)|{VALUES}"
    assert load(folder, image_size=32).preprocess == larger

    load(folder, num_classes=2).save(tmp_path / "mine.npz")

    assert load(tmp_path / "mine.npz").preprocess == TEXT
    assert load(tmp_path / "mine.npz", image_size=32).preprocess == larger


def config_for(folder, **pp):
    config = training.default_config()
    config.model_or_filename = str(folder)
    config.pp.crop = 32
    config.pp.update(pp)
    return check_config(config)


def test_fine_tuning_takes_method_and_values_and_evaluates_alike(folder):
    config = config_for(folder)

    crop = "inception_crop(32, method='pil_bicubic')"
    assert train_spec(config) == f"{crop}|flip|{VALUES}"
    assert eval_spec(config) == load(folder, image_size=32).preprocess
    assert data.parse(train_spec(config)).range == data.parse(eval_spec(config)).range
    config.pp.resize = 36
    resized = f"resize_small(36, method='pil_bicubic')|central_crop(32)|{VALUES}"
    assert eval_spec(config) == resized
    own = config_for(folder, train="flip|value_range(0, 1)", eval="value_range(0, 1)")
    assert (train_spec(own), eval_spec(own)) == ("flip|value_range(0, 1)", "value_range(0, 1)")


def test_without_anything_recorded_fine_tuning_is_the_original_s(tmp_path):
    make().save(tmp_path / "plain.npz")
    (tmp_path / "plain.json").unlink()
    config = config_for(tmp_path / "plain.npz")

    assert train_spec(config) == "inception_crop(32)|flip|value_range(-1, 1)"
    assert eval_spec(config) == "resize(32)|value_range(-1, 1)"


def test_info_tells_what_stands_beside_the_weights(folder, capsys):
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = dict(line.split(None, 1) for line in lines)

    assert text["licence"] == "apache-2.0"
    assert text["preprocessing"] == TEXT
    assert any("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k, augreg/Ti_16-" in s for s in lines)
    assert any("stored as      .safetensors, float32" in s for s in lines)
    main(["info", str(folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["origin"], facts["licence"]) == (
        ".safetensors",
        None,
        "apache-2.0",
    )


def test_transformers_card_and_preprocessor(tmp_path):
    folder = written(tmp_path / "theirs", "hf")
    asked = {"size": 16, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(asked))
    (folder / "README.md").write_text("---\ntags:\n- x\nlicense: cc-by-4.0\n---\nlicense: mit\n")

    assert load(folder).preprocess == "resize(16, method='pil_bilinear')|value_range(-1, 1)"
    assert licence(folder / "model.safetensors") == "cc-by-4.0"


def test_damaged_files_beside_weights_are_named(folder):
    for text in ("{", "[]", '{"architecture": "x", "pretrained_cfg": {"crop_mode": "border"}}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=str(folder)):
            load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no workdir .* and no folder of timm or transformers"):
        load(folder)
