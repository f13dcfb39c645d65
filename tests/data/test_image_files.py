"""Folders of images: what counts as one, what is left out and said, and what can't be read."""

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from vit_jax.data import image_files, open_source, parse, remarks, train_batches
from vit_jax.data.source import HELD_OUT, similar_labels
from vit_jax.errors import UserError

PREPROCESS = parse("value_range(-1, 1)")


def make(root, classes=("a", "b"), count=3, size=4):
    """Real images, each one of its own."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            cv2.imwrite(str(root / name / f"{i:04}.png"), pixels)
    return root


def keys(root, split="train+test"):
    return sorted(open_source(str(root), split).keys)


def fails(message, root, split="train"):
    with pytest.raises(UserError, match=message) as error:
        open_source(str(root), split)
    assert "\n" not in str(error.value)


def said(root):
    """What is said of how the images were found, but for that some were held out."""
    told = remarks(*(open_source(str(root), split) for split in ("train", "test")))
    return [text for text in told if text != HELD_OUT]


# Which folders are splits, and which are classes.


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("Training", "Testing"), ("Train", "Test"), ("TRAIN", "VALID"), ("train", "valid")),
        *(("training_set", "test_set"), ("Training Data", "dev"), ("train", "holdout")),
        *(("train-images", "hold-out"), ("trainset", "Evaluation"), ("train", "eval")),
    ],
)
def test_splits_are_known_by_their_usual_names_in_any_case(tmp_path, train, test):
    make(tmp_path / train, count=4)
    make(tmp_path / test, count=2)
    for split, name, count in (("train", train, 8), ("test", test, 4)):
        source = open_source(str(tmp_path), split)
        assert source.labels == ("a", "b")
        assert [Path(source.describe(i)).parts[-3] for i in range(len(source))] == [name] * count
    for name in {train, test} - {"train"}:
        assert [text for text in said(tmp_path) if text.startswith(f"{name} is the split ")]


def test_exact_names_of_splits_need_no_word(tmp_path):
    for name in ("train", "test", "val", "validation"):
        make(tmp_path / name)
    assert said(tmp_path) == []
    assert len(open_source(str(tmp_path), "train+test+val+validation")) == 24


@pytest.mark.parametrize(
    "folders",
    [
        ("seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b"),
        ("images/train", "images/val", "labels/train", "labels/val"),
        ("cat/train", "cat/test", "dog/train", "dog/test"),
        ("train", "test"),
        ("Training", "Testing", "notes"),
    ],
)
def test_what_may_be_splits_or_classes_is_refused(tmp_path, folders):
    for folder in folders:
        make(tmp_path / folder, classes=["."])
    fails(r"it isn't plain whether the folders '.*' are splits or classes, expected", tmp_path)


def test_one_split_can_not_be_two_folders(tmp_path):
    for name in ("train", "Train", "test"):
        make(tmp_path / name)
    fails("both 'Train' and 'train' are named like the split 'train'; rename one", tmp_path)


def test_classes_may_hold_folders_of_other_names(tmp_path):
    for folder in ("cat/persian", "cat/siamese", "dog/pug"):
        make(tmp_path / folder, classes=["."])
    assert open_source(str(tmp_path), "train").labels == ("cat", "dog")


def test_one_wrapping_folder_is_entered_and_that_is_said(tmp_path):
    make(tmp_path / "plain", count=5)
    make(tmp_path / "whole" / "photos" / "all", count=5)
    (tmp_path / "whole" / "cover.jpg").touch()
    plain, wrapped = (open_source(str(tmp_path / name), "train") for name in ("plain", "whole"))
    assert list(wrapped.keys) == list(plain.keys)
    assert wrapped[0]["image"].shape == (4, 4, 3)
    photos = tmp_path / "whole" / "photos"
    assert said(tmp_path / "whole") == [
        f"{photos} was entered, the only folder there",
        f"{photos}/all was entered, the only folder there",
        f"left out in {photos.parent}: images beside the folders, 1; put them in folders of "
        "classes or remove them",
    ]
    (photos / "all" / "stray.jpg").touch()
    assert len(said(tmp_path / "whole")) == 4
    make(tmp_path / "nested" / "training_set" / "training_set")
    make(tmp_path / "nested" / "test_set" / "test_set")
    assert len(open_source(str(tmp_path / "nested"), "test")) == 6


def test_what_lies_beside_splits_and_classes_is_counted(tmp_path):
    make(tmp_path / "train", count=5)
    make(tmp_path / "test", count=5)
    make(tmp_path / "extra")
    make(tmp_path, classes=["unsorted"])
    make(tmp_path / "train", classes=["."], count=7)
    (tmp_path / "README.md").touch()
    (tmp_path / ".git").mkdir()
    assert said(tmp_path) == [
        f"left out in {tmp_path}: 1 (.md), 1 (hidden)",
        f"left out in {tmp_path}: folders beside the splits, 'extra', 'unsorted'",
        f"left out in {tmp_path}/train: images beside the folders, 7; put them in folders of "
        "classes or remove them",
    ]


def test_classes_of_nearly_the_same_name_are_said(tmp_path):
    make(tmp_path, classes=["Cat", "cat", "caf\u00e9", "cafe\u0301", "dog", "2", "2.0", "_2"])
    twos, cats, cafes = said(tmp_path)
    assert cats == "classes 'Cat' and 'cat' are nearly named alike: merge them if they are one"
    assert "'cafe\u0301' and 'caf\u00e9'" in cafes
    assert "'2' and '2.0' and '_2'" in twos
    assert len(open_source(str(tmp_path), "train").labels) == 8
    pairs = [f"{c}{i}" for i in range(100) for c in "Aa"]
    assert similar_labels(pairs)[5:] == ["and 95 more such classes"]


# Which files are images.


def test_a_file_is_what_its_content_says(tmp_path):
    root = make(tmp_path / "data", count=4)
    for i, ending in enumerate((".jpe", ".jfif", "", ".tmp")):
        (root / "a" / f"000{i}.png").rename(root / "a" / f"000{i}{ending}")
    for name in ("scan.dcm", "other.dcm", "LICENSE", "page.html", ".DS_Store", "Thumbs.db"):
        (root / "b" / name).write_bytes(b"no image")
    source = open_source(str(root), "train+test")
    assert len(source) == 8
    assert all(source[i]["image"].shape == (4, 4, 3) for i in range(8))
    assert said(root) == [
        f"left out in {root}: 2 (hidden), 1 (.html)",
        f"left out in {root}, as they are no images that can be read: 2 (.dcm), 1 (no ending); "
        "convert or remove them",
    ]


def test_only_files_of_unknown_kinds_are_opened(tmp_path, monkeypatch):
    root = make(tmp_path / "data", count=9)
    for i in range(9):
        (root / "a" / f"{i}.txt").touch()
    (root / "b" / "unknown.xyz").touch()
    opened = []
    opens = image_files.open_file
    monkeypatch.setattr(image_files, "open_file", lambda path: opened.append(path) or opens(path))
    open_source(str(root), "train")
    assert opened == [f"{root}/b/unknown.xyz"]


def test_many_kinds_of_files_are_told_in_one_line(tmp_path):
    root = make(tmp_path / "data", count=9)
    for i in range(20):
        (root / "a" / f"x.{i}").touch()
    (root / "a" / "y.\x1b[31m").touch()
    (text,) = said(root)
    assert "more kinds" in text
    assert text.isprintable()
    assert len(text) < 300


def test_a_class_folder_that_is_no_utf8_has_a_name_that_can_be_written(tmp_path):
    root = make(tmp_path / "data", count=5)
    os.rename(root / "a", os.fsencode(root) + b"/caf\xe9\n")
    source = open_source(str(root), "train+test")
    assert source.labels == ("b", "caf\\udce9\\n")
    assert json.loads(json.dumps(source.labels[1]).encode()) == source.labels[1]
    assert all(source[i]["image"].shape == (4, 4, 3) for i in range(10))
    assert {source.describe(i).encode().isascii() for i in range(10)} == {True}


# Names, links and permissions.


def test_names_that_are_no_unicode_are_read(tmp_path):
    root = make(tmp_path / "data")
    odd = os.fsencode(root / "a") + b"/\xff\xfe.png"
    os.rename(root / "a" / "0000.png", odd)
    source = open_source(str(root), "train+test")
    assert len(source) == 6
    assert all(source[i]["image"].shape == (4, 4, 3) for i in range(6))
    names = [source.describe(i) for i in range(6)]
    assert [name for name in names if name.encode() and name.endswith("a/\\udcff\\udcfe.png")]


def test_links_to_classes_and_images_are_followed(tmp_path):
    make(tmp_path / "elsewhere", classes=["x"])
    root = make(tmp_path / "data")
    (root / "c").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "a" / "link.png").symlink_to(root / "b" / "0000.png")
    source = open_source(str(root), "train+test")
    assert source.labels == ("a", "b", "c")
    assert len(source) == 10
    (tmp_path / "elsewhere" / "x" / "new.png").touch()
    assert len(keys(root)) == 11


@pytest.mark.parametrize("target", [".", "..", "../data", "loop", "other"])
def test_links_that_lead_in_a_circle_are_named(tmp_path, target):
    root = make(tmp_path / "data")
    (root / "loop").symlink_to(target)
    (root / "other").symlink_to("loop")
    fails("data/(loop|other): a link that leads (in a circle|nowhere)", root)


@pytest.mark.timeout(60)
def test_pipes_and_devices_are_counted_or_refused_and_never_read(tmp_path):
    root = make(tmp_path / "data", count=5)
    os.mkfifo(root / "a" / "pipe.png")  # Opening it would wait for ever.
    os.mkfifo(root / "a" / "pipe")
    (root / "a" / "null").symlink_to("/dev/null")
    assert len(open_source(str(root), "train+test")) == 10
    assert said(root) == [
        f"left out in {root}, as they are no images that can be read: 3 (pipes or devices); "
        "convert or remove them"
    ]
    os.unlink(root / "a" / "null")
    (root / "a" / "zero.png").symlink_to("/dev/zero")
    (root / "b" / "to_pipe.png").symlink_to("../a/pipe")
    (root / "t.csv").write_text("path,label\na/zero.png,a\nb/to_pipe.png,b\na/pipe.png,a\n")
    for dataset, count in ((root, 2), (root / "t.csv", 3)):
        source = open_source(str(dataset), "train+test")
        refused = []
        for i in range(len(source)):
            try:
                source[i]
            except UserError as error:
                refused.append(str(error))
        assert len(refused) == count
        assert all("can't be read (not a regular file); expected" in text for text in refused)


def test_links_in_a_circle_below_a_class_are_not_followed(tmp_path):
    root = make(tmp_path / "data")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "self").symlink_to("self")
    assert len(keys(root)) == 6
    assert "1 (links that lead nowhere), 1 (links to folders)" in said(root)[0]


def test_a_class_that_is_a_broken_link_is_named(tmp_path):
    root = make(tmp_path / "data")
    (root / "c").symlink_to("nowhere")
    fails(r"data/c: a link that leads nowhere \(No such file", root)


def test_a_folder_without_permission_is_named():
    """As a person without rights, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        root = make(Path(folder) / "data")
        os.chmod(folder, 0o755)
        (root / "b").chmod(0o000)
        stack.callback((root / "b").chmod, 0o700)
        if os.geteuid() == 0:
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        fails(r"data/b: can't be opened \(Permission denied\), expected a readable folder", root)


# Images that can't be read, while training.


def damaged_folder(root):
    """A link into nothing, a truncated JPEG, and one that will vanish."""
    make(root, count=8)
    (root / "a" / "broken.png").symlink_to("nowhere.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    (root / "b" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("a/broken.png", "can't be read .No such file or directory."),
        ("b/half.jpg", "truncated or damaged JPEG file"),
    ],
)
def test_an_unreadable_file_stops_the_training_and_is_named(tmp_path, bad, reason):
    root = damaged_folder(tmp_path / "data")
    other = {"a/broken.png", "b/half.jpg"} - {bad}
    (root / other.pop()).unlink()
    source = open_source(str(root), "train+test")
    batches = train_batches(source, PREPROCESS, batch_size=4, seed=0)
    with pytest.raises(UserError, match=f"{bad}: {reason}") as error:
        list(itertools.islice(batches, 10))
    assert "\n" not in str(error.value)


def test_a_file_that_vanishes_while_training_is_named_or_skipped(tmp_path, caplog):
    for corrupt in ("error", "skip"):
        root = make(tmp_path / corrupt, count=20)
        source = open_source(str(root), "train+test")
        with contextlib.closing(
            train_batches(source, PREPROCESS, batch_size=4, seed=0, prefetch=1, corrupt=corrupt)
        ) as batches:
            next(batches)
            (root / "b" / "0007.png").unlink()
            if corrupt == "skip":
                assert len(list(itertools.islice(batches, 20))) == 20
            else:
                with pytest.raises(UserError, match=r"b/0007\.png: can't be read \(No such file"):
                    list(itertools.islice(batches, 20))
    assert [r.message for r in caplog.records if "0007.png" in r.message]


# Size.


def tiny_images(root, count):
    """That many real PNGs of 4x4 pixels in 100 classes, each with pixels of its own."""
    rng = np.random.default_rng(0)
    for label in range(100):
        folder = root / f"class_{label:03}"
        folder.mkdir(parents=True)
        for i in range(count // 100):
            data = cv2.imencode(".png", rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))[1]
            (folder / f"image_{i:06}.png").write_bytes(data.tobytes())


def seconds_to_first_batch(root):
    begin = time.monotonic()
    source = open_source(str(root), "train")
    with contextlib.closing(train_batches(source, PREPROCESS, batch_size=128, seed=0)) as batches:
        next(batches)
        return time.monotonic() - begin


@pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_many_images_open_at_once_and_take_no_memory(tmp_path, count):
    root = tmp_path / "data"
    tiny_images(root, count)
    seconds_to_first_batch(make(tmp_path / "warm", count=5))  # starts what is started once
    # The best of some: the machine may be busy with other things.
    assert min(seconds_to_first_batch(root) for _ in range(5)) < 1

    # A process of its own, as memory once used is not given back.
    done = subprocess.run(
        [sys.executable, __file__, root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    epochs = json.loads(done.stdout)
    assert len(epochs) == 3
    assert epochs[-1] - epochs[0] < 10, epochs  # MB


def memory_after_each_epoch(root):
    """The most memory used so far, in MB, after each of three epochs."""
    source = open_source(root, "train")
    batches = train_batches(source, PREPROCESS, batch_size=100, seed=0)
    for _ in range(3):
        for _ in range(len(source) // 100):
            next(batches)
        yield resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_names_take_less_memory_than_a_list():
    names = [f"n{c:08}/n{c:08}_{i:05}.JPEG" for c in range(100) for i in range(1281)]
    packed = image_files.packed(names)
    memory = packed.nbytes + sum(len(name) + 1 for name in names)
    assert memory < 0.6 * sum(8 + sys.getsizeof(name) for name in names)
    assert packed[100_000] == names[100_000]


if __name__ == "__main__":
    print(json.dumps(list(memory_after_each_epoch(sys.argv[1]))))
