"""Resizing and cropping compute what is said of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vit_jax.data.ops import random_box
from vit_jax.data.preprocess import parse

RNG = np.random.default_rng
IMAGE = RNG(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


# Antialiasing.


def triangle_resized(image, size):
    """float64, pixel by pixel: the mean under a triangle as wide as the reduction."""
    for axis, after in enumerate(size):
        before = image.shape[axis]
        scale = max(before / after, 1)
        rows = []
        for i in range(after):
            centre = (i + 0.5) * before / after
            weights = [max(0.0, 1 - abs(j + 0.5 - centre) / scale) for j in range(before)]
            row = sum(w * image.take(j, axis).astype(np.float64) for j, w in enumerate(weights))
            rows.append(row / sum(weights))
        image = np.stack(rows, axis)
    return image


@pytest.mark.parametrize(
    "size", [(20, 30), (7, 13), (59, 89), (1, 1), (60, 31), (45, 200), (80, 9)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_antialias_is_the_mean_under_a_triangle(size, channels):
    image = IMAGE[..., :channels]
    result = parse(f"resize({size}, antialias=True)")(image)
    np.testing.assert_allclose(result, triangle_resized(image, size), atol=1e-3)


def test_antialias_is_what_pil_does_of_floats():
    result = parse("resize((17, 23), antialias=True)")(IMAGE[..., :1])[..., 0]
    floats = Image.fromarray(IMAGE[..., 0].astype(np.float32))
    expected = floats.resize((23, 17), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(result, expected, atol=1e-3)


def test_antialias_changes_nothing_where_a_image_grows():
    for size in ("(60, 90)", "(61, 200)"):
        plain, smooth = parse(f"resize({size})"), parse(f"resize({size}, antialias=True)")
        np.testing.assert_array_equal(smooth(IMAGE), plain(IMAGE))


def test_every_resizing_operation_has_it():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    for spec in ("resize(8{})", "resize_small(8{})", "inception_crop(8{}, area_min=1)"):
        smooth = parse(spec.format(", antialias=True"))(stripes, RNG(0))
        plain = parse(spec.format(""))(stripes, RNG(0))
        # The outermost pixels see a stripe more or less.
        assert np.ptp(smooth[:, 1:-1]) < 20
        assert abs(smooth.mean() - 127.5) < 10
        assert parse(spec.format(", antialias=False")) == parse(spec.format(""))
        assert plain.shape == smooth.shape


# The crop of the published recipe.


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(0, 1000),
)
@settings(deadline=None)
def test_crops_lie_inside_and_keep_to_area_and_aspect(height, width, one, other, seed):
    low, high = sorted((one, other))
    top, left, h, w = random_box((height, width), RNG(seed), low, high)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    if (h, w) != (height, width):
        assert low <= h * w / (height * width) <= high
        assert (w - 0.5) / h <= 1.33
        assert (w + 0.5) / h >= 0.75


def test_crops_of_every_area_and_place_occur():
    boxes = np.array([random_box((300, 400), RNG(i), 0.05, 1.0) for i in range(3000)])
    top, left, height, width = boxes.T
    area = height * width / (300 * 400)
    assert area.min() < 0.06
    assert area.max() > 0.95
    aspect = width / height
    # Uniform in aspect: mean of U(0.75, 1.33) within four standard errors.
    assert abs(aspect.mean() - 1.04) < 4 * 0.58 / np.sqrt(12 * 3000) + 0.003
    for start, room in ((top, 300 - height), (left, 400 - width)):
        where = start[room > 20] / room[room > 20]
        assert abs(where.mean() - 0.5) < 0.02


def test_crop_heights_are_uniform_as_in_the_original():
    heights = []
    for i in range(4000):
        _, _, height, width = random_box((256, 256), RNG(i), 0.05, 1.0)
        if abs(width / height - 1) < 0.1:
            heights.append(height)
    low = 256 * np.sqrt(0.05)
    quantiles = np.quantile(heights, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, low + (250 - low) * np.array([0.25, 0.5, 0.75]), atol=12)


def test_a_image_too_narrow_for_any_crop_is_taken_whole():
    assert random_box((5, 1000), RNG(0), 0.05, 1.0) == (0, 0, 5, 1000)


# Pillow's methods.

METHODS = ("nearest", "bilinear", "bicubic", "lanczos")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(20, 30), (7, 123), (95, 11), (60, 90), (1, 1)])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_resizing_by_pillow_is_pillow_s_to_the_last_grey_level(method, size, channels):
    image = RNG(channels).integers(0, 256, (60, 90, channels), dtype=np.uint8)
    result = parse(f"resize({size}, method='pil_{method}')")(image)
    for c in range(channels):
        plane = Image.fromarray(image[..., c])
        expected = plane.resize(size[::-1], Image.Resampling[method.upper()])
        np.testing.assert_array_equal(result[..., c], np.asarray(expected))


@pytest.mark.parametrize("shape", [(60, 90), (91, 53), (64, 64), (33, 100)])
@pytest.mark.parametrize(("small", "crop"), [(40, 35), (37, 28), (33, 33)])
def test_the_shorter_side_and_the_middle_are_those_of_torchvision(shape, small, crop):
    """The longer side is cut off to a whole pixel, half a margin rounded to even."""
    image = RNG(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ops = f"resize_small({small}, method='pil_bicubic')|central_crop({crop}, round_even=True)"

    height, width = (int(small * side / min(shape)) for side in shape)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - crop) / 2.0), round((width - crop) / 2.0)
    expected = resized.crop((left, top, left + crop, top + crop))

    np.testing.assert_array_equal(parse(ops)(image), np.asarray(expected))


@pytest.mark.reference
@pytest.mark.parametrize("shape", [(60, 90), (91, 53), (64, 64), (33, 100), (300, 201)])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("small", "crop"), [(40, 35), (37, 28), (33, 33)])
def test_torchvision_itself_gives_the_same(shape, method, small, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    image = RNG(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ops = f"resize_small({small}, method='pil_{method}')|central_crop({crop}, round_even=True)"

    steps = [transforms.Resize(small, transforms.InterpolationMode(method))]
    steps.append(transforms.CenterCrop(crop))
    levels = transforms.Compose(steps)(Image.fromarray(image))
    values = transforms.Normalize(mean, std)(transforms.ToTensor()(levels))

    np.testing.assert_array_equal(parse(ops)(image), np.asarray(levels))
    found = parse(f"{ops}|normalize({mean}, {std})")(image)
    np.testing.assert_allclose(found, values.permute(1, 2, 0), atol=2e-6)


def test_what_is_cut_at_random_is_resized_by_pillow_too():
    crop = parse("inception_crop(24, method='pil_bicubic')")
    top, left, height, width = crop.crop_box((60, 90), RNG(3))
    part = Image.fromarray(IMAGE[top : top + height, left : left + width])
    expected = part.resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop(IMAGE, RNG(3)), np.asarray(expected))


def test_pillow_s_levels_stay_whole_on_the_way_to_the_device():
    ops = parse("inception_crop(24, method='pil_bicubic')|flip|value_range(-1, 1)")
    host, normalize = ops.split(as_uint8=True)
    levels = host(IMAGE, RNG(1))
    assert levels.dtype == np.uint8
    np.testing.assert_array_equal(normalize(levels), ops(IMAGE, RNG(1)))
