"""The command line: what it prints, what it exits with, and one clear line for each mistake."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests import published
from tests.cli.conftest import write_images
from tests.training.conftest import TINY
from vit_jax import __version__, list_models, models
from vit_jax import main as main_module
from vit_jax.cli import COMMANDS, main

TRAIN = ("train", f"--config={TINY}", "--config.total_steps=2", "--config.warmup_steps=1")
ON_PHOTOS = (
    *("--config.pp.train=resize(8)|value_range(-1, 1)",),
    *("--config.pp.eval=resize(8)|value_range(-1, 1)",),
)


def help_of(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert not done.value.code
    return capsys.readouterr().out


def examples_of(command, capsys):
    lines = re.split(r"\nexamples?:\n", help_of(command, capsys))[1].split("\n")
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_ends_with_examples(command, capsys):
    examples = examples_of(command, capsys)
    assert examples
    assert all(example.startswith(f"vit-jax {command}") for example in examples)


@pytest.mark.slow
def test_the_examples_work_word_for_word(tmp_path, monkeypatch, capsys, weights):
    """In an empty folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    photos = write_images(tmp_path / "photos", 30)
    (tmp_path / "photo.jpg").write_bytes((photos / "dark" / "0.jpg").read_bytes())
    (tmp_path / "Ti_16.npz").write_bytes(weights.read_bytes())
    two_towers, _ = published.siglip(published.arrays("ViT MAP"))
    np.savez(tmp_path / "webli_en_b16.npz", **two_towers)
    # First what makes the runs that the others look at.
    for command in sorted(COMMANDS, key=lambda name: name != "train"):
        for example in examples_of(command, capsys):
            argv = shlex.split(example)[1:]
            if command == "plan":  # Which says how many devices JAX has, before that starts.
                argv = [sys.executable, "-m", "vit_jax", *argv]
                assert subprocess.run(argv, stdout=subprocess.DEVNULL).returncode == 0, example
            else:
                assert main(argv) == 0, example


@pytest.mark.slow
@pytest.mark.ci
def test_models_lists_the_official_ones(capsys):
    assert main(["models", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names == [*list_models(), *models.LIT_VARIANTS]


def test_info_says_what_a_file_is(weights, whole, capsys):
    assert main(["info", str(weights)]) == 0
    assert "8x8 pixels" in capsys.readouterr().out
    assert main(["info", str(whole), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_layers"], facts["labels"]) == (1, list("0123456789"))
    assert (facts["grid_size"], facts["tokens"], facts["nonfinite"]) == ([2, 2], 5, [])


def test_info_names_the_arrays_that_hold_no_numbers(weights, tmp_path, fails, capfd):
    arrays = dict(np.load(weights))
    arrays["head/bias"][0] = np.nan
    np.savez(tmp_path / "w.npz", **arrays)

    assert main(["info", str(tmp_path / "w.npz")]) == 0
    text = "values         no weights to use: NaN or infinite (1): head/bias 1 of "
    assert text in capfd.readouterr().out
    assert "head/bias" in fails("predict", tmp_path / "w.npz", "absent.jpg")


def test_a_run_stays_one_with_its_weights_as_another_file_beside_it(whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    assert main(["convert", str(run), str(run / "model.safetensors")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split=test[:7]"]) == 0
    assert "of 7" in capsys.readouterr().out


def test_evaluate_gives_the_figures_of_the_run_and_writes_every_prediction(whole, tmp_path, capsys):
    table = tmp_path / "p.csv"
    assert main(["evaluate", str(whole), "--json", f"--csv={table}", "--batch=50"]) == 0
    scores = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader(table.open()))
    assert scores["count"] == len(rows) == 360
    assert scores["top1"] == sum(row["correct"] == "1" for row in rows) / 360
    last = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["top1"] == last["test/top1"]
    assert main(["evaluate", str(whole), "digits", "--split=test[:7]"]) == 0
    said = capsys.readouterr()
    assert "of 7" in said.out
    assert said.err == ""
    assert main(["evaluate", str(whole), "digits"]) == 0
    assert "of digits the split test is taken, 360 images; --split" in capsys.readouterr().err


def test_predict_names_the_most_probable_classes(weights, photos, capsys):
    images = [str(photos / "dark" / f"{i}.jpg") for i in range(2)]
    assert main(["predict", str(weights), *images, "--top=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["picture"] for row in rows] == images
    assert [len(row["classes"]) for row in rows] == [1, 1]
    assert main(["predict", str(weights), *images]) == 0
    assert capsys.readouterr().out.startswith(images[0] + "\n")


@pytest.mark.parametrize("count", [2, 40])
def test_predict_reads_what_it_can_and_names_what_it_cannot(weights, photos, count, capsys):
    good = [str(photos / kind / f"{i}.jpg") for kind in ("dark", "bright") for i in range(10)]
    good = (2 * good)[: count - 1]
    bad = photos / "bad.jpg"
    bad.write_text("no image")
    images = [*good[:1], str(bad), *good[1:]]
    assert main(["predict", str(weights), *images, "--json"]) == 2
    shown = capsys.readouterr()
    rows = json.loads(shown.out)
    assert [row["picture"] for row in rows] == good
    assert shown.err.startswith(f"vit-jax: {bad}: not an image")
    assert shown.err.count("\n") == 1


def test_a_folder_is_not_trained_on_from_scratch_by_oversight(photos, tmp_path, fails):
    command = ("train", f"--data={photos}", f"--workdir={tmp_path / 'run'}")
    assert "nothing to start from: give --weights" in fails(*command, "--config.pp.crop=16")


@pytest.mark.slow
@pytest.mark.ci
def test_train_gives_its_result_as_json(tmp_path, capsys):
    assert main([*TRAIN, f"--workdir={tmp_path}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["finished"]) == (2, True)
    assert set(result["test"]) == {"test/loss", "test/top1", "test/top5"}


@pytest.mark.slow
@pytest.mark.ci
def test_train_on_a_folder_stops_at_an_unreadable_image_or_goes_on_without(
    photos, tmp_path, fails, caplog
):
    bad = photos / "dark" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    command = (*TRAIN, *ON_PHOTOS, f"--config.dataset={photos}", "--config.batch=32")
    assert "dark/3.jpg: truncated or damaged JPEG" in fails(*command, f"--workdir={tmp_path}/a")
    assert main([*command, "--config.corrupt=skip", f"--workdir={tmp_path}/a"]) == 0
    assert "Skipping" in caplog.text
    assert "dark/3.jpg" in caplog.text


@pytest.mark.parametrize("dash", ["-", "--"])
def test_the_originals_command_line_trains(dash, tmp_path, capsys):
    config = ["config", str(TINY)] if dash == "-" else [f"config={TINY}"]
    options = [*config, f"workdir={tmp_path}", "config.total_steps=2", "config.warmup_steps=1"]
    argv = [o if o == str(TINY) else dash + o for o in options]
    assert main_module.main(argv) == 0
    assert "finished 2 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ci
def test_what_absl_would_take_is_accepted(tmp_path, capsys):
    absl = ["--alsologtostderr", "--logtostderr", "--verbosity=1", "-v", "1", "--v=0", "-v=-1"]
    argv = [f"--config={TINY}", f"--workdir={tmp_path}", "--config.total_steps=2", *absl]
    assert main_module.main([*argv, "--log_dir", str(tmp_path)]) == 0
    assert "finished 2 steps" in capsys.readouterr().out
    assert main_module.main([*argv, "--flagfile=x"]) == 2
    assert "unknown option --flagfile" in capsys.readouterr().err


def test_each_program_shows_its_own_usage_and_version(capsys):
    with pytest.raises(SystemExit) as done:
        main_module.main(["--help"])
    assert not done.value.code
    assert "usage: python -m vit_jax.main --workdir=DIR --config=FILE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert not done.value.code
    assert capsys.readouterr().out == f"vit-jax {__version__}\n"
    assert "[--json]" in help_of("train", capsys)


@pytest.mark.parametrize("argv", [[], ["data"]])
def test_who_names_no_command_is_shown_all_of_them(argv, capsys):
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 2
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {' '.join(['vit-jax', *argv])} ")
    assert all(f"\n    {name} " in shown for name in (COMMANDS if not argv else ["check", "show"]))


@pytest.mark.parametrize("module", ["vit_jax", "vit_jax.main"])
def test_modules_can_be_run_and_mistakes_give_status_2_without_a_traceback(module):
    command = [] if module == "vit_jax.main" else ["train"]
    done = subprocess.run(
        [sys.executable, "-m", module, *command, "--config=nothing", "--workdir=x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("vit-jax: no configuration file nothing")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian' (did you mean train?); see vit-jax --help"),
        (["data", "chek"], "invalid choice: 'chek' (did you mean check?); see vit-jax data --help"),
        (["xyz"], "invalid choice: 'xyz' (choose from"),
        (["--versoin"], "unknown option --versoin (did you mean --version?); see vit-jax --help"),
        (
            ["models", "--jsn"],
            "unknown option --jsn (did you mean --json?); see vit-jax models --help",
        ),
        (["train", "--config=digits"], "required: --workdir; see vit-jax train --help"),
        (["train", "--workdir=x"], "one of the arguments --config --data is required"),
        (["train", "--workdir=x", "--config=digits", "--data=x"], "not allowed with argument"),
        (["train", "--workdir=x", "--config=nope.py"], "no configuration file nope.py"),
        (["train", "--workdir=x", "--data=nope"], "unknown dataset 'nope'"),
        (["evaluate", "w.npz", "--corrupt=maybe"], "invalid choice: 'maybe'"),
        (["evaluate", "w.npz", "--batch=many"], "'many' is no whole number of at least 1"),
        (["evaluate", "w.npz", "--batch=0"], "--batch: '0' is no whole number of at least 1"),
        (["predict", "w.npz", "p.jpg", "--top", "-3"], "--top: '-3' is no whole number"),
        (["train", "--data=x", "--wieghts=y"], "option --wieghts (did you mean --weights?)"),
        (["train", "--config=digits", "--wrokdir=y"], "--wrokdir (did you mean --workdir?)"),
        (["train", "--config=digits", "--workdir="], "--workdir is empty: name the folder"),
        (["train", "--config=", "--workdir=x"], "no configuration file : give the path"),
        (["train", "--config=augreg", "--workdir=x"], "augreg.py needs a model: --config=augreg:"),
        (["train", "--config=digits:foo", "--workdir=x"], "digits takes no argument, found 'foo'"),
        (["evaluate", "w.npz", "digits", "--config.batch=3"], "unknown option --config.batch"),
    ],
)
def test_a_command_that_cannot_be_understood(argv, message, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(*argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--config.model.name=ViT-Q_16", "unknown model 'ViT-Q_16': did you mean ViT-"),
        ("--config.dataset=cifer", "unknown dataset 'cifer'"),
        ("--config.pp.test=trian", "unknown split 'trian'"),
        ("--config.pp.train=resise(8)", "unknown operation 'resise'"),
        ("--config.toal_steps=3", "unknown field config.toal_steps: did you mean config.total_"),
        ("--config.batch=many", "config.batch is 'many' of type str, expected int"),
        ("--config.accum_steps=3", "config.batch 16 is not divisible by config.accum_steps 3"),
        ("--config.seed=-1", "config.seed is -1, expected"),
        ("--config.model.num_heads=3", "hidden_size 16 is not divisible by num_heads 3"),
        ("--config.model.patch_size=(16,16)", "smaller than one patch of 16x16"),
        ("--config.model_or_filename=no.npz", "no weights at no.npz"),
        ("--config.pretrained_dir=nowhere", "no weights at nowhere/ViT-Ti_16.npz"),
        ("--total_steps=3", "unknown option --total_steps; see vit-jax train --help"),
        ("junk", "unknown option 'junk'"),
        ("--config.dataset=digits:foo", "unknown dataset 'digits:foo'"),
    ],
)
def test_a_run_that_cannot_be(option, message, fails, tmp_path):
    assert message in fails(*TRAIN, f"--workdir={tmp_path / 'run'}", option)
    assert not (tmp_path / "run" / "weights.npz").exists()


def test_a_batch_that_the_devices_cannot_share_is_refused():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    script = "import sys; from vit_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *TRAIN, "--workdir=x", "--config.batch=24"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert (
        "config.batch 24 is not divisible by 8 devices x 2 accum_steps: use a multiple of 16"
        in (done.stderr)
    )


@pytest.mark.parametrize("place", ["under a file", "a file", "/proc/nothing/run"])
def test_a_workdir_that_cannot_be_written(place, fails, tmp_path):
    (tmp_path / "file").write_text("")
    paths = {"under a file": tmp_path / "file" / "run", "a file": tmp_path / "file"}
    message = fails(*TRAIN, f"--workdir={paths.get(place, place)}")
    assert "workdir" in message
    assert message.endswith(("choose another place", "choose a folder"))


@pytest.mark.parametrize("command", ["info", "predict", "evaluate"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "no workdir of a training run"),
        ("text", "holds no weights: expected an .npz, .safetensors, .pth or .msgpack file or"),
        ("truncated", "the file is damaged or cut short"),
        ("pickled", "pickled Python objects"),
        ("other", "is no ViT checkpoint"),
        ("unfinished", "has not finished"),
    ],
)
def test_weights_that_cannot_be_loaded(command, kind, message, fails, tmp_path, weights, photos):
    path = tmp_path / "w.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "truncated":
        path.write_bytes(weights.read_bytes()[:-500])
    elif kind == "pickled":
        np.savez(path, a=np.array([{"a": 1}], dtype=object))
    elif kind == "other":
        np.savez(path, a=np.zeros(3))
    elif kind == "unfinished":
        path.mkdir()
        (path / "config.json").write_text("{}")
    arguments = {
        "info": [],
        "predict": [photos / "dark" / "0.jpg"],
        "evaluate": [photos],
    }[command]
    text = fails(command, path, *arguments)
    assert message in text
    assert "w.npz" in text


def test_a_damaged_weights_file_stops_a_fine_tuning(weights, fails, tmp_path):
    (tmp_path / "w.npz").write_bytes(weights.read_bytes()[:-500])
    options = (f"--weights={tmp_path / 'w.npz'}", f"--workdir={tmp_path / 'run'}")
    assert "the file is damaged or cut short" in fails(*TRAIN, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read (No such file or directory)"),
        (b"", "empty file, expected an image"),
        (b"some text", "not an image (starts with b'some tex')"),
        (b"\xff\xd8\xff\xe0", "truncated or damaged JPEG"),
    ],
)
def test_a_image_that_is_none(content, message, weights, fails, tmp_path):
    path = tmp_path / "image.jpg"
    if content is not None:
        path.write_bytes(content)
    assert f"{path}: {message}" in fails("predict", weights, path)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_folders_that_hold_no_classes(command, weights, fails, tmp_path, photos):
    def message(folder):
        if command == "evaluate":
            return fails("evaluate", weights, folder)
        return fails(*TRAIN, f"--config.dataset={folder}", f"--workdir={tmp_path / 'run'}")

    (photos / "empty").mkdir()
    assert f"{photos}/empty: no images in this class folder" in message(photos)
    alone = write_images(tmp_path / "alone", 3)
    (alone / "bright").rename(tmp_path / "elsewhere")
    assert "only one class ('dark')" in message(alone)
    assert "no class folders" in message(alone / "dark")


def test_evaluate_names_what_it_cannot_match(whole, weights, photos, fails, capfd):
    assert "classes that the weights don't know: bright, dark" in fails("evaluate", whole, photos)
    assert "on which images?" in fails("evaluate", weights)
    (photos / "dark" / "4.jpg").write_bytes(b"")
    assert "dark/4.jpg: empty file" in fails("evaluate", weights, photos, "--split=train+test")
    arguments = ["evaluate", str(weights), str(photos), "--split=train+test", "--corrupt=skip"]
    assert main(arguments) == 0
    assert "1  unreadable images, not counted" in capfd.readouterr().out


def test_a_file_that_cannot_be_written_is_named(whole, fails, tmp_path):
    text = fails("evaluate", whole, f"--csv={tmp_path / 'none' / 'p.csv'}")
    assert str(tmp_path / "none") in text


def test_a_damaged_zip_names_the_array(weights, fails, tmp_path):
    data = bytearray(weights.read_bytes())
    with zipfile.ZipFile(weights) as archive:
        name = archive.infolist()[0].filename
    data[200] ^= 255
    (tmp_path / "w.npz").write_bytes(data)
    assert name in fails("info", tmp_path / "w.npz")


def test_data_prepare_says_what_it_wrote_and_training_opens_it(photos, tmp_path, capfd, fails):
    target = tmp_path / "prepared"
    assert main(["data", "prepare", str(photos), str(target), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["splits"] == {"train": 16, "test": 4}
    assert "is there already" in fails("data", "prepare", photos, target)
    assert "unknown dataset" in fails("data", "prepare", "no/such/data", tmp_path / "x")
    assert main(["data", "prepare", str(target), str(tmp_path / "again")]) == 0
    assert "holds 16 in train, 4 in test" in capfd.readouterr().out
