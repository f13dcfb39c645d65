"""Attention as numbers agrees with plain NumPy in float64."""

import numpy as np
import pytest

from tests import families
from tests.explain.conftest import random_images
from vit_jax import explain, load
from vit_jax.errors import UserError
from vit_jax.explain.network import observe, open_tower

WATCHED = ("token", "gap", "MAP", "unpooled", "hybrid", "LiT")


@pytest.mark.parametrize("kind", WATCHED)
def test_the_weights_of_each_query_token_sum_to_one_and_the_logits_are_the_usual_ones(
    network, kind
):
    vit = network(kind)
    images = random_images(vit)
    maps = explain.attention_maps(vit, images)
    spec = open_tower(vit).spec
    t = spec.num_tokens
    assert maps.shape == (2, spec.num_layers, spec.num_heads, t, t)
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-5)

    answers = np.stack([observe(open_tower(vit), p).answer for p in images])
    if kind == "LiT":
        answers /= np.linalg.norm(answers, axis=1, keepdims=True)
        np.testing.assert_allclose(answers, vit.embed_images(images), atol=1e-5)
    else:
        np.testing.assert_allclose(answers, vit(images), atol=1e-5)


def test_the_real_network_says_the_same_while_it_is_watched(shared):
    vit = load(next((shared / "checkpoints").glob("*.npz")))
    images = random_images(vit, 2)
    answers = [observe(open_tower(vit), image).answer for image in images]
    np.testing.assert_allclose(answers, vit(images), atol=1e-5)


def reference_rollout(maps: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Abnar & Zuidema, section 3, from the first block up."""
    product = np.eye(maps.shape[-1])
    for heads in maps.astype(np.float64):
        block = 0.5 * heads.mean(axis=0) + 0.5 * np.eye(len(product))
        product = (block / block.sum(axis=1)[:, None]) @ product
    return read @ product


@pytest.mark.parametrize("kind", WATCHED)
def test_rollout_is_the_product_of_the_blocks(network, kind):
    vit = network(kind)
    tower, images = open_tower(vit), random_images(vit)
    found = explain.rollout(vit, images)
    assert found.shape == (2, *tower.spec.grid_size)
    for one, image in zip(found, images, strict=True):
        seen = observe(tower, image)
        t = len(seen.tokens)
        read = np.full(t, 1 / t)
        if tower.spec.classifier == "token":
            read = np.eye(t)[0]
        elif tower.spec.classifier == "map":
            read = seen.pooling.mean(axis=0)
        expected = reference_rollout(seen.attention, read)
        np.testing.assert_allclose(one.ravel(), expected[tower.first_patch :], atol=1e-6)


def test_attention_pooling_looks_where_its_probe_points(network):
    vit = network("MAP")
    image = random_images(vit, 1)
    tokens = observe(open_tower(vit), image[0]).tokens.astype(np.float64)
    head = vit.params["MAPHead_0"]
    weights = head["MultiHeadDotProductAttention_0"]
    query = np.einsum("d,dhq->hq", head["probe"][0, 0], weights["query"]["kernel"])
    query += weights["query"]["bias"]
    key = np.einsum("td,dhq->thq", tokens, weights["key"]["kernel"]) + weights["key"]["bias"]
    scores = np.einsum("hq,thq->ht", query, key) / np.sqrt(query.shape[1])
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)

    found = explain.map_attention(vit, image)

    assert found.shape == (1, 2, 5, 6)
    np.testing.assert_allclose(found[0].reshape(2, -1), expected, atol=1e-5)


def test_distance_is_that_of_the_centres_weighed_by_attention(network):
    vit = network("token")
    images = random_images(vit, 1)
    maps = explain.attention_maps(vit, images)[0, :, :, 1:, 1:].astype(np.float64)
    found = explain.attention_distance(vit, images)
    for block, heads in enumerate(maps):
        for head, weights in enumerate(heads):
            total = 0.0
            for i, row in enumerate(weights):
                for j, weight in enumerate(row):
                    down, right = 4 * (i // 6 - j // 6), 4 * (i % 6 - j % 6)
                    total += weight / row.sum() * (down**2 + right**2) ** 0.5 / len(weights)
            assert found[0, block, head] == pytest.approx(total, rel=1e-5)


def test_what_has_no_attention_says_so_in_one_line(tmp_path, network):
    mixer = families.make("Mixer", tmp_path)
    with pytest.raises(UserError, match=r"a Mixer, which has no attention to look at: explain a"):
        explain.rollout(mixer, random_images(mixer))
    with pytest.raises(UserError, match=r"has no attention pooling \(its classifier is 'gap'\)"):
        explain.map_attention(network("gap"), random_images(network("gap")))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        ("photo.jpg", r"expected a list of images, e\.g\. \[image\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), "expected a list of images"),
        (np.zeros((1, 8, 8, 3), np.float32), r"shape \(8, 8, 3\) .*, expected \(20, 27, 3\)"),
        (["missing.jpg"], "missing.jpg: can't be read"),
    ],
)
def test_images_that_cannot_be_used_are_refused(network, images, message):
    with pytest.raises(UserError, match=message):
        explain.rollout(network("token"), images)
