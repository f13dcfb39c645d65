"""Images without labels: of files, folders, patterns and tables."""

import cv2
import numpy as np
import pytest

from vit_jax import data
from vit_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
    for name in ("a/1.png", "a/b/2.jpg", "c/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), np.zeros((4, 5, 3), np.uint8))
    (tmp_path / "a" / "notes.txt").touch()
    return tmp_path


def names(root, found):
    return [path.removeprefix(f"{root}/") for path in found]


def test_folders_patterns_tables_and_files_are_listed_in_order(photos):
    (photos / "t.csv").write_text("Filename,age\nc/3,1\na/1.png,2\n")
    for wanted, expected in {
        ("a",): ["a/1.png", "a/b/2.jpg"],
        ("c", "a"): ["c/3.png", "a/1.png", "a/b/2.jpg"],
        ("**/*.png",): ["a/1.png", "c/3.png"],
        ("t.csv",): ["c/3.png", "a/1.png"],
        ("c/3.png", "nowhere.png"): ["c/3.png", "nowhere.png"],
        ("a/1.png", "t.csv", "a/1.png"): ["a/1.png", "c/3.png", "a/1.png", "a/1.png"],
    }.items():
        found, _ = data.list_images([f"{photos}/{name}" for name in wanted])
        assert names(photos, found) == expected


def test_what_is_left_out_or_guessed_is_said(photos):
    (photos / "t.csv").write_text("Filename,age\nc/3,1\n")
    _, notes = data.list_images([f"{photos}/{n}" for n in ("a", "t.csv", "c/3.png")])
    assert notes == [
        f"left out of {photos}/a: 1 (.txt)",
        "of t.csv the column 'Filename' is taken for the path",
        "of t.csv columns are not used: 'age'",
        "1 images have another name than in the table, as c/3.png (c/3)",
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("empty", "empty: no images there"),
        ("*.tif", "no images there"),
        ("", "the path of an image is empty"),
        ("*", r"no images there \(but 2 \(folders\)\)"),
        ("bad.csv", r"names the columns 'age, size', not path\)"),
    ],
)
def test_nothing_to_look_at_is_refused(photos, wanted, message):
    if wanted == "empty":
        (photos / "empty").mkdir()
    if wanted == "bad.csv":
        (photos / "bad.csv").write_text("age,size\n1,2\n")
    with pytest.raises(UserError, match=message):
        data.list_images([wanted and f"{photos}/{wanted}"])


def test_of_a_table_the_paths_count_and_nothing_else(photos):
    (photos / "t.csv").write_text("path,label,split\na/1.png,nan,train\ngone.png,,test\n")
    found, notes = data.list_images([f"{photos}/t.csv"])
    assert names(photos, found) == ["a/1.png", "gone.png"]
    assert notes == ["of t.csv columns are not used: 'label', 'split'"]


def test_of_what_matches_a_pattern_images_count_and_the_rest_is_said(photos):
    (photos / "top.png").write_bytes(b"")
    (photos / "readme.txt").touch()
    found, notes = data.list_images([f"{photos}/*"])
    assert names(photos, found) == ["top.png"]
    assert notes == [f"left out of {photos}/*: 2 (folders), 1 (.txt)"]
    found, notes = data.list_images([f"{photos}/**"])
    assert names(photos, found) == ["a/1.png", "a/b/2.jpg", "c/3.png", "top.png"]
    assert notes == [f"left out of {photos}/**: 2 (.txt)"]
