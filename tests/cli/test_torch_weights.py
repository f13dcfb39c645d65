"""Every command takes weights of timm and transformers, to the end: folders, and files alone, of
which the heads are told."""

import json
import shutil

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests import families, reference
from vit_jax import load
from vit_jax.checkpoints.export import export
from vit_jax.cli import main
from vit_jax.training.options import load_config, override
from vit_jax.training.plan import plan

NORMALIZE = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
PREPROCESS = {
    "timm": f"resize_small(18, method='pil_bicubic')|central_crop(16, round_even=True)|{NORMALIZE}",
    "hf": f"resize_small(18, method='pil_bicubic')|central_crop(16)|{NORMALIZE}",
}
FIELDS = {
    "timm": dict(distilled="heads", num_classes=2, num_layers=1),
    "hf": dict(num_layers=1, layer_scale=0.1, mlp_dim=32, num_classes=None),
}
CROP = "--config.pp.crop=16"
LABELS = ("bright", "dark")


@pytest.fixture(scope="module", params=["timm", "hf"])
def folder(request, tmp_path_factory):
    """A distilled DeiT of timm with two classes, or a DINOv2 of transformers without a head."""
    library = request.param
    spec = families.vit_spec(**FIELDS[library], activation="gelu_erf", position_resize="torch")
    path = tmp_path_factory.mktemp(library)
    about = dict(labels=LABELS if spec.num_classes else None, preprocess=PREPROCESS[library])
    export(path, library, reference.make_params(spec.shapes(), seed=7), spec, **about)
    return path


@pytest.fixture
def alone(folder, tmp_path):
    """The file without what lies beside it: nothing tells the heads of a network 16 wide."""
    return shutil.copy(folder / "model.safetensors", tmp_path / "deit.safetensors")


def answer(capfd, *argv) -> dict:
    capfd.readouterr()
    assert main([str(a) for a in argv]) == 0
    return json.loads(capfd.readouterr().out)


def trained(weights, photos, workdir, *options) -> list[str]:
    return [
        *("train", f"--data={photos}", f"--weights={weights}", f"--workdir={workdir}", "--json"),
        *(CROP, "--config.total_steps=3", "--config.batch=8"),
        *("--config.threads=1", "--config.workers=0", "--config.base_lr=0.001", *options),
    ]


def test_a_folder_is_looked_at_explained_and_evaluated(folder, photos, tmp_path, capfd, fails):
    image = photos / "dark" / "0.jpg"
    facts = answer(capfd, "info", folder, "--json")
    assert (facts["num_heads"], facts["known_from"]["num_heads"]) == (2, "config.json")
    assert "is a folder of timm or transformers: choose another" in fails("report", folder)
    page = tmp_path / "page.html"
    (found,) = answer(capfd, "explain", folder, image, "--out", page, "--json")
    assert np.shape(found["rollout"]) == (4, 4)
    assert page.stat().st_size > 10_000
    vit = load(folder)
    if vit.spec.num_classes is None:
        assert "give no classes" in fails("predict", folder, image)
        assert "have no head" in fails("evaluate", folder, photos, "--split=train+test")
        return
    (row,) = answer(capfd, "predict", folder, image, "--json")
    ((label, probability), *_) = vit.predict([image])[0]
    assert row["classes"][0] == {"label": label, "probability": pytest.approx(probability)}
    scores = answer(capfd, "evaluate", folder, photos, "--split=train+test", "--json")
    assert [row["label"] for row in scores["per_class"]] == [*LABELS]
    assert scores["count"] == 20


def test_it_is_planned_fine_tuned_and_evaluated(folder, alone, photos, tmp_path, capfd, fails):
    run, start, wishes, options, needs = tmp_path / "run", folder, {}, [], None
    if folder.name.startswith("hf"):  # Of a file alone the configuration tells the heads.
        assert "give their number, --heads N, --config" in fails(*trained(alone, photos, run))
        start, wishes, options = alone, {"heads": 2}, ["--config.model.num_heads=2"]
        source = f"--config.model_or_filename={start}"
        recipe = override(load_config(f"finetune_folder:{photos}"), [source, CROP, *options])
        needs = plan(recipe)["parameters"]
    stored = load(start, num_classes=2, **wishes)
    assert needs in (None, stored.spec.num_parameters)

    assert answer(capfd, *trained(start, photos, run, *options))["finished"]

    vit = load(run)
    assert vit.preprocess == stored.preprocess
    assert NORMALIZE in vit.preprocess
    assert vit.labels == LABELS
    assert vit.spec == stored.spec
    kernels = [flatten_dict(x.params, sep="/")["embedding/kernel"] for x in (vit, stored)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1
    assert answer(capfd, "evaluate", run, "--json")["count"] == 4


def test_a_file_alone_is_told_its_heads_everywhere(alone, photos, tmp_path, capfd, fails):
    image, page = photos / "dark" / "0.jpg", tmp_path / "page.html"
    commands = [
        ["info", alone],
        ["explain", alone, image, "--out", page],
        ["convert", alone, tmp_path / "mine.npz"],
    ]
    if load(alone, heads=2).spec.num_classes:
        commands += [["predict", alone, image], ["evaluate", alone, photos, "--split=train"]]
    for command in commands:
        assert "give their number, --heads N, --config.model.num_heads=N" in fails(*command)
        answer(capfd, *command, "--heads=2", "--json")
    assert load(tmp_path / "mine.npz").spec.num_heads == 2


def test_heads_that_contradict_the_file_beside_are_refused(folder, photos, fails):
    line = fails("info", folder, "--heads=4")
    assert "4 attention heads are given, but the config.json beside it tells 2: leave" in line
