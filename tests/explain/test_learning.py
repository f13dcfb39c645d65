"""A network that has learned to find something looks at it."""

import jax
import numpy as np
import optax
import pytest

from tests.families import vit_spec
from vit_jax import explain
from vit_jax.pretrained import Pretrained

GRID, PATCH, OBJECT = 6, 4, 2  # patches a side, their pixels, and the patches a side of the object
COUNT = 20  # scenes that are explained
COLOURS = np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]], np.float32)


def scenes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images, classes, where): patches of dim colours, and a bright square whose colour counts;
    `where` is bool (n, rows, columns)."""
    rng = np.random.default_rng(seed)
    colours = 0.3 * COLOURS[rng.integers(0, len(COLOURS), (n, GRID, GRID))]
    classes = rng.integers(0, len(COLOURS), n)
    where = np.zeros((n, GRID, GRID), bool)
    for i, (row, column) in enumerate(rng.integers(0, GRID - OBJECT + 1, (n, 2))):
        where[i, row : row + OBJECT, column : column + OBJECT] = True
    colours[where] = np.repeat(COLOURS[classes], OBJECT**2, axis=0)
    images = colours.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    return images + rng.normal(0, 0.1, images.shape).astype(np.float32), classes, where


@pytest.fixture(scope="module", params=["token", pytest.param("gap", marks=pytest.mark.slow)])
def trained(request) -> Pretrained:
    spec = vit_spec(
        patch_size=(PATCH, PATCH),
        hidden_size=32,
        mlp_dim=32,
        classifier=request.param,
        num_classes=len(COLOURS),
        image_size=(GRID * PATCH, GRID * PATCH),
    )
    model, tx = spec.model(), optax.adam(6e-3)
    params = jax.jit(model.init)(jax.random.key(0), scenes(1, 0)[0])["params"]

    @jax.jit
    def step(params, state, images, classes):
        def loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    images, classes, _ = scenes(32 * 100, 1)
    for i in range(160):
        batch = np.arange(32 * i, 32 * i + 32) % len(images)
        params, state = step(params, state, images[batch], classes[batch])
    vit = Pretrained(model, jax.device_get(params), spec, None, "value_range(-1, 1)")
    images, classes, _ = scenes(200, 0)
    assert (vit(images).argmax(axis=1) == classes).mean() > 0.95
    return vit


def overlap(maps: np.ndarray, where: np.ndarray) -> float:
    """Intersection over union of the object and as many of the patches looked at most; the mean."""
    found = maps >= np.sort(maps.reshape(len(maps), -1))[:, -(OBJECT**2), None, None]
    return float(((found & where).sum((1, 2)) / (found | where).sum((1, 2))).mean())


@pytest.mark.slow
@pytest.mark.ci
def test_the_object_is_what_it_looks_at(trained):
    images, classes, where = scenes(COUNT, 0)
    relevant = [
        explain.relevance(trained, images[i : i + 1], [int(classes[i])])[0, 0] for i in range(COUNT)
    ]

    # By half, what is looked at and what is there are said to be the same.
    assert overlap(explain.rollout(trained, images), where) > 0.5
    assert overlap(np.stack(relevant), where) > 0.5
