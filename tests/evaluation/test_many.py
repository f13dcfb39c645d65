"""Many images into a file: predictions and features."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import families
from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.evaluation.many import write_features, write_predictions_csv


def write_images(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(count):
        image = rng.integers(0, 256, (18, 20 + i % 3, 3), np.uint8)
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
    expected = ["picture", "prediction", "probability", "prediction 2", "probability 2", "error"]
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
    assert header[:4] == ["picture", "prediction", "probability", "probability of =1+1"]
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
    assert len(write_predictions_csv(vit, paths, tmp_path / "none.csv")[1]) == 11


def test_what_was_stopped_goes_on_and_other_wishes_begin_anew(vit, paths, tmp_path):
    class Stopped(Exception):
        pass

    def stop(done, total):
        if done >= 8:
            raise Stopped

    write_predictions_csv(vit, paths, tmp_path / "whole.csv", batch_size=4)
    with pytest.raises(Stopped):
        write_predictions_csv(vit, paths, tmp_path / "p.csv", batch_size=4, progress=stop)
    assert not (tmp_path / "p.csv").exists()
    (partial,) = tmp_path.glob("p.csv.*.partial")
    partial.write_bytes(partial.read_bytes()[:-7])  # Half a row.
    other = dataclasses.replace(vit, preprocess="resize(16)|value_range(0, 1)")
    assert write_predictions_csv(other, paths, tmp_path / "p.csv")[0] == 0
    assert (tmp_path / "p.csv").read_bytes() != (tmp_path / "whole.csv").read_bytes()
    assert write_predictions_csv(vit, paths, tmp_path / "p.csv") == (7, [])
    parts, whole = ([row[:2] for row in rows_of(tmp_path / n)] for n in ("p.csv", "whole.csv"))
    assert parts == whole
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.ci
def test_thousands_are_predicted_in_flat_memory_and_once_each_however_often_it_is_killed(
    vit, tmp_path
):
    paths = write_images(tmp_path / "images", 5000)
    vit.save(tmp_path / "w.npz")
    command = [sys.executable, "-m", "vit_jax", "predict", tmp_path / "w.npz"]
    command += [tmp_path / "images", f"--csv={tmp_path / 'p.csv'}", "--top=1"]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = sum(len(f.read_bytes()) for f in tmp_path.glob("p.csv.*.partial"))
        while sum(len(f.read_bytes()) for f in tmp_path.glob("p.csv.*.partial")) < seen + 30_000:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    script = "import resource, sys; from vit_jax.cli import main; status = main(sys.argv[1:]); "
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", script, *command[3:]], check=True, capture_output=True, text=True
    )
    assert "5,000 images" in done.stdout
    assert "of them from before" in done.stdout
    assert [row[0] for row in rows_of(tmp_path / "p.csv")[1:]] == paths
    assert int(done.stdout.split()[-1]) < 1200  # MB, most of it JAX's and its compiler's.


def test_features_are_written_for_numpy_and_for_arrow(vit, paths, tmp_path):
    (tmp_path / "images" / "00003.png").write_bytes(b"\x89PNG")
    readable = [path for path in paths if "00003" not in path]
    for what, shape in {"pooled": (16,), "class": (16,), "patches": (16, 16)}.items():
        file = tmp_path / f"{what}.npz"
        (mistake,) = write_features(vit, paths, file, what=what, batch_size=4)
        assert "00003.png" in mistake
        found = np.load(file)
        assert found["features"].shape == (11, *shape)
        assert found["pictures"].tolist() == paths
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
        assert (table["picture"], table["error"]) == (paths, found["errors"].tolist())


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
