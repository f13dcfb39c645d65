"""Levels: what becomes black and white of images that aren't 8-bit."""

import contextlib
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_jax import data
from vit_jax.data import levels, ops
from vit_jax.data.preprocess import parse
from vit_jax.errors import UserError

RNG = np.random.default_rng


def source(dtype=np.uint16, channels=1, high=4096, count=20):
    images = RNG(0).integers(0, high, (count, 10, 12, channels)).astype(dtype)
    return data.from_arrays(images, np.arange(count) % 2), images


@given(
    st.sampled_from(["u1", "u2", "i2", "i4", "f4", "f8"]),
    st.integers(-100, 100),
    st.integers(1, 155),
    st.sampled_from([1, 3, 12]),
)
@settings(max_examples=80, deadline=None)
def test_lo_and_hi_become_0_and_255_and_all_beyond_too(dtype, lo, width, channels):
    image = RNG(0).integers(0, 250, (6, 7, channels)).astype(dtype)
    result = parse(f"levels({lo}, {lo + width})")(image)
    expected = np.clip((image.astype(float) - lo) / width * 255, 0, 255)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-3)


def test_each_channel_may_have_levels_of_its_own():
    image = np.full((2, 2, 3), 50, np.uint16)
    result = parse("levels((0, 40, 50), (100, 90, 60))")(image)
    np.testing.assert_allclose(result[0, 0], [127.5, 51, 0], atol=1e-4)
    with pytest.raises(UserError, match="levels: 3 channels, and the image has 1"):
        parse("levels((0, 40, 50), (100, 90, 60))")(image[..., :1])


def test_without_levels_16_bits_count_whole_and_other_types_are_refused(caplog):
    image = np.array([[[0], [65535], [257 * 100]]], np.uint16)
    np.testing.assert_allclose(parse("gray")(image)[0, :, 0], [0, 255, 100], atol=1e-4)
    for dtype in ("f4", "f8", "i2", "i4", "u4"):
        with pytest.raises(UserError, match=r"doesn't tell what is black.*put levels\(lo, hi\)"):
            parse("gray")(image.astype(dtype))
    assert not caplog.records
    ops._warn_once.cache_clear()
    parse("gray")(np.full((9, 9, 1), 4095, np.uint16))
    assert "hardly a value above a quarter of 65,535" in caplog.text


def test_what_levels_cannot_hold_is_refused_or_said(caplog):
    bits12 = parse("levels(0, 4095)")
    with pytest.raises(UserError, match=r"type uint8, whose values end at 255, expected .* 4,095"):
        bits12(np.zeros((2, 2, 1), np.uint8))
    with pytest.raises(UserError, match="NaN or infinite"):
        parse("levels(0, 1)")(np.full((2, 2, 1), np.nan, np.float32))
    ops._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        bits12(np.full((20, 20, 1), 60_000, np.uint16))
    assert "most values of an image lie above 4095" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("levels(5, 5)", "expected lo < hi"),
        ("levels((0, 1), (2, 3, 4))", "as many of both"),
        ("levels(5)", "missing .* 'hi'"),
        ("resize(8)|levels(0, 9)", "put it first, only gray and rgb may come before"),
        ("levels(0, 9)|levels(0, 9)", "put it first"),
    ],
)
def test_wrong_levels_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        parse(spec)


def test_levels_stand_first_and_are_recorded():
    assert parse("decode|levels(0, 4095)|resize(8)").spec == "levels(0, 4095)|resize(8)"
    assert parse("rgb|levels(0, 4095)|resize(8)").levels == ((0,), (4095,))
    assert parse("levels(0, 1)|randaug(2, 5)|value_range(-1, 1)").works_on_uint8 == ("randaug",)
    assert parse("levels(0, 9)|resize(8)|value_range(-1, 1)").split(as_uint8=True)[0].dtype == (
        "float32"
    )


def test_colours_of_other_channels_are_refused_where_colours_are_meant():
    image = np.zeros((8, 8, 12), np.uint8)
    for spec in ("gray", "rgb", "randaug(2, 5)", "color_jitter(0.1, 0.1, 0.1)"):
        with pytest.raises(UserError, match="an image of 12 channels, expected 1 or 3"):
            parse(spec)(image, RNG(0))


@pytest.mark.parametrize("channels", [5, 12])
@pytest.mark.parametrize(
    "spec", ["inception_crop(6)|flip", "resize(6)", "resize(6, antialias=True)|random_erasing(1)"]
)
def test_operations_take_any_number_of_channels(spec, channels):
    image = RNG(0).integers(0, 4096, (20, 24, channels), np.uint16)
    result = parse(f"levels(0, 4095)|{spec}")(image, RNG(3))
    each = [
        parse(f"levels(0, 4095)|{spec}")(image[..., [c]], RNG(3))[..., 0] for c in range(channels)
    ]
    if "erasing" not in spec:
        np.testing.assert_allclose(result, np.stack(each, axis=-1), atol=1e-3)
    assert result.shape == (6, 6, channels)


# Which levels a data set has.


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ("12 bit", "levels(0, 4095)"),
        ("10 bits", "levels(0, 1023)"),
        ("12-bit", "levels(0, 4095)"),
        ("full", "levels(0, 65535)"),
        ("-5, 7.5", "levels(-5, 7.5)"),
        ("(0, 1)", "levels(0, 1)"),
        ("", "levels(0, 65535)"),
    ],
)
def test_a_wish_becomes_an_operation(wish, text):
    assert data.find_levels(source()[0], wish)[0] == text


def test_eight_bits_need_none_and_a_sliver_is_told():
    assert data.find_levels(source(np.uint8, high=256)[0], "") == ("", [])
    assert data.find_levels(source(np.uint8, high=256)[0], "full") == ("", [])
    (note,) = data.find_levels(source(high=4096)[0], "")[1]
    assert "of 65,535: set --config.levels='12 bit' if they have no more bits" in note
    assert levels.sliver(np.full(99, 20), "uint8") == ""  # A dark photograph.
    assert "at most 20 of 65,535" in levels.sliver(np.full(99, 20), "uint16")
    (note,) = data.find_levels(source(high=1000)[0], "")[1]
    assert "'10 bit'" in note
    (note,) = data.find_levels(source(high=65536)[0], "")[1]
    assert "set --config.levels" not in note


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_percentiles_are_those_of_all_values_or_of_each_channel(channels):
    made, images = source(np.float32, channels, high=1000)
    text, (note,) = data.find_levels(made, "percentile")
    values = images.reshape(-1, channels if channels > 3 else 1)
    lo, hi = np.percentile(values, [0.1, 99.9], axis=0)
    found = parse(text).levels
    np.testing.assert_allclose(np.broadcast_to(found[0], lo.shape), lo, rtol=1e-5)
    np.testing.assert_allclose(np.broadcast_to(found[1], hi.shape), hi, rtol=1e-5)
    assert "percentiles of 20 images to train on" in note
    assert data.find_levels(made, "percentile")[0] == text


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            "",
            "looked at 16 are of float32, of values from 0 to .*: config.levels has to say what is",
        ),
        ("full", "config.levels has to say"),
        ("all", r"config\.levels is 'all', expected full \(the whole range"),
        ("1, b", r"config\.levels is '1, b', expected full"),
        ("1, 2, 3", r"config\.levels is '1, 2, 3', expected full"),
    ],
)
def test_other_wishes_are_refused(wish, message):
    with pytest.raises(UserError, match=message):
        data.find_levels(source(np.float32)[0], wish)


@pytest.mark.parametrize("wish", ["", "full"])
def test_several_types_are_refused_or_told(wish):
    made, _ = source(count=16)

    def mixed(*dtypes):
        return replace(
            made, read_key=lambda key: made.read_key(key).astype(dtypes[key % len(dtypes)])
        )

    for other in ("f4", "i2"):
        with pytest.raises(
            UserError, match=r"8 are of (float32|int16) and 8 are of uint16, of values from"
        ):
            data.find_levels(mixed("u2", other), wish)
    text, (note,) = data.find_levels(mixed("u1", "u2"), wish)
    assert (text, "8 are of uint16 and 8 are of uint8: each counts by" in note) == ("", True)
    text, (note,) = data.find_levels(made, wish)
    assert text == "levels(0, 65535)"
    assert "of the images looked at 16 are of uint16; one of 8 bits would be refused" in note


def test_images_of_one_value_have_no_levels():
    flat = data.from_arrays(np.full((4, 8, 8), 7.0), [0, 1, 0, 1])
    with pytest.raises(UserError, match="a channel of one value only, 7"):
        data.find_levels(flat, "percentile")


@given(st.text(max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_wish_is_an_operation_or_one_line(wish):
    with contextlib.suppress(UserError):
        text, _ = data.find_levels(source(count=2)[0], wish)
        assert not text or parse(text).levels


def test_a_sample_comes_from_all_over_an_image():
    image = np.arange(300 * 200 * 3, dtype=np.uint32).reshape(300, 200, 3)
    values = levels.sample(image, 100)
    assert 60 <= len(values) <= 200
    assert values[:, 0].min() < image.size * 0.1
    assert values[:, 0].max() > image.size * 0.9
