"""Calibration: the figures of the paper's formula, whatever the examples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_jax.evaluation.metrics import BINS, calibrate


def reference(probability, right, bins):
    """Equations 2 and 3 of arXiv:1706.04599, word for word in float64."""
    n, error, rows = len(probability), 0.0, []
    for m in range(1, bins + 1):
        members = [
            (float(p), bool(hit))
            for p, hit in zip(probability, right, strict=True)
            if (m - 1) / bins < p <= m / bins or (m == 1 and p == 0)
        ]
        if members:
            accuracy = math.fsum(hit for _, hit in members) / len(members)
            confidence = math.fsum(p for p, _ in members) / len(members)
            error += len(members) / n * abs(accuracy - confidence)
        else:
            accuracy = confidence = math.nan
        rows.append((len(members), confidence, accuracy))
    return error, rows


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=200),
    st.integers(1, 20),
)
def test_the_error_is_the_formula_of_the_paper(examples, bins):
    probability, right = map(np.array, zip(*examples, strict=True))
    found = calibrate(probability.astype(np.float32), right, bins)
    error, rows = reference(probability, right, bins)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert found.count.tolist() == [count for count, _, _ in rows]
    np.testing.assert_allclose(found.confidence, [c for _, c, _ in rows], rtol=1e-12)
    np.testing.assert_allclose(found.accuracy, [a for _, _, a in rows], rtol=1e-12)


def test_the_upper_end_belongs_to_a_bin():
    found = calibrate(np.arange(16) / 15, np.ones(16, bool))
    assert BINS == 15
    assert found.count.tolist() == [2, *[1] * 14]


def test_one_that_is_as_good_as_it_says_has_no_error():
    found = calibrate(np.array([0.75] * 4 + [1.0]), np.array([1, 1, 1, 0, 1], bool))
    assert found.error == pytest.approx(0)


def test_a_confidence_a_little_above_one_counts_as_one():
    assert calibrate(np.float32([1.0000001]), np.array([True])).count[-1] == 1


def test_what_is_no_number_is_left_out_and_nothing_has_no_error():
    assert calibrate(np.array([np.nan, 0.5]), np.array([False, True])).error == 0.5
    assert math.isnan(calibrate(np.array([np.nan]), np.array([False])).error)
