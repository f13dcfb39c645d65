"""The published key styles are names for the same arrays."""

import re

import numpy as np
import pytest

from tests import reference
from vit_jax.checkpoints import STYLES, key_style, to_linen, to_style
from vit_jax.errors import UserError

KEYS = reference.official_shapes("ViT-Ti_16", "1000+rep")
BLOCK = "Transformer/encoderblock_11"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["ViT-Ti_16", "ViT-B_32-gap-norep", "ViT-H_14"])
def test_a_style_leads_back_to_todays_names(name, style):
    shapes = reference.official_shapes(name)

    styled = to_style(shapes, style)

    assert len(styled) == len(shapes)
    assert key_style(styled) == style
    assert to_linen(styled) == shapes


def test_the_published_names_are_those_of_one_counter_over_all_sub_modules():
    published = to_style({key: key for key in KEYS}, "prelinen")

    renamed = {new: old for new, old in published.items() if new != old}
    # A block has 16 arrays; those of LayerNorm_0 alone keep their names.
    assert len(renamed) == 12 * 14
    assert renamed[f"{BLOCK}/LayerNorm_2/scale"] == f"{BLOCK}/LayerNorm_1/scale"
    assert (
        renamed[f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel"]
        == f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel"
    )
    assert renamed[f"{BLOCK}/MlpBlock_3/Dense_0/bias"] == f"{BLOCK}/MlpBlock_0/Dense_0/bias"


def test_the_names_of_a_published_file_are_known(shared):
    (path,) = (shared / "checkpoints").glob("Ti_16-*.npz")
    keys = np.load(path).files

    assert key_style(keys) == "prelinen"
    assert set(keys) == set(to_style(reference.official_shapes("ViT-Ti_16"), "prelinen"))


def test_other_names_are_left_alone():
    arrays = {"encoderblock_0/LayerNorm_2/scale": 1, "LayerNorm_2/scale": 2, "opt/step": 3}

    assert to_linen(arrays) == {
        "encoderblock_0/LayerNorm_1/scale": 1,
        "LayerNorm_2/scale": 2,
        "opt/step": 3,
    }


def test_one_array_under_two_names_is_refused():
    arrays = {f"{BLOCK}/LayerNorm_1/scale": 1, f"{BLOCK}/LayerNorm_2/scale": 2}

    with pytest.raises(UserError, match=re.escape(f"{BLOCK}/LayerNorm_1/scale' is there twice")):
        to_linen(arrays)


def test_an_unknown_style_is_refused():
    with pytest.raises(UserError, match="unknown key style 'keras', expected one of linen, pre"):
        to_style({}, "keras")
