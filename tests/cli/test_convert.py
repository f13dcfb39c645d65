"""`vit-jax convert`."""

import json
import shutil

import numpy as np
import pytest

from tests import published
from tests.checkpoints.test_torch import written
from vit_jax import load
from vit_jax.checkpoints import hub, open_arrays, write_npz
from vit_jax.cli import main


@pytest.fixture
def source(tmp_path):
    write_npz(tmp_path / "a.npz", published.arrays("ViT gap"))
    return str(tmp_path / "a.npz")


def test_it_says_what_was_written(source, tmp_path, capsys):
    target = tmp_path / "b.safetensors"

    assert main(["convert", source, str(target), "--style=prelinen", "--dtype=bfloat16"]) == 0

    output = capsys.readouterr().out
    shapes = published.shapes("ViT gap")
    assert f"{published.count(shapes):,} parameters in {len(shapes)} arrays" in output
    assert f"wrote {target}" in output
    with open_arrays(target) as arrays:
        assert "Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias" in arrays
        assert {str(array.dtype) for array in arrays.values()} == {"bfloat16"}


def test_it_says_so_in_json(source, tmp_path, capsys):
    assert main(["convert", source, str(tmp_path / "b.npz"), "--json"]) == 0

    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == [str(tmp_path / "b.npz")]
    assert facts["arrays"] == len(published.shapes("ViT gap"))
    assert facts["parameters"] == published.count(published.shapes("ViT gap"))


def test_a_mistake_is_one_line_and_status_2(source, tmp_path, capsys):
    for arguments, message in [
        ([source, source], "is there already"),
        ([source, str(tmp_path / "b.pt")], "expected a name that ends in"),
        ([str(tmp_path / "absent.npz"), str(tmp_path / "b.npz")], "no such file"),
        ([source, str(tmp_path / "b.npz"), "--style=keras"], "keras"),
        ([f"{source}:img", str(tmp_path / "b.npz")], "no tower 'img'"),
    ]:
        assert main(["convert", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_several_files_that_are_there_are_named(source, tmp_path, capsys):
    for name in ("b.npz", "b.json"):
        (tmp_path / name).write_text("{}")
    assert main(["convert", source, str(tmp_path / "b.npz")]) == 2
    assert "b.npz and " in (error := capsys.readouterr().err)
    assert "b.json are there already: choose another name" in error


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_a_file_is_no_folder_for_a_library_and_nothing_is_loaded_for_that(
    library, tmp_path, capsys
):
    (tmp_path / "there").write_text("mine")
    arguments = ["convert", str(tmp_path / "absent.npz"), str(tmp_path / "there")]
    assert main([*arguments, "--to", library, "--force"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("there is a file, expected a folder to write to: choose another\n")
    assert error.count("\n") == 1


def test_force_replaces(source, tmp_path):
    np.savez(tmp_path / "b.npz", x=np.ones(1))

    assert main(["convert", source, str(tmp_path / "b.npz"), "--force"]) == 0

    with open_arrays(tmp_path / "b.npz") as arrays:
        assert set(arrays) == set(published.shapes("ViT gap"))


def test_a_folder_a_workdir_and_a_published_name_are_sources_too(source, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    timm, run = tmp_path / "timm", tmp_path / "run"
    timm.mkdir()
    run.mkdir()
    written("timm-vit", timm)
    shutil.copy(source, run / "weights.npz")
    cached = hub.cache_path(hub.url_for("siglip2/siglip2_b16_224"))
    cached.parent.mkdir(parents=True)
    lit = {k: v for k, v in published.arrays("LiT").items() if k.startswith("img/")}
    write_npz(cached, lit)

    for name in (timm, run, "siglip2/siglip2_b16_224:img"):
        assert main(["convert", str(name), str(tmp_path / "b.npz"), "--force"]) == 0
        if name is timm:
            assert load(tmp_path / "b.npz").spec == load(timm).spec
    assert set(np.load(tmp_path / "b.npz")) == {key[4:] for key in lit}
