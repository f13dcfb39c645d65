"""Augmentation: colours as PIL computes them, geometry as a formula says, always uint8."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from vit_jax.data import AUGREG, augment, parse
from vit_jax.data.ops import OPS

RNG = np.random.default_rng
FACTORS = (0.0, 0.1, 0.5, 1.0, 1.9, 2.8, 3.7)


def photo(height=60, width=90, seed=0):
    """Smooth, with a little noise, not over the full range of levels."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + 3 * c) + c) + np.cos(y / (7 + 2 * c)) for c in range(3)]
    noise = RNG(seed).normal(0, 6, (height, width, 3))
    return np.clip(120 + 45 * np.stack(waves, -1) + noise, 7, 244).astype(np.uint8)


IMAGE = photo()


def against_pil(result, expected):
    """The largest difference, and the share of values that differ."""
    difference = np.abs(result.astype(int) - np.asarray(expected))
    return difference.max(), (difference > 0).mean()


def test_tone_curves_are_those_of_pil():
    pil = Image.fromarray(IMAGE)
    assert against_pil(augment.autocontrast(IMAGE), ImageOps.autocontrast(pil))[0] == 0
    assert against_pil(augment.equalize(IMAGE), ImageOps.equalize(pil))[0] == 0
    assert against_pil(augment.invert(IMAGE), ImageOps.invert(pil))[0] == 0
    for bits in range(1, 9):
        assert against_pil(augment.posterize(IMAGE, bits), ImageOps.posterize(pil, bits))[0] == 0
    for threshold in (0, 1, 64, 128, 255, 256):
        expected = ImageOps.solarize(pil, threshold)
        assert against_pil(augment.solarize(IMAGE, threshold), expected)[0] == 0


@pytest.mark.parametrize("factor", FACTORS)
def test_enhancements_are_those_of_pil(factor):
    pil = Image.fromarray(IMAGE)
    for ours, theirs in (
        (augment.brighten, ImageEnhance.Brightness),
        (augment.change_contrast, ImageEnhance.Contrast),
        (augment.sharpen, ImageEnhance.Sharpness),
    ):
        assert against_pil(ours(IMAGE, factor), theirs(pil).enhance(factor))[0] <= 1
        assert against_pil(ours(IMAGE, factor), theirs(pil).enhance(factor))[1] < 1e-3
    largest, share = against_pil(
        augment.saturate(IMAGE, factor), ImageEnhance.Color(pil).enhance(factor)
    )
    # OpenCV's grey differs from PIL's by a level in a few pixels, which counts |1 - factor| times.
    assert largest <= 1 + abs(1 - factor)
    assert share < 2e-3


def test_levels_that_pil_leaves_alone_stay():
    flat = np.full((8, 8, 3), 77, np.uint8)
    for change in (augment.autocontrast, augment.equalize):
        np.testing.assert_array_equal(change(flat), flat)
    few = np.zeros((3, 3, 1), np.uint8)
    few[0, 0] = 200
    expected = np.asarray(ImageOps.equalize(Image.fromarray(few[..., 0])))
    np.testing.assert_array_equal(augment.equalize(few)[..., 0], expected)


def test_solarize_add_lifts_the_dark_half():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    result = augment.solarize_add(levels, 110).ravel()
    expected = [min(v + 110, 255) if v < 128 else v for v in range(256)]
    np.testing.assert_array_equal(result, expected)
    assert augment.solarize_add(levels, 200).max() == 255


def test_posterize_keeps_a_bit_at_least_and_eight_at_most():
    np.testing.assert_array_equal(augment.posterize(IMAGE, 0), IMAGE & 128)
    np.testing.assert_array_equal(augment.posterize(IMAGE, 12), IMAGE)


def test_turning_the_hue_by_thirds_permutes_the_channels():
    np.testing.assert_array_equal(augment.turn_hue(IMAGE[..., :1], 0.3), IMAGE[..., :1])
    third = augment.turn_hue(IMAGE, 1 / 3).astype(int)
    assert np.abs(third - np.roll(IMAGE, 1, axis=2)).mean() < 2
    assert np.abs(augment.turn_hue(IMAGE, 0.0).astype(int) - IMAGE).max() <= 5
    np.testing.assert_array_equal(augment.turn_hue(IMAGE, -0.25), augment.turn_hue(IMAGE, 0.75))


# Geometry: each image's value tells where it came from.


def coordinates(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.full_like(x, 9)], axis=-1).astype(np.uint8)


def assert_moved(result, matrix):
    """Each pixel is the nearest to a x + b y + c, d x + e y + f, or FILL if that lies outside."""
    height, width = result.shape[:2]
    a, b, c, d, e, f = matrix
    y, x = np.mgrid[:height, :width].astype(np.float64)
    rows, columns = d * x + e * y + f, a * x + b * y + c
    filled = (result == augment.FILL).all(axis=-1)
    slack = 0.5 + 2e-3
    certainly_inside = (rows > -0.498) & (rows < height - 0.502)
    certainly_inside &= (columns > -0.498) & (columns < width - 0.502)
    certainly_outside = (rows < -slack) | (rows > height - 1 + slack)
    certainly_outside |= (columns < -slack) | (columns > width - 1 + slack)
    assert filled[certainly_outside].all()
    assert not filled[certainly_inside].any()
    taken = ~filled
    assert (np.abs(result[..., 0] - rows)[taken] <= slack).all()
    assert (np.abs(result[..., 1] - columns)[taken] <= slack).all()


@given(
    st.integers(1, 120),
    st.integers(1, 120),
    st.floats(-0.9, 0.9),
    st.floats(-300, 300),
    st.floats(-90, 90),
)
@settings(deadline=None, max_examples=60)
def test_moved_pixels_come_from_where_the_formula_says(height, width, shear, shift, degrees):
    image = coordinates(height, width)
    for matrix in (
        (1, shear, 0, 0, 1, 0),
        (1, 0, 0, shear, 1, 0),
        (1, 0, shift, 0, 1, 0),
        (1, 0, 0, 0, 1, shift),
    ):
        assert_moved(augment.affine(image, matrix), matrix)
    turn = math.radians(degrees)
    cos, sin, x, y = math.cos(turn), math.sin(turn), (width - 1) / 2, (height - 1) / 2
    # About the middle: p = R (q - middle) + middle.
    matrix = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    assert_moved(augment.rotate(image, degrees), matrix)


def test_a_quarter_turn_is_exact():
    square = photo(31, 31)
    np.testing.assert_array_equal(augment.rotate(square, 90), np.rot90(square, 1))
    np.testing.assert_array_equal(augment.rotate(square, 180), square[::-1, ::-1])


def test_cutout_fills_a_square_around_any_pixel():
    white = np.full((20, 30, 3), 255, np.uint8)
    sizes, corners = set(), set()
    for seed in range(300):
        result = augment.cutout(white, 4, RNG(seed))
        rows, columns = np.nonzero(result[..., 0] == augment.FILL)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width
        sizes.add((height, width))
        corners.add((rows.min(), columns.min()))
    assert max(sizes) == (8, 8)
    assert min(sizes) == (4, 4)
    assert len(corners) > 150
    np.testing.assert_array_equal(augment.cutout(white, 0, RNG(0)), white)
    assert white.min() == 255


# RandAugment.

MAGNITUDES = {  # name: what level 1.5 means, as the published code has it
    "Posterize": lambda image: image & 0b11111100,
    "Solarize": lambda image: image,
    "SolarizeAdd": lambda image: np.where(image < 128, np.minimum(image + 165, 255), image),
    "Brightness": lambda image: np.minimum(image * 2.8, 255),
    "Invert": lambda image: 255 - image,
}


@pytest.mark.parametrize("name", MAGNITUDES)
def test_a_magnitude_means_what_the_published_code_says(name):
    result = augment.RANDAUG[name](IMAGE, 1.5, RNG(0))
    expected = np.floor(MAGNITUDES[name](IMAGE.astype(int)))
    assert np.abs(result - expected).max() <= (1 if name == "Brightness" else 0)


@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("ShearX", [(1, sign * 0.45, 0, 0, 1, 0) for sign in (-1, 1)]),
        ("ShearY", [(1, 0, 0, sign * 0.45, 1, 0) for sign in (-1, 1)]),
        ("TranslateX", [(1, 0, sign * 150, 0, 1, 0) for sign in (-1, 1)]),
        ("TranslateY", [(1, 0, 0, 0, 1, sign * 150) for sign in (-1, 1)]),
    ],
)
def test_moves_go_either_way_equally_often(name, matrices):
    image = photo(224, 224)
    each = [augment.affine(image, matrix) for matrix in matrices]
    seen = [0, 0]
    for seed in range(100):
        result = augment.RANDAUG[name](image, 1.5, RNG(seed))
        same = [np.array_equal(result, candidate) for candidate in each]
        assert sum(same) == 1
        seen[same.index(True)] += 1
    assert min(seen) > 30


def test_all_sixteen_operations_are_drawn_equally_often_and_always_applied(monkeypatch):
    drawn = []
    assert len(augment.RANDAUG) == 16
    for name in list(augment.RANDAUG):
        noted = lambda image, level, rng, name=name: drawn.append((name, level)) or image  # noqa: E731
        monkeypatch.setitem(augment.RANDAUG, name, noted)
    step = OPS["randaug"](2, 15.0)
    for seed in range(1600):
        step.apply(IMAGE, RNG(seed))
    assert len(drawn) == 3200
    assert {level for _, level in drawn} == {1.5}
    counts = [[n for n, _ in drawn].count(name) for name in augment.RANDAUG]
    assert 150 < min(counts) <= max(counts) < 250  # 200, within four standard deviations


def test_augreg_settings_are_the_published_table():
    table = {"none": 0, "light1": 0, "light2": 0.2, "medium1": 0.2, "medium2": 0.5}
    assert {k: p for k, (_, p) in AUGREG.items()} == table | {"strong1": 0.5, "strong2": 0.8}
    magnitudes = dict(light1=0, light2=10, medium1=15, medium2=15, strong1=20, strong2=20)
    for name, (spec, _) in AUGREG.items():
        assert spec == (f"randaug(2, {magnitudes[name]})" if name in magnitudes else "")
        assert not spec or parse(spec).spec == spec


# The others.


def test_color_jitter_of_one_kind_is_that_change_within_its_bounds():
    for spec, change, low, high in (
        ("color_jitter(0.4, 0, 0)", augment.brighten, 0.6, 1.4),
        ("color_jitter(0, 0.4, 0)", augment.change_contrast, 0.6, 1.4),
        ("color_jitter(0, 0, 2)", augment.saturate, 0.0, 3.0),
        ("color_jitter(0, 0, 0, 0.1)", augment.turn_hue, -0.1, 0.1),
    ):
        factors = []
        for seed in range(20):
            rng = RNG(seed)
            result = parse(spec)(IMAGE, rng)
            again = RNG(seed)
            again.permutation(1)
            factors.append(again.uniform(low, high))
            np.testing.assert_array_equal(result, change(IMAGE, factors[-1]))
        assert np.ptp(factors) > (high - low) / 2
    np.testing.assert_array_equal(parse("color_jitter(0, 0, 0)")(IMAGE, RNG(0)), IMAGE)


def test_random_erasing_covers_what_it_says_as_often_as_it_says():
    black = np.zeros((50, 80, 3), np.uint8)
    spec = parse("random_erasing(p=0.3, area_min=0.1, area_max=0.2)")
    erased, aspects = 0, []
    for seed in range(500):
        result = spec(black, RNG(seed))
        rows, columns = np.nonzero(result.any(axis=-1))
        if not len(rows):
            continue
        erased += 1
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        aspects.append(width / height)
        # Rounding a side changes the area by up to half a row and half a column.
        assert 0.1 * 4000 - (height + width) / 2 <= height * width
        assert height * width <= 0.2 * 4000 + (height + width) / 2
        noise = result[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert abs(noise.mean() - 127.5) < 20
    assert 110 < erased < 190
    assert 0.2 < min(aspects) < 0.5
    assert 2 < max(aspects) < 4
    assert not black.any()


def test_what_cannot_be_erased_stays():
    line = np.zeros((1, 400, 3), np.uint8)
    assert not parse("random_erasing(1, area_min=0.4)")(line, RNG(0)).any()


sizes = st.integers(1, 70)
AUGMENTATIONS = [
    "randaug(3, 0)",
    "randaug(3, 15)",
    "randaug(3, 30)",
    "color_jitter(0.8, 0.8, 2, 0.5)",
    "random_erasing(1)",
    "flip|randaug(1, 10)",
    "random_shift(2)|randaug(2, 20)|random_erasing(1, 0.5, 1)",
]


@given(sizes, sizes, st.sampled_from([1, 3]), st.integers(0, 2**32), st.sampled_from(AUGMENTATIONS))
@settings(deadline=None, max_examples=300)
def test_any_image_stays_uint8_of_its_shape_and_the_input_stays(h, w, channels, seed, spec):
    image = RNG(seed).integers(0, 256, (h, w, channels), np.uint8)
    before = image.copy()
    changed, rng = image[::-1, ::-1][::-1, ::-1], RNG(seed)
    for step in parse(spec).steps:
        changed = step.apply(changed, rng)
        assert changed.dtype == np.uint8
        assert changed.shape == image.shape
    np.testing.assert_array_equal(image, before)
    result = parse(spec)(image, RNG(seed))
    np.testing.assert_array_equal(result, changed.astype(np.float32))


@given(sizes, sizes, st.sampled_from([1, 3]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_every_operation_of_randaug_takes_any_size(h, w, channels, seed):
    image = RNG(seed).integers(0, 256, (h, w, channels), np.uint8)
    for name, change in augment.RANDAUG.items():
        result = change(image, 1.5, RNG(seed))
        assert result.dtype == np.uint8, name
        assert result.shape == image.shape, name


def test_resized_images_are_rounded_before_they_are_augmented():
    exact = parse("resize(40)")(IMAGE)
    rounded = parse("resize(40)|color_jitter(0, 0, 0)")(IMAGE, RNG(0))
    np.testing.assert_array_equal(rounded, np.rint(exact))
