"""What programs for google-research/vision_transformer are told or find."""

import importlib
import re
from pathlib import Path

import pytest

import vit_jax
from vit_jax import original

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrating.md").read_text()


@pytest.mark.parametrize("name", original.MODULES)
def test_an_import_of_the_original_names_the_new_way(name):
    message = re.escape(f"vit_jax.{name} is a module of google-research/vision_transformer")
    for statement in (
        f"from vit_jax import {name}",
        f"import vit_jax.{name}",
        f"from vit_jax.{name}.common import get_config",
    ):
        with pytest.raises(ImportError, match=message):
            exec(statement, {})
    with pytest.raises(AttributeError, match=message):
        getattr(vit_jax, name)
    assert f"`{name}`" in PAGE


def test_what_is_named_in_their_place_is_there():
    for text in [*original.MODULES.values(), PAGE]:
        for name in re.findall(r"\bvit_jax((?:\.\w+)+)", text):
            found, *parts = vit_jax, *name.split(".")[1:]
            for part in parts:
                if not hasattr(found, part):
                    found = importlib.import_module(f"{found.__name__}.{part}")
                else:
                    found = getattr(found, part)


def test_what_is_neither_here_nor_there_is_python_s_own_error():
    with pytest.raises(ImportError, match="cannot import name 'chekpoint'"):
        exec("from vit_jax import chekpoint", {})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'vit_jax\.chekpoint'"):
        importlib.import_module("vit_jax.chekpoint")
    assert not hasattr(vit_jax, "chekpoint")
