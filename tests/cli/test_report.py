"""`vit-jax report`: of finished runs, of those on their way, and of what is none."""

import csv
import json
import shutil

import pytest
from PIL import Image

from tests.cli.conftest import write_images
from tests.training.conftest import TINY
from vit_jax import load
from vit_jax.cli import main
from vit_jax.training.workdir import read_metrics


@pytest.fixture
def copy(whole, tmp_path):
    """A run that may be changed."""
    return shutil.copytree(whole, tmp_path / "run")


def test_a_run_ends_with_a_page_and_a_image(whole):
    page = (whole / "report.html").read_text()
    accuracy = read_metrics(whole / "metrics.jsonl")[-1]["test/top1"]
    assert f"<dd>{accuracy:.1%}</dd>" in page
    assert Image.open(whole / "report.png").format == "PNG"


def test_the_report_says_what_the_run_and_the_evaluation_said(whole, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(whole), f"--out={out}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(whole), "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert (said["count"], said["top1"], said["note"]) == (360, last["test/top1"], "")
    assert said["files"] == [str(out)]
    assert {k: said[k] for k in ("top5", "loss")} == {k: expected[k] for k in ("top5", "loss")}
    recalls = [(row["label"], row["recall"], row["count"]) for row in said["per_class"]]
    assert recalls == [tuple(row.values()) for row in expected["per_class"]]
    assert 0 <= said["calibration_error"] <= 1
    # But for the batches of the evaluation, the page is the one that the run left.
    title = (whole / "report.html").read_text().split("<title>")[1].split("</title>")[0]
    assert title in out.read_text()


def test_of_a_run_on_its_way_the_last_checkpoint_is_shown(copy, capsys):
    for name in ("weights.npz", "weights.json", "report.png", "report.html"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints" / "30")
    (copy / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    before = sorted(p for p in copy.rglob("*"))
    assert main(["report", str(copy), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    last = read_metrics(copy / "metrics.jsonl")[-1]
    assert said["top1"] == last["test/top1"]
    assert said["note"] == "The run has not finished its 40 steps: this is what step 40 saved."
    assert said["note"] in (copy / "report.html").read_text()
    assert sorted(set(copy.rglob("*")) - set(before)) == [copy / "report.html", copy / "report.png"]


def test_a_report_on_the_way_is_replaced_at_the_end(copy, capsys):
    for name in ("weights.npz", "weights.json"):
        (copy / name).unlink()
    (copy / "report.png").write_bytes(b"on the way")
    assert main(["train", f"--config={TINY}", f"--workdir={copy}"]) == 0
    assert Image.open(copy / "report.png").format == "PNG"


def test_of_a_run_that_has_saved_nothing_there_are_curves_only(copy, capsys):
    (copy / "weights.npz").unlink()
    shutil.rmtree(copy / "checkpoints")
    assert main(["report", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "The run has not finished its 40 steps: nothing is saved yet."
    page = (copy / "report.html").read_text()
    assert "<h2>Curves" in page
    assert "<h2>Confusion" not in page


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_whose_images_have_several_labels(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 4, size=12)
    rows = ["path,label,split"]
    for i, path in enumerate(sorted(photos.glob("*/*.jpg"))):
        labels = ("bright;odd", "dark", "odd")[i // 2 % 3]
        rows.append(f"{path},{labels},{'test' if i % 2 else 'train'}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    fields = {"dataset": table, "loss": "sigmoid", "total_steps": 2, "warmup_steps": 1}
    fields |= {"batch": 4, "accum_steps": 1, "pp.train": "resize(8)|value_range(-1, 1)"}
    fields |= {"pp.eval": fields["pp.train"], "batch_eval": 4}
    options = [f"--config.{k}={v}" for k, v in fields.items()]
    workdir = tmp_path / "run"
    assert main(["train", f"--config={TINY}", f"--workdir={workdir}", *options]) == 0
    first = (workdir / "report.html").read_text()
    assert main(["report", str(workdir)]) == 0
    second = (workdir / "report.html").read_text()
    for page in (first, second):
        assert "Of an image's several classes the likeliest counts as the true one." in page
        assert "<h2>Labels</h2>" in page
        assert "chosen for the best F1 on these same images" in page
    capsys.readouterr()
    assert main(["report", str(workdir), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(workdir), "--json", f"--csv={tmp_path / 'p.csv'}"]) == 0
    assert json.loads(capsys.readouterr().out)["per_label"] == said["per_label"]
    assert [row["label"] for row in said["per_label"]] == ["bright", "dark", "odd"]
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["test/map"] == said["mean_average_precision"]
    assert last["test/f1"] == said["mean_f1"]
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["labels"] for row in rows} == {"bright;odd", "dark", "odd"}
    assert main(["evaluate", str(workdir)]) == 0
    shown = capsys.readouterr().out
    assert f"mAP       {last['test/map']:7.2%}  mean over the 3 labels" in shown
    assert "a threshold a label: the best F1 on these same images, so that it is higher" in shown
    # What a run was trained with is also how it predicts.
    vit = load(workdir)
    assert vit.loss == "sigmoid"
    assert main(["predict", str(workdir), rows[0]["picture"], "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    for found in answer["classes"]:
        expected = float(rows[0][f"probability of {found['label']}"])
        assert found["probability"] == pytest.approx(expected, abs=1e-5)


def test_of_images_given_in_python_the_run_itself_reports(copy, fails):
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"digits (given in Python)"'))
    for command in ("report", "evaluate"):
        message = fails(command, copy)
        assert message.startswith(f"{copy}: its images were given in Python and can't be opened")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda run: run, ["--out=page.pdf"], "page.pdf: expected a name in .html or .png"),
        (lambda run: run, ["--out=/nowhere/page.png"], "there is no folder /nowhere"),
        (lambda run: run.parent, [], "is no workdir of a training run: it holds no config.json"),
        (lambda run: run / "none", [], "is no workdir of a training run"),
        (lambda run: (run / "metrics.jsonl").unlink() or run, [], "Cannot read"),
        (lambda run: (run / "weights.npz").write_bytes(b"x") and run, [], "holds no weights"),
    ],
    ids=["kind", "place", "no run", "no folder", "no metrics", "damaged weights"],
)
def test_mistakes_are_told_in_one_line(make, options, message, copy, fails):
    assert message in fails("report", make(copy), *options)


def test_a_damaged_checkpoint_is_named(copy, fails):
    (copy / "weights.npz").unlink()
    for file in (copy / "checkpoints" / "40" / "state" / "d").iterdir():
        file.write_bytes(b"")
    message = fails("report", copy)
    assert message.startswith(f"{copy}/checkpoints/40")
    assert message.endswith("the folder is damaged or incomplete")
