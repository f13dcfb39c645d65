"""The page of images shows what the preprocessing makes of them."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from vit_jax.data import from_arrays, open_source, parse
from vit_jax.data.check import draw_page
from vit_jax.errors import UserError


def page(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def red_folder(tmp_path):
    for split in ("train", "test"):
        for name, color in (("a $x^2", (255, 0, 0)), ("b", (0, 0, 255))):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (50, 40), color).save(folder / f"{i}.png")
    return str(tmp_path / "photos")


def test_the_range_of_values_is_undone(red_folder, tmp_path):
    source = open_source(red_folder, "train")
    for spec in ("resize(32)|value_range(-1, 1)", "resize(32)", "value_range(0, 1)"):
        draw_page(tmp_path / "page.png", source, parse(spec), count=6)
        pixels = page(tmp_path / "page.png").reshape(-1, 3)
        # Twelve times an image, half of them red, half of them blue, as in the files.
        red, blue = ((pixels == color).all(axis=1).mean() for color in ((255, 0, 0), (0, 0, 255)))
        assert red > 0.2
        assert blue > 0.2


def test_mixed_images_are_shown(red_folder, tmp_path):
    calls = []

    def half(images, draw):
        calls.append((images.shape, draw))
        return (images + np.roll(images, 1, axis=0)) / 2, 0.5

    source = open_source(red_folder, "train")
    draw_page(tmp_path / "page.png", source, parse("resize(32)"), count=9, draws=2, mix=half)
    assert calls == [((6, 32, 32, 3), 0), ((6, 32, 32, 3), 1)]
    pixels = page(tmp_path / "page.png").reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (128, 0, 128)).max(axis=1) < 2).mean() > 0.02


def test_the_same_seed_gives_the_same_page(tmp_path):
    source = open_source("digits", "train")
    pages = []
    for seed in (1, 1, 2):
        draw_page(tmp_path / "p" / "page.png", source, parse("randaug(2, 9)"), seed=seed, count=2)
        pages.append((tmp_path / "p" / "page.png").read_bytes())
    assert pages[0] == pages[1] != pages[2]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/page\.png can't be written \("):
        draw_page(tmp_path / "file" / "page.png", open_source("digits", "test"), parse("flip"))


def test_large_photos_are_shrunk_before_they_are_drawn(tmp_path, monkeypatch):
    drawn = []
    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, x, **k: drawn.append(x.shape) or imshow(self, x, **k)
    )
    pixels = np.full((2, 900, 1200, 3), 200, np.uint8)
    draw_page(tmp_path / "page.png", from_arrays(pixels, [0, 1]), parse("flip"), count=1, draws=1)
    assert drawn == [(384, 512, 3)] * 2
