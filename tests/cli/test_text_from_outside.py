"""Names of files and classes can't steer the terminal that they are printed on, nor break JSON."""

import json
import shutil

import pytest

from vit_jax import load
from vit_jax.cli import main

EVIL = ["\x1b[2J\x9b31mcat", "dog\ud800\nvit-jax: all is well"]
SHOWN = [r"\x1b[2J\x9b31mcat", r"dog\ud800\nvit-jax: all is well"]


@pytest.fixture
def evil(weights, photos, tmp_path):
    """(weights, image) with names to be wary of."""
    path = tmp_path / "w.npz"
    load(weights).save(path)
    notes = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(notes | {"labels": EVIL}))
    image = tmp_path / "\x1b]0;title\x07 \udcff.jpg"
    shutil.copy(photos / "dark" / "0.jpg", image)
    return str(path), str(image)


def lines(text):
    """The lines of what was printed, none of which does more than be read."""
    assert text.replace("\n", "").isprintable()
    text.encode()
    return text.splitlines()


def test_predict(evil, capsys):
    weights, image = evil
    assert main(["predict", weights, image, f"{image}.none"]) == 2
    shown = capsys.readouterr()
    printed = lines(shown.out)
    assert printed[0].endswith(r"\x1b]0;title\x07 \udcff.jpg")
    assert sorted(line[10:] for line in printed[1:]) == sorted(SHOWN)
    assert len(lines(shown.err)) == 1
    assert main(["predict", weights, image, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.encode())
    assert row["picture"].endswith("\x1b]0;title\x07 \\udcff.jpg")
    labels = {EVIL[0], EVIL[1].replace("\ud800", r"\ud800")}
    assert {c["label"] for c in row["classes"]} == labels


def test_info(evil, capsys):
    assert main(["info", evil[0]]) == 0
    assert any("; ".join(SHOWN) in line for line in lines(capsys.readouterr().out))


@pytest.mark.parametrize("ending", ["html", "png"])
def test_explain(evil, tmp_path, capsys, ending):
    weights, image = evil
    command = ["explain", weights, image, "--out", str(tmp_path / f"page.{ending}")]
    assert main(command) == 0
    assert any(shown in lines(capsys.readouterr().out)[0] for shown in SHOWN)
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.encode())
    assert row["picture"].endswith("\\udcff.jpg")


def test_evaluate(evil, photos, capsys, tmp_path):
    (photos / "bright").rename(photos / "0")
    (photos / "dark").rename(photos / "1")
    command = ["evaluate", evil[0], str(photos), f"--csv={tmp_path / 'p.csv'}"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert [line[2:].split("   ")[0] for line in lines(shown.out)[-4:-2]] == SHOWN
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in found["per_class"]] == [EVIL[0], SHOWN[1].replace(r"\n", "\n")]
    assert len(lines((tmp_path / "p.csv").read_text("utf-8"))) == 1 + 4
