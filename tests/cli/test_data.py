"""`vit-jax data`: what it makes of images, and one clear line for each mistake."""

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import write_images
from vit_jax.cli import main


@pytest.mark.parametrize("what", [["--augment=strong2"], ["--pp=resize(9)|flip"], []])
def test_show_writes_a_page_and_says_where(what, tmp_path, capsys):
    photos, page = write_images(tmp_path / "photos", 5), tmp_path / "new" / "page.png"
    assert main(["data", "show", str(photos), f"--out={page}", "--count=2", *what]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    with Image.open(page) as image:
        assert image.width > image.height > 400
        assert len(np.unique(np.asarray(image))) > 100


@pytest.mark.parametrize(
    ("options", "levels"), [([], "levels(0, 65535)"), (["--levels=12 bit"], "levels(0, 4095)")]
)
def test_show_draws_deep_images_by_their_levels(options, levels, tmp_path, capsys, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(0).integers(0, 4096, (16, 16), np.uint16)
        Image.fromarray(pixels).save(tmp_path / name / "deep.png")
    drawn = []
    monkeypatch.setattr("vit_jax.data.check.draw_page", lambda *page, **_: drawn.append(page[2]))
    command = ["data", "show", str(tmp_path), "--split=train+test", f"--out={tmp_path / 'p.png'}"]
    assert main([*command, "--pp=resize(8)", *options]) == 0
    assert drawn[0].spec == f"{levels}|resize(8)"
    told = capsys.readouterr().err
    assert levels in told
    assert ("set --config.levels='12 bit'" in told) == (not options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--augment=medium"], "config.augment is 'medium', expected one of none, light1"),
        (["--pp=filp"], "unknown operation 'filp' in 'filp' at position 1; did you mean flip?"),
        (["--pp=train"], "unknown operation 'train'"),
        (["--pp=flip", "--augment=light1"], "not allowed with argument"),
        (["--levels=all"], "levels is 'all', expected full"),
        (["--pp=levels(0, 9)", "--levels=8 bit"], "both say what values are black and white"),
        (["--split=tset"], "unknown split 'tset'"),
        (["--count=0"], "'0' is no whole number of at least 1"),
        (["--seed=-1"], "--seed is -1, expected 0 to 4294967295"),
        (["--pp=central_crop(99)"], "the image is 8 x 8, expected 99 x 99 or larger"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message, tmp_path, fails):
    assert message in fails("data", "show", "digits", f"--out={tmp_path / 'page.png'}", *options)
    assert not (tmp_path / "page.png").exists()
