"""Reports of runs that never were."""

import numpy as np

from vit_jax.evaluation.metrics import Scores
from vit_jax.evaluation.report import Example, Report

SEED = 0


def curves(evaluations=5, steps=100):
    train = [
        {"step": s, "train/loss": 2.3 / s, "train/lr": 0.01 * (1 - s / steps)}
        | {"time/images_per_s": 100 + s % 3}
        for s in range(1, steps + 1)
    ]
    test = [
        {"step": steps * (i + 1) // evaluations, "test/loss": 1 / (i + 1), "test/top1": 0.1 * i}
        for i in range(evaluations)
    ]
    return train + test


def confusion_of(k, n=2000):
    rng = np.random.default_rng(SEED)
    matrix = np.zeros((k, k), np.int64)
    np.add.at(matrix, tuple(rng.integers(0, k, (2, n))), 1)
    np.add.at(matrix, (np.arange(k), np.arange(k)), 5)
    return matrix


def scores_of(confusion, probability=None, truth=None):
    """Scores with this confusion matrix, its examples row by row."""
    rows, columns = np.indices(confusion.shape).reshape(2, -1).repeat(confusion.ravel(), axis=1)
    truth = rows if truth is None else np.array(truth)
    count = len(truth)
    random = np.random.default_rng(SEED).uniform(0.2, 1, count)
    probability = random if probability is None else probability
    top1 = float((truth == columns).mean()) if count else 0.0
    index = np.arange(count)
    return Scores(count, 0, 0.5, top1, 1.0, confusion, index, truth, columns, probability)


def example(truth, prediction, probability=0.5, shape=(32, 32, 3), name="image.png"):
    image = np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)
    return Example(image, name, truth, prediction, probability, truth == prediction)


def images_of(k, n=12, shape=(32, 32, 3)):
    labels = [f"class {i}" for i in range(k)]
    return [example(labels[i % k], labels[i * i % k], shape=shape) for i in range(n)]


def report_of(k=3, **changes):
    fields = {
        "title": "ViT-Ti_16 on something",
        "metrics": [],
        "labels": [f"class {i}" for i in range(k)],
        "scores": scores_of(confusion_of(k)),
        "examples": images_of(k, n=2),
        "config": {"config.batch": 8, "config.seed": 0},
        "defaults": {"config.batch": 512, "config.seed": 0},
        "environment": {"jax": "1.2.3", "devices": "8 x abacus"},
    }
    return Report(**(fields | changes))
