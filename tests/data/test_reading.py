"""Images that can't be read are named, left out, or stop the run, as was asked."""

import logging
from dataclasses import replace

import cv2
import numpy as np
import pytest

from tests.data.test_pipeline import IDENTITY, PLAIN, assert_same, first, numbered, shown
from vit_jax.data import eval_batches, open_source, parse, train_batches
from vit_jax.errors import UserError


def test_an_unreadable_image_is_a_one_line_user_error(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "train" / name / "good.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "train" / "b" / "bad.jpg").write_text("no image")
    source = open_source(str(tmp_path), "train")
    for batches in (
        eval_batches(source, IDENTITY, batch_size=2),
        train_batches(source, IDENTITY, batch_size=2, seed=0),
    ):
        with pytest.raises(UserError, match=r"bad\.jpg: not an image") as error:
            first(5, batches)
        assert type(error.value) is UserError
        assert "\n" not in str(error.value)


def test_skipping_logs_each_unreadable_image_once(caplog):
    source = numbered(10, unreadable={3, 4})
    with caplog.at_level(logging.WARNING):
        first(10, train_batches(source, IDENTITY, batch_size=5, seed=0, corrupt="skip"))
    messages = sorted(record.message for record in caplog.records)
    assert messages == ["Skipping image 3: damaged", "Skipping image 4: damaged"]


def test_in_training_the_next_readable_image_takes_its_place():
    whole = first(8, train_batches(numbered(10), IDENTITY, batch_size=5, seed=0))
    options = {"batch_size": 5, "seed": 0, "corrupt": "skip"}
    damaged = numbered(10, unreadable={3, 4, 9})
    instead = {3: 5, 4: 5, 9: 0}
    expected = [[instead.get(i, i) for i in row] for row in shown(whole)]
    assert shown(first(8, train_batches(damaged, IDENTITY, threads=1, **options))) == expected
    resumed = first(5, train_batches(damaged, IDENTITY, threads=4, start_step=3, **options))
    assert shown(resumed) == expected[3:]
    for batch in resumed:
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 2)


def test_its_place_is_taken_as_if_it_had_never_been_there(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "good.jpg"), pixels)
    file = tmp_path / "b" / "good.jpg"
    damaged = file.read_bytes()
    damaged = damaged.replace(b"\xff\xc4", b"\xff\xfe")  # Of a good header, but without tables.
    (tmp_path / "b" / "bad.jpg").write_bytes(damaged)
    source = open_source(str(tmp_path), "train+test")
    options = {"batch_size": 3, "seed": 0, "corrupt": "skip"}
    whole = first(6, train_batches(source, parse("inception_crop(8)|flip"), **options))
    # That it can't be read is news in the first of these batches, and known in the others.
    for step in (1, 3):
        resumed = train_batches(source, parse("inception_crop(8)|flip"), start_step=step, **options)
        assert_same(first(6 - step, resumed), whole[step:])


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_in_evaluation_it_is_not_counted(batch_size):
    source = numbered(10, unreadable={0, 1, 7})
    batches = list(eval_batches(source, IDENTITY, batch_size=batch_size, corrupt="skip"))
    mask = np.concatenate([b["mask"] for b in batches])
    index = np.concatenate([b["index"] for b in batches])
    assert index[:10].tolist() == list(range(10))
    assert set(index[mask]) == {2, 3, 4, 5, 6, 8, 9}
    assert all(b["image"].shape == (batch_size, 2, 2, 3) for b in batches)


def test_data_without_any_readable_image_is_an_error():
    source = numbered(5, unreadable=set(range(5)))
    for batches in (
        train_batches(source, IDENTITY, batch_size=2, seed=0, corrupt="skip"),
        eval_batches(source, IDENTITY, batch_size=2, corrupt="skip"),
    ):
        with pytest.raises(UserError, match="none of its 5 images can be read"):
            next(batches)


def test_images_of_several_sizes_are_named():
    source = replace(numbered(4), read_key=lambda key: np.zeros((2 + key, 2, 1), np.uint8))
    with pytest.raises(UserError, match=r"several sizes, \(2, 2, 1\) for numbered\[0\]"):
        next(eval_batches(source, PLAIN, batch_size=4))


def test_images_that_cannot_be_preprocessed_are_named():
    with pytest.raises(UserError, match=r"numbered\[0\]: central_crop: the image is 2 x 2"):
        next(eval_batches(numbered(4), parse("central_crop(8)"), batch_size=4))
