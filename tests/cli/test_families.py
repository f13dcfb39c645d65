"""The commands that look at weights know every family."""

import json

import numpy as np
import pytest

from tests.cli.conftest import write_images
from tests.families import SPECS, make
from vit_jax.checkpoints.formats import LazyArray
from vit_jax.cli import main
from vit_jax.evaluation import classify
from vit_jax.pretrained import load


@pytest.mark.parametrize(
    ("family", "texts"),
    [
        (
            "hybrid",
            ["a ViT of width 16 and 2 blocks", "a root and stages of 1, 1 units", "8x8 pix"],
        ),
        ("root", ["a root and stages of no units", "8x8 pixels, 8x8 of them, 64 tokens"]),
        ("MAP", ["classifier     map", "pre_logits     tanh, 9 wide"]),
        ("sincos2d", ["positions      sincos2d"]),
        ("Mixer", ["a Mixer of width 16", "MLPs 12 wide over tokens and 24 over channels"]),
        ("T2T", ["a T2T-ViT of width 16", "three soft splits, with a performer behind the first"]),
        ("Swin", ["a Swin Transformer of width 8 and 4", "stages of 2, 2, from 8 to 16 wide"]),
        ("Swin v2", ["windows        3x3 tokens, or the map if", "version        2"]),
        ("LiT", ["a LiT bundle of a ViT", "text_transformer: 2 blocks, 64 wide", "embeddings"]),
        ("LiT of BERT", ["bert: 2 blocks, 64 wide, 1 heads, 14 words", "embeddings     64 wide"]),
    ],
)
def test_info_says_what_a_file_of_any_family_is(family, texts, saved, capsys):
    path = saved(family)

    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)

    assert [expected for expected in texts if expected not in text] == []
    assert f"{SPECS[family].num_parameters:,}" in text
    assert facts["parameters"] == SPECS[family].num_parameters
    assert facts["architecture"] is None


def test_info_reads_each_array_once(saved, capsys, monkeypatch):
    path, read = saved("MAP"), []
    as_array = LazyArray.__array__
    monkeypatch.setattr(LazyArray, "__array__", lambda x, *a, **k: read.append(x) or as_array(x))

    assert main(["info", str(path)]) == 0
    assert len(set(map(id, read))) == len(read) == len(SPECS["MAP"].shapes())


def test_info_of_a_tower_is_about_the_tower(saved, capsys):
    path = saved("LiT")

    assert main(["info", f"{path}:img", "--json"]) == 0

    facts = json.loads(capsys.readouterr().out)
    shapes = SPECS["LiT"].image_tower().shapes()
    assert (facts["arrays"], facts["key_style"]) == (len(shapes), "towers")
    assert facts["num_layers"] == 2


def test_predict_ranks_descriptions_by_a_lit_bundle(saved, tmp_path, capsys):
    path = saved("LiT")
    photos = write_images(tmp_path / "photos", 2)
    files = [str(photos / "dark" / "0.jpg"), str(photos / "bright" / "1.jpg")]
    labels = ["a cat", "a doggy", "grey"]

    assert main(["predict", str(path), *files, "--json", "--top=2", "--labels", *labels]) == 0

    rows = json.loads(capsys.readouterr().out)
    expected = classify(load(path), files, labels, top=2)
    assert [row["picture"] for row in rows] == files
    for row, answer in zip(rows, expected, strict=True):
        found = [(c["label"], c["probability"]) for c in row["classes"]]
        assert found == [(label, pytest.approx(p)) for label, p in answer]


def test_predict_says_which_weights_take_labels(saved, tmp_path, capsys):
    image = str(write_images(tmp_path / "photos", 1) / "dark" / "0.jpg")
    lit, mixer = saved("LiT"), tmp_path / "mixer.npz"
    make("Mixer", tmp_path).save(mixer)

    assert main(["predict", str(mixer), image]) == 0
    assert main(["predict", str(mixer), image, "--labels", "cat"]) == 2
    assert main(["predict", str(lit), image]) == 2

    first, second = capsys.readouterr().err.strip().split("\n")
    assert "--labels is for LiT weights, these have classes of their own" in first
    assert "classifies by words: give labels" in second
    assert "vit-jax predict --labels" in second


def test_images_may_stand_behind_the_labels(saved, tmp_path, capsys, monkeypatch):
    path = saved("LiT")
    image = write_images(tmp_path / "photos", 1) / "dark" / "0.jpg"
    monkeypatch.chdir(image.parent)

    assert main(["predict", str(path), "0.jpg", "--labels", "a cat", "a dog"]) == 0
    first = capsys.readouterr().out
    assert main(["predict", str(path), "--labels", "a cat", "a dog", "0.jpg"]) == 0
    assert capsys.readouterr().out == first
    assert main(["predict", str(path), "--labels", "a cat", "--top=5", "0.jpg"]) == 0
    assert "a cat" in capsys.readouterr().out
    for wrong in (["--labels", "a cat", "none.jpg"], ["--labels", "0.jpg"], []):
        assert main(["predict", str(path), *wrong]) == 2
        assert "no image was named" in capsys.readouterr().err


def test_evaluate_compares_a_lit_bundle_with_the_names_of_the_folders(saved, tmp_path, capsys):
    path = saved("LiT")
    photos = write_images(tmp_path / "photos", 4)
    table = tmp_path / "p.csv"
    command = ["evaluate", str(path), str(photos), "--split=train+test", f"--csv={table}"]

    assert main([*command, "--json", "--batch=3"]) == 0

    scores = json.loads(capsys.readouterr().out)
    vit, names = load(path), ["a photo of a bright.", "a photo of a dark."]
    files = [[photos / kind / f"{i}.jpg" for i in range(4)] for kind in ("bright", "dark")]
    right = [
        [answer[0][0] == name for answer in classify(vit, group, names)]
        for group, name in zip(files, names, strict=True)
    ]
    assert (scores["count"], scores["top1"]) == (8, np.mean(right))
    assert scores["per_class"] == [
        {"label": label, "accuracy": np.mean(group), "count": 4}
        for label, group in zip(("bright", "dark"), right, strict=True)
    ]
    assert table.read_text().count("bright") >= 4


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("family", ["hybrid", "Mixer"])
def test_evaluate_knows_every_family(family, saved, tmp_path, capsys):
    path = saved(family, num_classes=2)
    photos = write_images(tmp_path / "photos", 4)

    assert main(["evaluate", str(path), str(photos), "--split=train+test", "--json"]) == 0

    vit = load(path)
    files = [[photos / kind / f"{i}.jpg" for i in range(4)] for kind in ("bright", "dark")]
    right = [a[0][0] == str(i) for i, group in enumerate(files) for a in vit.predict(group, top=1)]
    assert json.loads(capsys.readouterr().out)["top1"] == np.mean(right)
