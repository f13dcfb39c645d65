"""Batches are a pure function of (seed, step), whatever reads them."""

import contextlib
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax.data import eval_batches, open_source, parse, train_batches
from vit_jax.data.batches import _shuffled
from vit_jax.data.source import Source
from vit_jax.errors import UserError

PLAIN = parse("value_range(-1, 1)")
AUGMENTED = parse("random_shift(1)|value_range(-1, 1)")


def numbered(count, unreadable=()):
    """Images that show their own index, some of which can't be read."""

    def read(key):
        if key in unreadable:
            raise UserError(f"image {key}: damaged")
        return np.full((2, 2, 1), key, np.uint8)

    return Source(
        name="numbered",
        labels=("even", "odd"),
        channels=1,
        keys=range(count),
        label_ids=np.arange(count, dtype=np.int32) % 2,
        read_key=read,
        describe_key="numbered[{}]".format,
    )


IDENTITY = parse("rgb")


def first(count, batches):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def shown(batches):
    """The indices of the images in the batches."""
    return [b["image"][:, 0, 0, 0].astype(int).tolist() for b in batches]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


DIGITS = open_source("digits", "train[:300]")


def digits(count, **options):
    defaults = {"source": DIGITS, "preprocess": AUGMENTED, "batch_size": 64, "seed": 3}
    return first(count, train_batches(**{**defaults, "threads": 2, **options}))


# Training.


def test_training_batches_have_float_images_and_integer_labels():
    (batch,) = digits(1)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((64, 8, 8, 1), np.float32)
    assert (batch["label"].shape, batch["label"].dtype) == ((64,), np.int32)


def joined(hosts, count, **options):
    """The global batches that so many hosts see together."""
    parts = [digits(count, shard=(host, hosts), **options) for host in range(hosts)]
    return [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    ]


CASES = {
    "images": st.integers(1, 60),
    "rows": st.integers(1, 9),
    "seed": st.integers(0, 2**32 - 1),
    "killed_at": st.integers(0, 8),
    "hosts": st.sampled_from([1, 2, 4]),
    "threads": st.sampled_from([1, 2, 8]),
    "prefetch": st.sampled_from([1, 4]),
}


@given(**CASES)
@settings(deadline=None, max_examples=10)
def test_every_epoch_holds_each_image_once_whoever_reads_and_wherever_it_resumes(**case):
    check_order(**case)


@pytest.mark.slow
@given(**CASES)
@settings(deadline=None, max_examples=150)
def test_the_same_of_many_more_cases(**case):
    check_order(**case)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "hosts"), [(1, 2), (2, 1), (2, 4), (8, 1)])
def test_the_same_of_worker_processes(workers, hosts):
    case = {"images": 25, "rows": 3, "seed": 7, "killed_at": 4, "threads": 1, "prefetch": 2}
    check_order(**case, hosts=hosts, workers=workers)


def check_order(*, images, rows, seed, killed_at, hosts, threads, prefetch, workers=0):
    # Labels that number the images, and so tell their order; augmentation in the images.
    source = replace(DIGITS.take(range(images)), label_ids=np.arange(images, dtype=np.int32))
    options = {"source": source, "batch_size": 4 * rows, "seed": seed}
    whole = digits(9, threads=1, **options)

    order = np.concatenate([batch["label"] for batch in whole])
    epochs = [order[i : i + images] for i in range(0, len(order), images)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == len(epoch)  # the last may be cut short
    if images > 20 and len(epochs) > 1:
        assert not np.array_equal(epochs[0][: len(epochs[1])], epochs[1])

    others = {"threads": threads, "prefetch": prefetch, "workers": workers, **options}
    before = joined(hosts, killed_at, **others) if killed_at else []
    after = joined(hosts, 9 - killed_at, start_step=killed_at, **others)
    assert_same(whole, before + after)
    fewer = joined(1 if hosts > 1 else 2, 9 - killed_at, start_step=killed_at, **others)
    assert_same(whole[killed_at:], fewer)


def test_each_epoch_holds_each_image_once_in_an_order_of_its_own():
    # 10 does not divide 25: epochs run on within a batch.
    batches = first(20, train_batches(numbered(25), IDENTITY, batch_size=10, seed=0))
    order = list(itertools.chain(*shown(batches)))
    epochs = [order[i : i + 25] for i in range(0, 200, 25)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 8
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], batch["image"][:, 0, 0, 0] % 2)


def test_shuffling_is_even():
    epochs = shown(first(90, train_batches(numbered(6), IDENTITY, batch_size=6, seed=0)))
    for place in zip(*epochs, strict=True):
        counts = np.bincount(place, minlength=6)  # 15 expected
        assert counts.min() >= 3
        assert counts.max() <= 31


def test_seeds_give_orders_and_augmentations_of_their_own():
    assert not np.array_equal(digits(1)[0]["label"], digits(1, seed=4)[0]["label"])
    one = replace(numbered(1), read_key=lambda key: DIGITS[0]["image"])
    images = [
        first(1, train_batches(one, AUGMENTED, batch_size=64, seed=seed))[0]["image"]
        for seed in (0, 1)
    ]
    assert not np.array_equal(*images)
    assert len({image.tobytes() for image in images[0]}) == 9  # epochs augment anew


def test_what_is_drawn_for_a_row_is_told_by_seed_and_position_alone():
    source = replace(DIGITS, label_ids=np.arange(300, dtype=np.int32))
    preprocess = parse("inception_crop(6)|flip|random_erasing|value_range(-1, 1)")
    for step, batch in enumerate(digits(3, source=source, preprocess=preprocess)):
        for row, (image, index) in enumerate(zip(batch["image"], batch["label"], strict=True)):
            rng = np.random.Generator(np.random.Philox(key=[3, 64 * step + row]))
            np.testing.assert_array_equal(image, preprocess(DIGITS[index]["image"], rng))


def test_every_epoch_of_many_images_holds_each_once():
    count = 70_000  # Too many for a table of their order.
    orders = _shuffled(range(2 * count), count=count, seed=0).reshape(2, count)
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
        assert np.mean(np.abs(np.diff(order)) < count / 10) < 0.25  # 0.19 of a random one
    assert np.mean(orders[0] == orders[1]) < 0.001


def test_a_batch_may_be_larger_than_the_data():
    (batch,) = first(1, train_batches(numbered(3), IDENTITY, batch_size=7, seed=0))
    order = shown([batch])[0]
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]


def test_starting_late_in_large_data_takes_no_time():
    names = [f"n{i // 1282:08}/n{i // 1282:08}_{i:07}.JPEG" for i in range(1_281_167)]
    source = replace(
        numbered(1),
        keys=np.array(names, np.dtypes.StringDType()),
        label_ids=np.zeros(len(names), np.int32),
        read_key=lambda key: np.full((2, 2, 1), len(key), np.uint8),
    )
    import grain  # noqa: F401 (it takes a second)

    begin = time.monotonic()
    first(1, train_batches(source, IDENTITY, batch_size=128, seed=0, start_step=1_000_000))
    assert time.monotonic() - begin < 1


def test_only_a_bounded_number_of_images_is_read_ahead():
    read = []
    source = replace(
        numbered(10_000), read_key=lambda k: read.append(k) or np.zeros((2, 2, 1), "u1")
    )
    batches = train_batches(source, IDENTITY, batch_size=10, seed=0, prefetch=2, threads=4)
    next(batches)
    time.sleep(0.3)
    batches.close()
    assert len(set(read)) == 30  # One batch given out, two ready.


# Evaluation.


@pytest.mark.parametrize("batch_size", [1, 7, 25, 40])
def test_evaluation_sees_each_image_once_in_order_and_pads(batch_size):
    batches = list(eval_batches(numbered(25), IDENTITY, batch_size=batch_size, threads=2))
    assert len(batches) == -(-25 // batch_size)
    for batch in batches:
        assert batch["image"].shape == (batch_size, 2, 2, 3)
        assert batch["label"].dtype == batch["index"].dtype == np.int32
        assert batch["mask"].dtype == bool
        assert (batch["index"] == -1).tolist() == (~batch["mask"]).tolist()
        assert not batch["image"][~batch["mask"]].any()
    index = np.concatenate([b["index"][b["mask"]] for b in batches])
    np.testing.assert_array_equal(index, np.arange(25))
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(25))


def test_hosts_evaluate_equally_many_batches_and_each_image_once():
    parts = [
        list(eval_batches(numbered(9), IDENTITY, batch_size=8, shard=(host, 4)))
        for host in range(4)
    ]
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    index = np.concatenate([b["index"][b["mask"]] for b in itertools.chain(*parts)])
    assert sorted(index) == list(range(9))


def test_evaluation_refuses_random_preprocessing():
    with pytest.raises(UserError, match="'flip' is random"):
        eval_batches(numbered(3), parse("flip"), batch_size=2)


def test_real_images_are_evaluated_as_read_one_by_one(shared):
    source = open_source(str(shared / "images" / "flowers"), "test[:10]")
    preprocess = parse("resize(64)|value_range(-1, 1)")
    batches = list(eval_batches(source, preprocess, batch_size=4))
    images = np.concatenate([b["image"][b["mask"]] for b in batches])
    np.testing.assert_array_equal(images, [preprocess(source[i]["image"]) for i in range(10)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": 5, "shard": (0, 2)}, "batch size is 5, expected a multiple of 2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"start_step": -1}, "start_step is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"corrupt": "ignore"}, "corrupt is 'ignore', expected 'error' or 'skip'"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_read(options, message):
    with pytest.raises(UserError, match=message):
        train_batches(numbered(4), IDENTITY, **{"batch_size": 4, "seed": 0, **options})


# Threads.


def reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("vit_jax.data")]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_there_are_as_many_threads_as_cpus_that_the_process_was_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 6, 7})
    batches = train_batches(numbered(40), IDENTITY, batch_size=40, seed=0)
    with contextlib.closing(batches):
        next(batches)
        assert len(reading_threads()) == 3


def test_abandoned_batches_leave_no_threads():
    for abandon in (lambda b: b.close(), lambda b: None):
        batches = train_batches(numbered(50), IDENTITY, batch_size=4, seed=0, threads=3)
        next(batches)
        abandon(batches)
        del batches
        deadline = time.monotonic() + 5
        while reading_threads() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not reading_threads()


def test_the_process_ends_quietly_with_batches_unread():
    code = (
        "from vit_jax import data\n"
        "source = data.open_source('digits', 'train')\n"
        "options = dict(batch_size=256, seed=0)\n"
        "batches = data.train_batches(source, data.parse('value_range(-1, 1)'), **options)\n"
        "next(batches)\n"
        "raise KeyboardInterrupt\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr.strip().endswith("KeyboardInterrupt")
    assert "ignored" not in done.stderr


def test_importing_the_package_loads_neither_opencv_nor_grain():
    code = (
        "import sys, vit_jax.data\n"
        "assert 'open_source' in dir(vit_jax.data)\n"
        "source = vit_jax.data.open_source('digits', 'train')\n"
        "assert not {'cv2', 'grain'} & set(sys.modules)\n"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


# Images that can't be read are named, left out, or stop the run, as was asked.


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


@pytest.mark.parametrize(
    ("spec", "bad", "message"),
    [
        ("levels(0, 4095)", np.full((2, 2, 1), np.nan), "the image holds NaN"),
        ("levels(0, 4095)", np.zeros((2, 2, 1), np.uint8), "levels: the image is of type uint8"),
        ("rgb", np.zeros((2, 2, 1), np.float32), "the image is of type float32"),
    ],
)
def test_images_of_bad_values_are_skipped_as_unreadable_ones(spec, bad, message, caplog):
    good = np.full((2, 2, 1), 40, np.uint16)
    source = replace(numbered(5), read_key=lambda key: bad if key == 3 else good)
    (batch,) = eval_batches(source, parse(spec), batch_size=5, corrupt="skip")
    assert batch["mask"].tolist() == [True, True, True, False, True]
    assert f"Skipping numbered[3]: {message}" in caplog.text
    with contextlib.closing(
        train_batches(source, parse(spec), batch_size=5, seed=0, corrupt="skip")
    ) as batches:
        assert next(batches)["image"].all()
    with pytest.raises(UserError, match=rf"numbered\[3\]: {message}"):
        list(eval_batches(source, parse(spec), batch_size=5))
    nothing = replace(source, read_key=lambda key: bad)
    with pytest.raises(UserError, match=rf"none of its 5 .*, as numbered\[0\]: {message}"):
        next(eval_batches(nothing, parse(spec), batch_size=5, corrupt="skip"))
    with pytest.raises(UserError, match="levels: 2 channels, and the image has 1"):
        next(eval_batches(source, parse("levels((0, 1), 9)"), batch_size=5, corrupt="skip"))


def test_data_without_any_readable_image_is_an_error():
    source = numbered(5, unreadable=set(range(5)))
    for batches in (
        train_batches(source, IDENTITY, batch_size=2, seed=0, corrupt="skip"),
        eval_batches(source, IDENTITY, batch_size=2, corrupt="skip"),
    ):
        with pytest.raises(UserError, match="none of its 5 images can be read"):
            next(batches)
    with pytest.raises(UserError, match="none of its 0 images can be read"):
        next(eval_batches(numbered(0), IDENTITY, batch_size=2))


def test_images_of_several_sizes_are_named():
    source = replace(numbered(4), read_key=lambda key: np.zeros((2 + key, 2, 1), np.uint8))
    with pytest.raises(UserError, match=r"several sizes, \(2, 2, 1\) for numbered\[0\]"):
        next(eval_batches(source, PLAIN, batch_size=4))


def test_images_that_cannot_be_preprocessed_are_named():
    with pytest.raises(UserError, match=r"numbered\[0\]: central_crop: the image is 2 x 2"):
        next(eval_batches(numbered(4), parse("central_crop(8)"), batch_size=4))
