"""`vit-jax explain` writes one page, or says in one line why not."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import families
from vit_jax import load
from vit_jax.cli import main


@pytest.mark.parametrize("ending", ["png", "html"])
def test_a_page_is_written_and_the_answer_printed(weights, photos, tmp_path, capfd, ending):
    images = [str(photos / "dark" / "0.jpg"), str(photos / "bright" / "1.jpg")]
    out = tmp_path / f"page.{ending}"
    assert main(["explain", str(weights), *images, "--out", str(out)]) == 0
    said = capfd.readouterr()
    expected = load(weights).predict(images, top=1)
    assert said.out.splitlines() == [
        *(f"{p}: {label} ({q:.1%})" for p, [(label, q)] in zip(images, expected, strict=True)),
        f"page written to {out}",
    ]
    assert said.err == ""
    if ending == "png":
        assert Image.open(out).width > 1000
    else:
        assert out.read_bytes().startswith(b"<!DOCTYPE html>")


def test_json_has_the_maps(weights, photos, tmp_path, capfd):
    image = str(photos / "dark" / "0.jpg")
    out = tmp_path / "page.html"
    argv = ["explain", str(weights), image, "--out", str(out), "--class", "1", "--json"]
    assert main(argv) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert found["picture"] == image
    assert sum(c["probability"] for c in found["classes"]) == pytest.approx(1)
    assert [r["label"] for r in found["relevance"]] == ["1"]
    assert np.shape(found["rollout"]) == np.shape(found["relevance"][0]["map"]) == (2, 2)


def test_mistakes_are_told_in_one_line_and_leave_no_page(weights, photos, tmp_path, fails):
    image, out = photos / "dark" / "0.jpg", tmp_path / "page.html"
    mixer = tmp_path / "mixer.npz"
    families.make("Mixer", tmp_path / "words").save(mixer)
    assert "a name in .html or .png" in fails("explain", weights, image, "--out", "page.pdf")
    assert "no attention to look at" in fails("explain", mixer, image, "--out", out)
    assert "no.jpg" in fails("explain", weights, image, "no.jpg", "--out", out)
    line = fails("explain", weights, image, "--out", out, "--class", "cat")
    assert line == "the weights know no class 'cat': give a name or an index, 0 to 1"
    assert not out.exists()
