"""The same images train alike, wherever they come from."""

import contextlib
import csv
import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.test_tfds import Photos, build
from tests.images import listed, write_photos
from tests.training.conftest import TINY
from vit_jax import data, load
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.training import outputs, run
from vit_jax.training.inputs import open_data
from vit_jax.training.options import load_config, override
from vit_jax.training.run import introduce
from vit_jax.training.workdir import read_config, read_metrics

FIELDS = (
    *("total_steps=6", "warmup_steps=1", "progress_every=1", "eval_every=3", "checkpoint_every=6"),
    *("batch=8", "batch_eval=6"),
    "pp.train=inception_crop(8)|flip|value_range(-1, 1)",
    "pp.eval=resize(8)|value_range(-1, 1)",
)


@pytest.fixture(autouse=True)
def _no_image(monkeypatch):
    monkeypatch.setattr(outputs, "write_report", lambda report, path: path.touch())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), size=12, train=7, test=3)


@pytest.fixture(scope="module")
def from_folder(photos, tmp_path_factory):
    """The workdir of a run on the folder."""
    workdir = tmp_path_factory.mktemp("folder") / "run"
    fields = [f"--config.{field}" for field in (*FIELDS, f"dataset={photos}")]
    run(override(load_config(str(TINY)), fields), workdir)
    return workdir


def rows_of(photos):
    return [
        {"path": str(f), "label": f.parent.name, "split": split}
        for split in ("train", "test")
        for f in listed(photos, split)
    ]


def as_folder(photos, tmp_path):
    return [f"dataset={photos}"]


def as_csv(photos, tmp_path):
    with (tmp_path / "all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "label", "split"])
        writer.writeheader()
        writer.writerows(rows_of(photos))
    return [f"dataset={tmp_path / 'all.csv'}"]


def as_json_lines(photos, tmp_path):
    lines = [json.dumps(row) + "\n" for row in rows_of(photos)]
    (tmp_path / "all.jsonl").write_text("".join(lines))
    return [f"dataset={tmp_path / 'all.jsonl'}"]


def as_tfds_name(photos, tmp_path):
    build(Photos, photos, tmp_path)
    return ["dataset=photos", f"tfds_data_dir={tmp_path}"]


def as_prepared(photos, tmp_path):
    assert main(["data", "prepare", str(photos), str(tmp_path / "prepared")]) == 0
    return [f"dataset={tmp_path / 'prepared'}"]


def arrays_of(photos, split):
    source = data.open_source(str(photos), split)
    return np.stack([source[i]["image"] for i in range(len(source))]), source.label_ids


def as_npz(photos, tmp_path):
    arrays = {"names": ["bee", "cat", "dog"]}
    for split in ("train", "test"):
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = arrays_of(photos, split)
    np.savez(tmp_path / "all.npz", **arrays)
    return [f"dataset={tmp_path / 'all.npz'}"]


def as_hugging_face(photos, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {}
    for split in ("train", "test"):
        files = listed(photos, split)
        kinds = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["bee", "cat", "dog"]),
        }
        rows = {"image": list(map(str, files)), "label": [f.parent.name for f in files]}
        parts[split] = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return [f"dataset={tmp_path / 'saved'}"]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "spelled",
    [as_csv, as_json_lines, as_tfds_name, as_prepared, as_npz, as_hugging_face],
    ids=lambda f: f.__name__,
)
def test_losses_and_weights_are_those_of_the_folder(
    spelled, photos, from_folder, tiny, tmp_path, outcome
):
    assert run(tiny(*FIELDS, *spelled(photos, tmp_path)), tmp_path / "run").finished
    weights, lines = outcome(tmp_path / "run")
    assert len([line for line in lines if "train/loss" in line]) == 6
    assert (weights, lines) == outcome(from_folder)


def test_the_first_line_says_what_was_left_out_or_guessed(photos, tiny, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "train").rename(root / "TRAIN")
    (root / "TRAIN" / "cat" / "scan.dcm").touch()
    config = tiny(*FIELDS, f"dataset={root}")
    network = SimpleNamespace(params={}, notes=(), spec=SimpleNamespace(description="ViT"))
    line = introduce(config, network, open_data(config))
    assert "3 classes, 21 images to train on and 9 to test on" in line
    assert f"; TRAIN is the split train; left out in {root}/TRAIN, as they are no images" in line
    assert "1 (.dcm); convert or remove them" in line


@pytest.mark.slow
@pytest.mark.ci
def test_so_are_those_of_arrays_in_memory(photos, from_folder, tiny, tmp_path, outcome):
    names = ["bee", "cat", "dog"]
    train, test = (
        data.from_arrays(*arrays_of(photos, split), names=names) for split in ("train", "test")
    )
    assert run(tiny(*FIELDS), tmp_path / "run", sources=(train, test)).finished
    assert read_config(tmp_path / "run").dataset == f"{train.name} (given in Python)"
    assert outcome(tmp_path / "run") == outcome(from_folder)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ("random_crop(28)|flip|value_range(-1, 1)", "central_crop(28)|value_range(-1, 1)"),
        ("random_crop((36, 20))|resize(16)|gray", "resize_small(20)|central_crop((20, 30))"),
        ("rgb", "central_crop((40, 60))"),
    ],
)
def test_crops_need_no_resize_before_them(train, evaluation, tiny):
    evaluation += "|resize(16)|gray" if "gray" in train else ""
    source = data.from_arrays(np.zeros((4, 40, 60, 3), np.uint8), [0, 1, 0, 1])
    task = open_data(tiny(f"pp.train={train}", f"pp.eval={evaluation}"), (source, source))
    for batches in (task.train_batches(0), task.eval_batches()):
        with contextlib.closing(batches):
            assert next(batches)["image"].shape[1:] == task.image_shape


def several(photos, tmp_path):
    rows = [r | {"labels": [r["label"], "any"][: 1 + i % 2]} for i, r in enumerate(rows_of(photos))]
    rows[-1]["labels"] = []
    lines = [json.dumps({k: r[k] for k in ("path", "labels", "split")}) + "\n" for r in rows]
    (tmp_path / "several.jsonl").write_text("".join(lines))
    return f"dataset={tmp_path / 'several.jsonl'}"


@pytest.mark.slow
@pytest.mark.ci
def test_several_labels_train_with_the_sigmoid_loss_only(photos, tiny, tmp_path, capsys):
    dataset = several(photos, tmp_path)
    with pytest.raises(UserError, match=r"config\.loss is softmax.*use --config\.loss=sigmoid"):
        run(tiny(*FIELDS, dataset), tmp_path / "run")
    result = run(tiny(*FIELDS, dataset, "loss=sigmoid"), tmp_path / "other")
    assert result.finished
    predictions = tmp_path / "p.csv"
    assert main(["evaluate", str(tmp_path / "other"), "--json", f"--csv={predictions}"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["count"] == 9
    assert scores["top1"] == result.test["test/top1"]
    assert scores["loss"] == pytest.approx(result.test["test/loss"], rel=1e-5)
    last = list(csv.DictReader(predictions.open()))[-1]
    assert (last["label"], last["correct"]) == ("", "0")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
def test_the_original_command_line_trains_on_the_stock_cifar10(shared, tmp_path):
    import subprocess
    import sys

    from tests.cifar import write_archive
    from tests.data.test_tfds import PREPARE

    write_archive(shared / "images" / "cifar10", tmp_path)
    data_dir = str(tmp_path / "tfds")
    subprocess.run(
        [sys.executable, "-c", PREPARE, str(tmp_path), data_dir, "array_record"], check=True
    )
    command = [
        *(sys.executable, "-m", "vit_jax.main", f"--workdir={tmp_path / 'run'}"),
        *("--config=configs/vit.py:b16,cifar10", f"--config.tfds_data_dir={data_dir}"),
        *("--config.pretrained_dir=", "--config.model.patch_size=(8, 8)"),
        *("--config.model.hidden_size=32", "--config.model.num_layers=1"),
        *("--config.model.num_heads=2", "--config.model.mlp_dim=32", "--config.pp.crop=32"),
        *("--config.total_steps=4", "--config.warmup_steps=1", "--config.batch=32"),
        *("--config.accum_steps=1", "--config.batch_eval=100", "--config.progress_every=1"),
    ]
    subprocess.run(command, check=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.ci
def test_weights_of_12_bits_are_fine_tuned_and_reported_with_their_levels(tiny, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (24, 8, 8, 1), np.uint16)
    np.savez(tmp_path / "images.npz", images=values, labels=np.arange(24) % 2)
    first = tiny(*FIELDS, f"dataset={tmp_path / 'images.npz'}", "levels=12 bit")
    run(first, tmp_path / "first")
    text = "levels(0, 4095)|resize(8)|value_range(-1, 1)"
    assert load(tmp_path / "first").preprocess == text
    again = tiny(*FIELDS, f"dataset={tmp_path / 'images.npz'}", "pp.crop=8")
    again.update(model_or_filename=str(tmp_path / "first"))
    again.model.name = again.pp.train = again.pp.eval = ""
    found = open_data(again)
    assert found.eval_ops.spec == text
    assert found.train_ops.levels == found.eval_ops.levels
    assert "levels(0, 4095), as recorded with the weights" in found.notes
    # Of an unfinished run, of which nothing but checkpoints is left.
    (tmp_path / "first" / "weights.npz").unlink()
    unfinished = outputs.evaluate_workdir(tmp_path / "first")
    finished = [
        x["test/loss"]
        for x in read_metrics(tmp_path / "first" / "metrics.jsonl")
        if "test/loss" in x
    ]
    assert unfinished.scores.loss == pytest.approx(finished[-1], rel=1e-5)
