"""What is looked at of a T2T-ViT: its blocks as of any ViT, and where its tokens come from."""

import dataclasses

import cv2
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.explain.conftest import random_images
from vit_jax import explain


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    "kind", ["performer", pytest.param("transformer", marks=[pytest.mark.slow, pytest.mark.ci])]
)
def test_the_page_shows_what_each_step_of_the_tokens_attends_to(kind, network, image):
    vit = network("T2T", token_attention=kind)
    # Of vectors so long that their features vanish nobody would get attention.
    arrays = flatten_dict(vit.params, sep="/")
    short = {k: 0.1 * v for k, v in arrays.items() if "/query/" in k or "/key/" in k}
    vit = dataclasses.replace(vit, params=unflatten_dict(arrays | short, sep="/"))

    (explained,) = explain.explanations(vit, [image])

    maps = dict(explained.heads)
    assert list(maps)[-2:] == ["tokens 1, attention received", "tokens 2, attention received"]
    first, second = list(maps.values())[-2:]
    assert (first.shape, second.shape) == ((8, 13), (4, 7))
    for received in (first, second):
        assert received.min() >= 0
        assert received.sum() == pytest.approx(1, abs=1e-5)
    assert maps["block 2, head 1"].shape == vit.spec.grid_size == (2, 4)
    assert [values.shape for _, values in explained.relevance] == [(2, 4)] * 2
    assert explain.page_html(vit, [explained]).startswith(b"<!")


def test_its_blocks_are_looked_at_as_those_of_a_vit(network):
    vit = network("T2T")
    images = random_images(vit)
    assert explain.attention_maps(vit, images).shape == (2, 2, 2, 9, 9)
    assert explain.rollout(vit, images).shape == (2, 2, 4)
    relevant = explain.relevance(vit, images, [0, 3])
    assert relevant.shape == (2, 2, 2, 4)
    assert relevant.min() >= 0
    assert relevant.max() > 0
    kernel = vit.params["tokens_to_token"]["attention1"]["value"]["kernel"]
    scale = vit.params["tokens_to_token"]["attention1"]["LayerNorm_0"]["scale"]
    filters = vit.model.embedding_filters(vit.params)
    assert filters.shape == (7, 7, 3, 64)
    row = (1 * 7 + 2) * 7 + 5  # Channel before row before column.
    np.testing.assert_allclose(filters[2, 5, 1], scale[row] * kernel[row], rtol=1e-6)
