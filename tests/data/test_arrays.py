"""Images in memory and .npz files."""

import io
import zipfile

import numpy as np
import pytest

from vit_jax.data import data_fingerprint, from_arrays, open_source, remarks
from vit_jax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 5, 6, 3), np.uint8)
LABELS = np.arange(10) % 3


def fails(message, call, *args, **kwargs):
    with pytest.raises(UserError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_arrays_are_read_as_they_are():
    source = from_arrays(IMAGES, LABELS, names=["a", "b", "c"])
    assert (len(source), source.labels, source.channels) == (10, ("a", "b", "c"), 3)
    np.testing.assert_array_equal(source[4]["image"], IMAGES[4])
    assert source[4]["label"] == 1
    assert source.describe(4) == "arrays[4]"
    assert from_arrays(IMAGES[..., 0], LABELS)[0]["image"].shape == (5, 6, 1)


def test_images_may_differ_in_size_and_labels_be_names_or_columns():
    images = [IMAGES[0], IMAGES[1, :3], IMAGES[2]]
    source = from_arrays(images, ["cat", "dog", "cat"])
    assert source.labels == ("cat", "dog")
    assert source[1]["image"].shape == (3, 6, 3)
    assert source.label_ids.tolist() == [0, 1, 0]
    several = from_arrays(images, [[1, 1], [0, 1], [0, 0]], names=["x", "y"])
    assert [several[i]["label"].tolist() for i in range(3)] == [[1, 1], [0, 1], [0, 0]]
    assert from_arrays(IMAGES, LABELS[:, None]).label_ids.tolist() == LABELS.tolist()


def test_the_fingerprint_tells_other_pixels():
    one = data_fingerprint(from_arrays(IMAGES, LABELS))
    assert one == data_fingerprint(from_arrays(list(IMAGES), LABELS))
    assert one != data_fingerprint(from_arrays(IMAGES[::-1], LABELS))
    assert one != data_fingerprint(from_arrays(IMAGES, LABELS[::-1]))


def test_an_npz_has_splits_or_gets_them(tmp_path):
    split, whole = str(tmp_path / "split.npz"), str(tmp_path / "whole.npz")
    np.savez(
        split, train_images=IMAGES, train_labels=LABELS, val_images=IMAGES[:4] // 2,
        val_labels=LABELS[:4, None], names=["a", "b", "c"],
    )  # fmt: skip
    train, test = open_source(split, "train"), open_source(split, "test")
    assert (len(train), len(test), train.labels) == (10, 4, ("a", "b", "c"))
    np.testing.assert_array_equal(test[2]["image"], IMAGES[2] // 2)
    assert test.describe(2) == f"{split} val[2]"
    both = open_source(split, "test+train[:2]")
    np.testing.assert_array_equal(both[0]["image"], IMAGES[0] // 2)
    np.testing.assert_array_equal(both[5]["image"], IMAGES[1])
    np.savez(whole, images=IMAGES, labels=LABELS)
    train, test = open_source(whole, "train"), open_source(whole, "test")
    assert sorted([*train.keys, *test.keys]) == list(range(10))


def test_arrays_of_other_numbers_and_channels_stay_what_they_are():
    for images in (IMAGES / 255, IMAGES.astype(np.uint16), np.zeros((10, 6, 7, 12), np.float16)):
        source = from_arrays(images, LABELS)
        assert source.channels == images.shape[3]
        assert source[3]["image"].dtype == images.dtype
        np.testing.assert_array_equal(source[3]["image"], images[3])


def test_mistakes_in_arrays_are_named(tmp_path):
    fails("10 images and 9 labels", from_arrays, IMAGES, LABELS[:9])
    fails("0 images and 0 labels", from_arrays, IMAGES[:0], LABELS[:0])
    fails("type complex64.*expected numbers", from_arrays, IMAGES.astype(np.complex64), LABELS)
    fails("first of shape .3, 32, 32.", from_arrays, np.zeros((2, 3, 32, 32), np.uint8), [0, 1])
    fails("none of the 2 classes", from_arrays, IMAGES, LABELS, names=["a", "b"])
    fails("labels of type float64", from_arrays, IMAGES, LABELS / 2)
    fails("from 0 to 2.*expected .n, 2. of 0 and 1", from_arrays, IMAGES[:2], [[0, 2], [1, 1]])
    path = str(tmp_path / "x.npz")
    np.savez(path, pixels=IMAGES)
    fails("holds pixels, expected train_images", open_source, path, "train")
    np.savez(path, train_images=IMAGES)
    fails("no train_labels beside train_images", open_source, path, "train")
    np.savez(path, images=np.array([object()]), labels=[0])
    fails("can't be read", open_source, path, "train")
    (tmp_path / "x.npz").write_bytes(b"no zip")
    fails("can't be read", open_source, path, "train")


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (
            [0, 1, 10**9],
            None,
            "labels count to 1,000,000,000 for 3 images, expected 0 to the number",
        ),
        (
            np.array([0, 1, 2**63], np.uint64),
            None,
            "labels count to 9,223,372,036,854,775,808 for 3",
        ),
        ([0, 1, 10**6], None, "labels count to 1,000,000 for 3 images"),
        ([0, 1, 2**63], ["a", "b"], "none of the 2 classes"),
        ([0, 0, 0], None, "only one class .'0'., expected two or more"),
        (["cat", "cat", "cat"], None, "only one class .'cat'"),
        ([0, 0, 0], [], "none of the 0 classes"),
        ([0, 1, 1], ["cat", "cat"], "2 classes are named 'cat', expected a name for each"),
        ([0, 0, 0], "cat", "only one class"),
        (["cat", "dog", np.nan], None, "labels are 'nan', which is none"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, names, message):
    fails(message, from_arrays, IMAGES[:3], labels, names=names)
    path = str(tmp_path / "x.npz")
    np.savez(path, images=IMAGES[:3], labels=labels, **({} if names is None else {"names": names}))
    fails(message, open_source, path, "train")


def test_classes_without_an_image_are_said():
    source = from_arrays(IMAGES, [0, 4, 4, 4, 4, 1, 1, 1, 1, 1])
    assert remarks(source) == ["without an image to train on: '2', '3'"]
    assert len(from_arrays(IMAGES, [0, 999, *[1] * 8]).labels) == 1000
    named = from_arrays(IMAGES, LABELS, names=list(map(str, range(100_000))))
    assert remarks(named)[0].endswith("'7' and 99,992 more")


def test_names_and_labels_may_be_bytes():
    source = from_arrays(IMAGES[:2], np.array([b"cat", b"d\xff"]))
    assert source.labels == ("cat", "d\\xff")
    assert from_arrays(IMAGES, LABELS, names=np.array([b"a", b"b", b"c"])).labels == ("a", "b", "c")


def test_an_npz_compressed_another_way_than_by_numpy_is_refused(tmp_path):
    """4 kB of bzip2 make gigabytes."""
    path = tmp_path / "x.npz"
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", method) as file:
            for name, array in {"images": IMAGES, "labels": LABELS}.items():
                np.save(data := io.BytesIO(), array)
                file.writestr(f"{name}.npy", data.getvalue())
        fails("images.npy is compressed another way than by savez", open_source, str(path), "train")


def test_damaged_files_and_impossible_shapes_are_one_line(tmp_path):
    path = str(tmp_path / "x.npz")
    np.savez_compressed(path, images=IMAGES, labels=LABELS)
    whole = (tmp_path / "x.npz").read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], whole[:200] + b"xxx" + whole[203:]):
        (tmp_path / "x.npz").write_bytes(damaged)
        fails(r"x\.npz: can't be read \(.+\), expected an .npz", open_source, path, "train")
    for images, labels, message in (
        (IMAGES.reshape(10, -1), LABELS, "expected numbers of one type, .n, h, w"),
        (IMAGES[:0], LABELS[:0], "0 images and 0 labels"),
        (IMAGES[:, :0], LABELS, "expected numbers of one type, .n, h, w"),
        (IMAGES[..., None], LABELS, "expected numbers of one type, .n, h, w"),
        (IMAGES, np.zeros((10, 2, 2), int), r"labels of shape \(10, 2, 2\), expected"),
        (IMAGES, LABELS[:, None][:, :0], r"labels of shape \(10, 0\), expected"),
        (IMAGES, np.array(3), r"labels of shape \(\), expected"),
        (np.array(3), LABELS, "and n images"),
    ):
        np.savez(path, images=images, labels=labels)
        fails(message, open_source, path, "train")
