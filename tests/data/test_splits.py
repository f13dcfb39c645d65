"""Data sets by name, folders of images, and splits."""

import os
import pydoc
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data import data_fingerprint, open_source
from vit_jax.errors import UserError


def make_folder(root, counts, suffix=".jpg"):
    """Empty files: opening a folder must not read them."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            (root / folder / f"{i:03}{suffix}").touch()
    return str(root)


def fails(message, dataset, split="train"):
    with pytest.raises(UserError, match=message) as error:
        open_source(dataset, split)
    assert "\n" not in str(error.value)


# Digits.


def test_digits_are_1437_and_360_images_of_ten_classes():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.labels == tuple("0123456789")
    assert train.channels == 1
    example = train[0]
    assert example["image"].shape == (8, 8, 1)
    assert example["image"].dtype == np.uint8
    assert example["label"] == train.label_ids[0]
    assert re.fullmatch(r"digits\[\d+\]", train.describe(0))


def test_digits_are_split_alike_by_class_and_share_no_image():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert not set(train.keys) & set(test.keys)
    both = Counter(train.label_ids.tolist()) + Counter(test.label_ids.tolist())
    for label, count in Counter(test.label_ids.tolist()).items():
        assert abs(count - both[label] / 5) < 1.01


def test_digits_use_the_whole_range_of_grey_levels():
    source = open_source("digits", "test")
    levels = np.unique([source[i]["image"] for i in range(len(source))])
    np.testing.assert_array_equal(levels, np.round(np.arange(17) * 255 / 16))


# Folders.


def test_train_and_test_folders_become_splits(tmp_path):
    folder = make_folder(tmp_path, {"train/b": 3, "train/a": 2, "test/b": 1})
    train, test = open_source(folder, "train"), open_source(folder, "test")
    assert train.labels == test.labels == ("a", "b")
    assert train.label_ids.tolist() == [0, 0, 1, 1, 1]
    assert test.label_ids.tolist() == [1]
    assert test.label_ids.dtype == np.int32
    assert test.describe(0) == os.path.join(folder, "test/b/000.jpg")


@pytest.mark.parametrize("name", ["val", "validation"])
def test_validation_folders_serve_as_test(tmp_path, name):
    folder = make_folder(tmp_path, {"train/a": 1, "train/b": 1, f"{name}/a": 4})
    test = open_source(folder, "test")
    assert (len(test), len(open_source(folder, name))) == (4, 4)
    assert test.notes[-1] == f"no test split of its own: the split {name} is taken for it"
    assert not open_source(folder, name).notes


def test_a_test_folder_wins_over_a_validation_folder(tmp_path):
    folder = make_folder(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 4, "test/a": 2})
    assert len(open_source(folder, "test")) == 2
    assert len(open_source(folder, "val")) == 4
    assert not open_source(folder, "test").notes


def test_a_folder_with_only_a_test_part_can_be_evaluated(tmp_path):
    folder = make_folder(tmp_path, {"val/a": 1, "val/b": 1})
    assert len(open_source(folder, "test")) == 2
    fails("has no 'train' images, only 'val', 'test': add the folder .*train, or choose", folder)


def test_a_folder_with_only_a_training_part_says_what_to_do(tmp_path):
    folder = make_folder(tmp_path, {"train/a": 5, "train/b": 5})
    fails(r"has no 'test' images, only 'train': .* 'train\[80%:\]' to test on", folder, "test")
    assert len(open_source(folder, "train[80%:]")) == 2


def test_all_images_are_there_even_if_none_can_be_held_out(tmp_path):
    folder = make_folder(tmp_path, {"a": 1, "b": 1})
    assert len(open_source(folder, "train+test")) == 2


def test_a_class_may_be_called_train(tmp_path):
    folder = make_folder(tmp_path, {"train": 5, "plane": 5})
    assert open_source(folder, "train").labels == ("plane", "train")


def test_a_plain_folder_is_split_alike_by_class(tmp_path):
    folder = make_folder(tmp_path, {"a": 50, "b": 10, "c": 1})
    train, test = open_source(folder, "train"), open_source(folder, "test")
    assert np.bincount(train.label_ids).tolist() == [40, 8, 1]
    assert np.bincount(test.label_ids).tolist() == [10, 2]
    assert sorted([*train.keys, *test.keys]) == sorted(open_source(folder, "train+test").keys)


def test_that_split_depends_on_the_seed_and_the_names_alone(tmp_path):
    one = make_folder(tmp_path / "one", {"a": 50, "b": 50})
    two = make_folder(tmp_path / "two", {"b": 50, "a": 50})
    keys = [list(open_source(d, "test", seed=s).keys) for d, s in [(one, 0), (two, 0), (one, 1)]]
    assert keys[0] == keys[1] != keys[2]


def test_extensions_in_any_case_nested_folders_and_hidden_files(tmp_path):
    make_folder(tmp_path, {"a": 1, "a/deep/er": 1, "a/.thumbs": 3, ".git": 2, "b": 1})
    for name in [
        "x.JPG",
        "y.Jpeg",
        "z.PNG",
        "w.webp",
        "v.bmp",
        "u.gif",
        ".hidden.jpg",
        "notes.txt",
    ]:
        (tmp_path / "a" / name).touch()
    source = open_source(str(tmp_path), "train+test")
    assert source.labels == ("a", "b")
    names = {key.removeprefix("a/") for key in source.keys if key.startswith("a/")}
    assert names == {
        "x.JPG", "y.Jpeg", "z.PNG", "w.webp", "v.bmp", "u.gif", "000.jpg", "deep/er/000.jpg",
    }  # fmt: skip


def test_opening_a_folder_reads_no_file(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, {"train/a": 20, "train/b": 20})

    def watched(function):
        def call(path, *args, **kwargs):
            assert not str(path).endswith(".jpg"), "a file was opened or examined"
            return function(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("os.stat", "os.lstat", "builtins.open"):
            patch.setattr(name, watched(pydoc.locate(name)))
        assert len(open_source(folder, "train")) == 40


def test_real_folders_open_and_read(shared):
    source = open_source(str(shared / "images" / "flowers"), "train")
    assert (len(source), len(source.labels), source.channels) == (500, 5, 3)
    example = source[123]
    assert example["image"].shape[2] == 3
    assert source.labels[example["label"]] in source.describe(123)


def test_mistakes_in_folders_are_named(tmp_path, monkeypatch):
    def folder(name, counts):
        return make_folder(tmp_path / name, counts)

    (tmp_path / "file").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "x.jpg").touch()
    fails("no such folder", str(tmp_path / "nowhere"))
    fails("can't be opened", str(tmp_path / "file"))
    fails("no class folders .found 1 images", str(tmp_path / "bare"))
    fails("only one class .'cat'", folder("one", {"cat": 3}))
    fails("hollow: no images in this class", folder("empty", {"full": 3, "hollow": 0}))
    fails(
        "class 'dog' is not among the training classes",
        folder("extra", {"train/a": 1, "train/b": 1, "test/dog": 1}),
        "test",
    )
    fails(
        "'test' has 0 images; choose a larger part, or add images",
        folder("few", {"a": 1, "b": 1}),
        "test",
    )

    def denied(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    fails("can't be opened .Permission denied.", str(tmp_path / "bare"))


def test_an_unknown_name_gets_the_known_ones_and_the_nearest():
    fails("unknown dataset 'digit'.*'digits'.*path of a folder.*mean 'digits'", "digit")


# Splits.


@given(percent=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_percentages_cut_without_loss_and_round_to_the_nearest(percent):
    whole = open_source("digits", "train")
    counts = []
    for part in (f"train[:{percent}%]", f"train[{percent}%:]"):
        try:
            counts.append(len(open_source("digits", part)))
        except UserError:  # an empty part
            counts.append(0)
    assert sum(counts) == len(whole)
    assert abs(counts[0] - percent * len(whole) / 100) <= 0.5


@pytest.mark.parametrize(
    ("split", "indices"),
    [
        ("train[100:200]", range(100, 200)),
        ("train[:7]", range(7)),
        ("train[-5:]", range(1432, 1437)),
        ("train[50%:]", range(718, 1437)),
        (" train[ 1 : 3 ] ", range(1, 3)),
        ("train[:2]+train[4:6]", [0, 1, 4, 5]),
        ("train[:]", range(1437)),
    ],
)
def test_parts_are_slices_in_order(split, indices):
    whole, part = open_source("digits", "train"), open_source("digits", split)
    assert list(part.keys) == [whole.keys[i] for i in indices]
    np.testing.assert_array_equal(part.label_ids, whole.label_ids[list(indices)])
    np.testing.assert_array_equal(part[-1]["image"], whole[indices[-1]]["image"])


def test_sums_of_splits_hold_all_images():
    source = open_source("digits", "train+test")
    assert sorted(source.keys) == list(range(1797))


@pytest.mark.parametrize(
    "split",
    ["", "tran", "train[", "train[5]", "train[:5%%]", "train[a:b]", "train++test", "train[::2]"],
)
def test_bad_splits_get_the_known_ones(split):
    fails("unknown split .*'train', 'test'", "digits", split)


def test_an_empty_part_is_an_error():
    fails(r"split 'train\[:0%\]' is empty", "digits", "train[:0%]")
    fails(r"'train' has 1437 images", "digits", "train[5000:]")


@given(st.text(max_size=30))
@settings(deadline=None)
def test_any_split_opens_or_is_a_user_error(split):
    message = ""
    try:
        assert len(open_source("digits", split)) > 0
    except UserError as error:
        message = str(error)
    assert "\n" not in message


# Fingerprints.


def test_the_fingerprint_changes_with_names_and_labels_but_not_with_the_place(tmp_path):
    def fingerprint(name, counts):
        return data_fingerprint(open_source(make_folder(tmp_path / name, counts), "train"))

    one = fingerprint("one", {"a": 10, "b": 10})
    assert re.fullmatch("[0-9a-f]{16}", one)
    assert one == fingerprint("same", {"a": 10, "b": 10})
    others = [fingerprint("more", {"a": 10, "b": 11}), fingerprint("name", {"a": 10, "c": 10})]
    assert len({one, *others}) == 3


def test_the_digits_stay_the_digits():
    assert data_fingerprint(open_source("digits", "train")) == "b662cb0fe0316e45"
