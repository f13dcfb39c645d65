"""Many images into a file: predictions and features."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import families, reference
from vit_jax import data
from vit_jax.checkpoints import to_tree
from vit_jax.cli import main
from vit_jax.errors import UserError
from vit_jax.evaluation import classify
from vit_jax.evaluation.many import write_features, write_predictions_csv
from vit_jax.pretrained import Pretrained


def write_images(folder, count, size=(18, 20)):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        image = rng.integers(0, 256, (size[0], size[1] + i % 3, 3), np.uint8)
        assert cv2.imwrite(str(folder / f"{i:05}.png"), image)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture
def paths(tmp_path):
    return write_images(tmp_path / "images", 11)


@pytest.fixture
def vit(tmp_path):
    return families.make("sincos2d token", tmp_path)


def rows_of(file):
    with open(file, newline="") as lines:
        return list(csv.reader(lines))


def test_each_image_has_a_row_with_what_predict_says(vit, paths, tmp_path):
    assert write_predictions_csv(vit, paths, tmp_path / "p.csv", top=2, batch_size=4) == (0, [])
    header, *rows = rows_of(tmp_path / "p.csv")
    expected = ["path", "prediction", "probability", "prediction 2", "probability 2", "error"]
    assert header == expected
    for path, answer, row in zip(paths, vit.predict(paths, top=2), rows, strict=True):
        assert (row[0], row[1], row[3], row[5]) == (path, answer[0][0], answer[1][0], "")
        said = [float(row[2]), float(row[4])]
        np.testing.assert_allclose(said, [p for _, p in answer], atol=2e-6)
    assert sorted(os.listdir(tmp_path)) == ["images", "p.csv"]


def test_all_probabilities_are_written_if_all_are_wanted(vit, paths, tmp_path):
    vit = dataclasses.replace(vit, loss="sigmoid", labels=("=1+1", "bär", "c", "d", "e"))
    write_predictions_csv(vit, paths, tmp_path / "p.csv", top=None)
    header, *rows = rows_of(tmp_path / "p.csv")
    assert header[:4] == ["path", "prediction", "probability", "probability of =1+1"]
    preprocess = data.parse(vit.preprocess)
    logits = vit(np.stack([preprocess(vit.read(path)) for path in paths]))
    found = np.array([row[3:-1] for row in rows], float)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), atol=2e-6)
    assert {row[1] for row in rows} <= {"'=1+1", "bär", "c", "d", "e"}


def test_unreadable_images_are_named_in_the_file(vit, paths, tmp_path):
    (tmp_path / "images" / "00003.png").write_bytes(b"\x89PNG")
    before, mistakes = write_predictions_csv(vit, [*paths, "gone.jpg"], tmp_path / "p.csv")
    assert (before, len(mistakes)) == (0, 2)
    rows = rows_of(tmp_path / "p.csv")[1:]
    assert [row[0] for row in rows if row[-1]] == [paths[3], "gone.jpg"]
    assert rows[3][1:-1] == [""] * 10
    assert "gone.jpg: can't be read" in rows[-1][-1]
    for path in paths:
        os.unlink(path)
    with pytest.raises(UserError, match=r"none of the 11 images can be read: .*00000\.png"):
        write_predictions_csv(vit, paths, tmp_path / "none.csv")
    with pytest.raises(UserError, match=r"none of the 11 images can be read: .*00000\.png"):
        write_features(vit, paths, tmp_path / "none.npz")
    assert not list(tmp_path.glob("none.*"))


def test_what_was_stopped_goes_on_and_other_wishes_begin_anew(vit, paths, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total):
        if done >= 8:
            raise Stopped

    write_predictions_csv(vit, paths, tmp_path / "whole.csv", batch_size=4)
    (tmp_path / "images" / "00001.png").write_bytes(b"\x89PNG")
    with pytest.raises(Stopped):
        write_predictions_csv(vit, paths, tmp_path / "p.csv", batch_size=4, progress=stop)
    assert not (tmp_path / "p.csv").exists()
    (partial,) = tmp_path.glob("p.csv.*.partial")
    partial.write_bytes(partial.read_bytes()[:-7])  # Half a row.
    spec = vit.spec.replace(activation="gelu_erf")
    for other in (
        dataclasses.replace(vit, preprocess="resize(16)|value_range(0, 1)"),
        dataclasses.replace(vit, loss="sigmoid"),
        dataclasses.replace(vit, spec=spec, model=spec.model()),
    ):
        assert write_predictions_csv(other, paths, tmp_path / "p.csv", overwrite=True)[0] == 0
    before, (mistake,) = write_predictions_csv(vit, paths, tmp_path / "p.csv", overwrite=True)
    assert (before, "00001.png" in mistake) == (7, True)  # Also of the rows from before.
    parts, whole = ([row[:2] for row in rows_of(tmp_path / n)] for n in ("p.csv", "whole.csv"))
    whole[2][1] = ""
    assert parts == whole
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.ci
def test_thousands_are_predicted_in_flat_memory_and_once_each_however_often_it_is_killed(
    vit, tmp_path
):
    paths = write_images(tmp_path / "images", 5000, size=(64, 64))
    vit = dataclasses.replace(vit, preprocess="resize(16)|value_range(-1, 1)")
    vit.save(tmp_path / "w.npz")
    script = "import resource, sys; from vit_jax.cli import main; status = main(sys.argv[1:]); "
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(status)"
    command = [sys.executable, "-c", script, "predict", tmp_path / "w.npz"]

    def predict(*images):
        done = subprocess.run([*command, *images], check=True, capture_output=True, text=True)
        return done.stdout, int(done.stdout.split()[-1])

    _, little = predict(*paths[:300], f"--csv={tmp_path / 'few.csv'}", "--top=1")
    options = (tmp_path / "images", f"--csv={tmp_path / 'p.csv'}", "--top=1")
    for _ in range(2):
        process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
        seen = sum(len(f.read_bytes()) for f in tmp_path.glob("p.csv.*.partial"))
        while sum(len(f.read_bytes()) for f in tmp_path.glob("p.csv.*.partial")) < seen + 20_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    said, much = predict(*options)
    assert "predictions of 5,000 images" in said
    assert "of them from before" in said
    assert [row[0] for row in rows_of(tmp_path / "p.csv")[1:]] == paths
    assert much < little + 40  # MB: the pixels of 4,700 images more are 58.


def test_features_are_written_for_numpy_and_for_arrow(vit, paths, tmp_path):
    (tmp_path / "images" / "00003.png").write_bytes(b"\x89PNG")
    readable = [path for path in paths if "00003" not in path]
    for what, shape in {"pooled": (16,), "class": (16,), "patches": (16, 16)}.items():
        file = tmp_path / f"{what}.npz"
        (mistake,) = write_features(vit, paths, file, what=what, batch_size=4)
        assert "00003.png" in mistake
        found = np.load(file)
        assert found["features"].shape == (11, *shape)
        assert found["paths"].tolist() == paths
        assert [i for i, text in enumerate(found["errors"]) if text] == [3]
        assert np.isnan(found["features"][3]).all()
        expected = vit.features(readable, what)
        np.testing.assert_allclose(
            np.delete(found["features"], 3, axis=0), expected, rtol=1e-5, atol=1e-5
        )
        write_features(vit, paths, tmp_path / f"{what}.parquet", what=what)
        table = pq.read_table(tmp_path / f"{what}.parquet").to_pydict()
        np.testing.assert_array_equal(
            np.array(table["features"], np.float32).reshape(11, *shape), found["features"]
        )
        assert (table["path"], table["error"]) == (paths, found["errors"].tolist())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({}, "f.txt", "named as neither .npz nor .parquet"),
        ({"what": "mean"}, "f.npz", "expected one of pooled, class, patches, tokens"),
        ({"what": "tokens", "layer": "block_1"}, "f.npz", "no layer 'block_1', only embedding"),
        ({"layer": "encoderblock_0"}, "f.npz", "leave out the layer"),
        ({}, "nowhere/f.npz", "there is no folder"),
    ],
)
def test_features_that_there_are_none_of_are_refused(vit, paths, tmp_path, options, name, message):
    with pytest.raises(UserError, match=message):
        write_features(vit, paths, tmp_path / name, **options)
    assert not list(tmp_path.glob("f.*"))


def test_a_class_token_is_one_whether_or_not_the_head_reads_it(paths, tmp_path):
    for fields in (dict(distilled="token"), dict(classifier="gap", unread_class_token=True)):
        spec = families.vit_spec(**fields)
        params = to_tree(reference.make_params(spec.shapes(), seed=2))
        vit = Pretrained(spec.model(), params, spec, None, "resize(16)|value_range(-1, 1)")
        tokens, patches = vit.features(paths, "tokens"), vit.features(paths, "patches")
        np.testing.assert_array_equal(vit.features(paths, "class"), tokens[:, 0])
        np.testing.assert_array_equal(patches, tokens[:, -16:])


def test_images_of_the_networks_own_size_need_no_resize(vit, tmp_path):
    vit = dataclasses.replace(vit, preprocess="value_range(-1, 1)")
    (tmp_path / "own").mkdir()
    own = [tmp_path / "own" / f"{i}.png" for i in range(3)]
    for i, path in enumerate(own):
        assert cv2.imwrite(str(path), np.full((16, 16, 3), 80 * i, np.uint8))
    write_predictions_csv(vit, own, tmp_path / "p.csv", top=1)
    names = [answer[0][0] for answer in vit.predict(own, top=1)]
    assert [row[1] for row in rows_of(tmp_path / "p.csv")[1:]] == names


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ("one.png", {}, "paths are 'one.png', expected a list"),
        ([], {}, r"paths are \[\], expected a list"),
        (["one.png"], {"top": 0}, "top is 0, expected at least 1"),
    ],
)
def test_what_is_no_list_of_paths_is_refused(vit, paths, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_predictions_csv(vit, paths, tmp_path / "p.csv", **options)
    assert not list(tmp_path.glob("p.csv*"))


def test_two_processes_do_not_write_the_same_table(vit, paths, tmp_path):
    def again(done, total):
        with pytest.raises(UserError, match=r"another process writes .*\.partial: wait for it"):
            write_predictions_csv(vit, paths, tmp_path / "p.csv")

    write_predictions_csv(vit, paths, tmp_path / "p.csv", progress=again)
    assert len(rows_of(tmp_path / "p.csv")) == 12


# The commands.


@pytest.fixture
def weights(vit, tmp_path):
    vit.save(tmp_path / "w.npz")
    return str(tmp_path / "w.npz")


def test_the_commands_write_say_what_they_left_out_and_name_what_they_could_not_read(
    weights, paths, tmp_path, capsys
):
    folder = tmp_path / "images"
    (folder / "notes.txt").touch()
    (folder / "00003.png").write_bytes(b"\x89PNG")
    assert main(["predict", weights, str(folder), f"--csv={tmp_path / 'p.csv'}", "--top=all"]) == 2
    shown = capsys.readouterr()
    assert shown.out == f"predictions of 11 images in {tmp_path / 'p.csv'}\n"
    assert f"left out of {folder}: 1 (.txt)" in shown.err
    assert shown.err.count("00003.png") == 1  # Not by the reader, too.
    out = tmp_path / "f.npz"
    assert main(["embed", weights, f"{folder}/*.png", f"--out={out}", "--json"]) == 2
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert (answer["images"], len(answer["unreadable"])) == (11, 1)
    assert np.load(out)["features"].shape == (11, 16)


def test_words_tell_the_classes_of_lit_weights(paths, tmp_path, capsys):
    lit = families.make("LiT of BERT", tmp_path)
    lit.save(tmp_path / "lit.npz")
    words, file = ["a cat", "a dog"], tmp_path / "p.csv"
    command = ["predict", str(tmp_path / "lit.npz"), *paths, f"--csv={file}", "--labels"]
    assert main([*command, *words]) == 0
    for row, answer in zip(rows_of(file)[1:], classify(lit, paths, words), strict=True):
        assert (row[1], row[3]) == (answer[0][0], answer[1][0])
        assert float(row[2]) == pytest.approx(answer[0][1], abs=1e-5)
    assert main([*command[:-1], "--force"]) == 2
    assert "or vit-jax predict --labels" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["embed", "--out"], ["predict", "--csv"]])
def test_nothing_is_replaced_unasked(command, weights, paths, tmp_path, capsys):
    name, option = command
    file = tmp_path / "f.npz"
    table = tmp_path / "t.csv"
    table.write_text("path\n" + "\n".join(paths) + "\n")
    for target, message in {
        weights: "is read by this command",
        paths[0]: "is read by this command",
        str(table): "is read by this command",
        str(tmp_path / "images"): "is a folder",
    }.items():
        for more in ([], ["--force"]):
            assert main([name, weights, str(table), f"{option}={target}", *more]) == 2
            assert message in capsys.readouterr().err
    file.write_text("mine")
    assert main([name, weights, paths[0], f"{option}={file}"]) == 2
    assert "is there already: name another file, or replace it with --force" in (
        capsys.readouterr().err
    )
    assert file.read_text() == "mine"
    assert main([name, weights, paths[0], f"{option}={file}", "--force"]) == 0
    assert file.read_bytes() != b"mine"
