"""Maps lie where the network looked."""

import dataclasses

import cv2
import numpy as np
import pytest

from tests.explain.conftest import random_images
from vit_jax.explain.figures import ImageView, overlay, views

RNG = np.random.default_rng(0)


def box(vit, preprocess, height, width):
    vit = dataclasses.replace(vit, preprocess=f"{preprocess}|value_range(-1, 1)")
    (view,) = views(vit, [RNG.integers(0, 256, (height, width, 3), np.uint8)])
    return view.box * np.tile((height, width), 2)


@pytest.mark.parametrize(
    ("preprocess", "height", "width", "expected"),
    [
        ("resize((20, 27))", 20, 27, (0, 0, 20, 27)),
        ("resize((20, 27))", 300, 100, (0, 0, 300, 100)),
        ("resize((20, 27), antialias=True)", 300, 100, (0, 0, 300, 100)),
        ("resize((20, 27))", 7, 5, (0, 0, 7, 5)),
        ("central_crop((20, 27))", 40, 47, (10, 10, 20, 27)),
        ("resize_small(40)|central_crop((20, 27))", 80, 200, (20, 72, 40, 54)),
        ("gray|rgb|resize_small(30)|central_crop((20, 27))", 300, 300, (50, 10, 200, 270)),
    ],
)
def test_the_grid_lies_on_what_preprocessing_leaves(network, preprocess, height, width, expected):
    vit = network("token")  # 5 x 6 patches of 4 pixels: of 27 columns of pixels the last 3 are cut.
    top, left, high, wide = expected
    found = box(vit, preprocess, height, width)
    np.testing.assert_allclose(found, (top, left, high, wide * 24 / 27), atol=0.5)


def test_a_preprocessed_image_is_shown_as_it_is_and_a_hybrid_fills_it(network):
    vit = network("hybrid", image_size=(40, 60))  # 5 x 8 patches of 8 pixels, padded to 64.
    pixels = random_images(vit, 1)
    (view,) = views(vit, pixels)
    assert view.box == (0, 0, 1, 1)
    np.testing.assert_array_equal(view.pixels, pixels[0])
    np.testing.assert_allclose(view.image, (pixels[0] + 1) * 127.5, atol=0.5001)


def test_heat_is_over_its_patch_in_the_images_own_aspect_and_the_unseen_is_dark():
    image = np.full((300, 600, 3), 100, np.uint8)
    view = ImageView(image, np.zeros(0), (0, 0.25, 1, 0.5))  # The middle square was seen.
    heat = np.zeros((3, 3))
    heat[0, 2] = 1

    drawn = overlay(view, heat).astype(int)

    assert drawn.shape == (200, 400, 3)
    assert (drawn[:, :95] == 35).all()
    assert (drawn[:, 305:] == 35).all()
    row, column = np.unravel_index(drawn.sum(axis=2).argmax(), drawn.shape[:2])
    assert row < 67
    assert 233 < column < 300


def test_a_tiny_grey_image_is_magnified_and_colours_stand_in_its_place():
    view = ImageView(np.zeros((8, 16, 1), np.uint8), np.zeros(0), (0, 0, 1, 1))
    assert overlay(view).shape == (96, 192, 3)
    colours = np.zeros((2, 4, 3))
    colours[..., 1] = 1
    assert (overlay(view, colours) == (0, 255, 0)).all()


def test_files_are_read_as_predict_reads_them(network, tmp_path):
    image = RNG.integers(0, 256, (30, 50, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    vit = network("token")
    from_file, from_array = views(vit, [tmp_path / "a.png", image])
    np.testing.assert_array_equal(from_file.image, image)
    np.testing.assert_array_equal(from_file.pixels, from_array.pixels)
