"""Tokens, positions and filters agree with plain NumPy."""

import numpy as np
import pytest

from tests.explain.conftest import random_images
from vit_jax import explain, load
from vit_jax.errors import UserError


def test_norms_and_colours_are_those_of_the_features(network):
    vit = network("token")
    images = random_images(vit, 3)
    _, features = vit.model.apply({"params": vit.params}, images, return_features=True)
    blocks = np.stack([features[f"encoderblock_{i}"] for i in range(2)], axis=1)[:, :, 1:]
    norms = (blocks.astype(np.float64) ** 2).sum(axis=-1) ** 0.5
    found = explain.token_norms(vit, images)
    assert found.shape == (3, 2, 5, 6)
    np.testing.assert_allclose(found.reshape(norms.shape), norms, rtol=1e-4)

    colours = explain.feature_pca(vit, images)
    assert colours.shape == (3, 5, 6, 3)
    assert (colours.min(), colours.max()) == (0, 1)
    tokens = np.asarray(features["encoder_norm"], np.float64)[:, 1:].reshape(90, -1)
    _, vectors = np.linalg.eigh(np.cov(tokens.T))
    for i in range(3):
        scores = tokens @ vectors[:, -1 - i]
        inside = (colours[..., i].ravel() > 0) & (colours[..., i].ravel() < 1)
        agreement = np.corrcoef(scores[inside], colours[..., i].ravel()[inside])[0, 1]
        assert abs(agreement) > 1 - 1e-4


def test_two_patches_have_colours_too(network):
    assert explain.feature_pca(network("gap", image_size=(4, 8)), [_photo()]).shape == (1, 1, 2, 3)


def _photo():
    return np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)


@pytest.mark.parametrize("kind", ["token", "sincos2d", "hybrid", "LiT"])
def test_positions_are_like_themselves_and_likeness_is_mutual(network, kind):
    vit = network(kind)
    found = explain.position_similarity(vit)
    rows, columns, *again = found.shape
    assert [rows, columns] == again
    square = found.reshape(rows * columns, -1)
    np.testing.assert_allclose(np.diag(square), 1, atol=1e-6)
    np.testing.assert_allclose(square, square.T, atol=1e-6)


def test_real_positions_are_most_like_their_neighbours(shared):
    found = explain.position_similarity(load(next((shared / "checkpoints").glob("*.npz"))))
    square = found.reshape(196, 196) - 2 * np.eye(196)
    row, column = np.divmod(np.arange(196), 14)
    near_row, near_column = np.divmod(square.argmax(axis=1), 14)
    neighbours = np.abs(row - near_row) + np.abs(column - near_column) == 1
    assert neighbours.mean() >= 0.9


@pytest.mark.parametrize(("kind", "shape"), [("token", (4, 4, 3)), ("hybrid", (7, 7, 3))])
def test_filters_are_the_directions_of_most_variance(network, kind, shape):
    vit = network(kind)
    found = explain.embedding_filters(vit, 5)
    assert found.shape == (5, *shape)
    np.testing.assert_allclose((found**2).sum(axis=(1, 2, 3)), 1, rtol=1e-5)
    kernel = vit.params["embedding" if kind == "token" else "conv_root"]["kernel"]
    flat = kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
    if kind == "hybrid":
        flat = (flat - flat.mean(axis=0)) / flat.std(axis=0)
    _, vectors = np.linalg.eigh(np.cov(flat))
    agreement = np.abs((found.reshape(5, -1) * vectors[:, :-6:-1].T).sum(axis=1))
    np.testing.assert_allclose(agreement, 1, atol=1e-4)
    assert len(explain.embedding_filters(vit, 999)) <= 64
    with pytest.raises(UserError, match="count is 0"):
        explain.embedding_filters(vit, 0)
