"""Any source, written as an array_record TFDS data set."""

import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.images import listed, write_photos
from vit_jax.data import open_source, prepare_tfds
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=6, test=3)


def assert_same(one, other):
    assert (len(one), one.labels, one.channels) == (len(other), other.labels, other.channels)
    for i in range(len(one)):
        np.testing.assert_array_equal(one[i]["image"], other[i]["image"])
        np.testing.assert_array_equal(one[i]["label"], other[i]["label"])


def test_files_are_kept_byte_by_byte_in_order_with_classes_and_splits(photos, tmp_path):
    target = tmp_path / "out" / "My photos.tfds"
    assert prepare_tfds(str(photos), str(target)) == {"train": 18, "test": 9}
    for split in ("train", "test"):
        source = open_source(str(target), split)
        stored = [source.stored(i)[0] for i in range(len(source))]
        assert stored == [file.read_bytes() for file in listed(photos, split)]
        assert_same(source, open_source(str(photos), split))
    assert os.listdir(tmp_path / "out") == ["My photos.tfds"]  # nothing temporary is left
    assert "tensorflow" not in sys.modules


def test_tfds_itself_reads_it(photos, tmp_path):
    prepare_tfds(str(photos), str(tmp_path / "p"))
    builder = tfds.builder_from_directory(str(tmp_path / "p"))
    assert builder.info.features["label"].names == ["bee", "cat", "dog"]
    examples = list(builder.as_data_source(split="test"))
    labels = [e["label"] for e in examples]
    assert labels == [0] * 3 + [1] * 3 + [2] * 3
    assert all(e["image"].ndim == 3 for e in examples)


def test_pixels_lose_nothing(tmp_path):
    prepare_tfds("digits", str(tmp_path / "digits"))
    for split in ("train", "test"):
        assert_same(open_source(str(tmp_path / "digits"), split), open_source("digits", split))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 7, 3), np.uint8)
    np.savez(tmp_path / "x.npz", train_images=pixels, train_labels=np.arange(9) % 2)
    prepare_tfds(str(tmp_path / "x.npz"), str(tmp_path / "colours"))
    assert_same(
        open_source(str(tmp_path / "colours"), "train"),
        open_source(str(tmp_path / "x.npz"), "train"),
    )


def test_several_labels_and_a_held_out_fifth_are_kept(photos, tmp_path):
    lines = [f"{f},{f.parent.name};all" for f in listed(photos, "train")]
    lines[3] = lines[3].partition(",")[0] + ","
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["path,labels", *lines]))
    assert prepare_tfds(str(table), str(tmp_path / "p"), seed=5) == {"train": 14, "test": 4}
    for split in ("train", "test"):
        assert_same(open_source(str(tmp_path / "p"), split), open_source(str(table), split, seed=5))


def test_validation_is_written_once_and_still_serves_as_test(photos, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train").symlink_to(photos / "train")
    (tmp_path / "source" / "val").symlink_to(photos / "test")
    assert prepare_tfds(str(tmp_path / "source"), str(tmp_path / "p")) == {"train": 18, "val": 9}
    assert len(open_source(str(tmp_path / "p"), "test")) == 9


def test_a_prepared_data_set_can_be_prepared_again(photos, tmp_path):
    prepare_tfds(str(photos), str(tmp_path / "one"))
    prepare_tfds(str(tmp_path / "one"), str(tmp_path / "two"))
    assert_same(open_source(str(tmp_path / "two"), "train"), open_source(str(photos), "train"))


def test_a_damaged_image_stops_it_or_is_left_out(tmp_path, caplog):
    root = write_photos(tmp_path / "photos", train=3, test=1)
    (root / "train" / "cat" / "001.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cat/001\.jpg: not an image"):
        prepare_tfds(str(root), str(tmp_path / "p"))
    assert os.listdir(tmp_path) == ["photos"]
    assert prepare_tfds(str(root), str(tmp_path / "p"), corrupt="skip") == {"train": 8, "test": 3}
    assert "001.jpg" in caplog.text


def test_empty_splits_are_left_out(photos, tmp_path):
    # Two images a class: none is held out.
    for cls in ("a", "b"):
        write = tmp_path / "few" / cls
        write.mkdir(parents=True)
        for i in range(2):
            (write / f"{i}.jpg").write_bytes(listed(photos, "train")[i].read_bytes())
    assert prepare_tfds(str(tmp_path / "few"), str(tmp_path / "p")) == {"train": 4}
    root = write_photos(tmp_path / "photos", train=3, test=1)
    for file in listed(root, "test"):
        file.write_bytes(b"no image")
    options = {"corrupt": "skip"}
    assert prepare_tfds(str(root), str(tmp_path / "q"), **options) == {"train": 9}
    for file in listed(root, "train"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image that can be read") as error:
        prepare_tfds(str(root), str(tmp_path / "r"), **options)
    assert "\n" not in str(error.value)


def test_what_is_there_is_not_touched(photos, tmp_path):
    with pytest.raises(UserError, match="is there already; remove it or choose another folder"):
        prepare_tfds(str(photos), str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be made"):
        prepare_tfds(str(photos), str(tmp_path / "file" / "p"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((10, 8, 8, 12), np.uint16), "images of 12 channels, expected 1 or 3"),
        (np.zeros((10, 8, 8, 3), np.float32), r"\[0\] is of float32, expected 8 or 16 bits"),
    ],
)
def test_what_png_cannot_hold_is_refused(images, message, tmp_path):
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10) % 2)
    with pytest.raises(UserError, match=message):
        prepare_tfds(str(tmp_path / "a.npz"), str(tmp_path / "out"))


def test_16_bits_are_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 2**16, (10, 8, 8, 3), np.uint16)
    np.savez(tmp_path / "a.npz", images=values, labels=np.arange(10) % 2)
    prepare_tfds(str(tmp_path / "a.npz"), str(tmp_path / "out"))
    for split in ("train", "test"):
        source = open_source(str(tmp_path / "out"), split)
        assert_same(source, open_source(str(tmp_path / "a.npz"), split))
