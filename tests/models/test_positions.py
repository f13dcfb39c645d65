"""Position embeddings for another grid."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import reference
from vit_jax.models.positions import resample

POSITIONS = "Transformer/posembed_input/pos_embedding"


def weights(old: int, new: int) -> np.ndarray:
    """(new, old) float64 weights of bilinear interpolation with aligned corners."""
    return np.stack(
        [np.interp(np.linspace(0, old - 1, new), np.arange(old), e) for e in np.eye(old)]
    ).T


def embedding(grid: tuple[int, int], *, class_token: bool, width: int = 3) -> np.ndarray:
    tokens = grid[0] * grid[1] + class_token
    return np.random.default_rng(0).normal(size=(1, tokens, width)).astype(np.float32)


def assert_bilinear(old: tuple[int, int], new: tuple[int, int], *, class_token: bool) -> None:
    stored = embedding(old, class_token=class_token)

    found = resample(stored, old, new, prefix=int(class_token))

    grid = stored[0, class_token:].astype(np.float64).reshape(*old, -1)
    expected = np.einsum("ab,cd,bde->ace", weights(old[0], new[0]), weights(old[1], new[1]), grid)
    assert found.dtype == np.float32
    assert found.shape == (1, new[0] * new[1] + class_token, 3)
    np.testing.assert_allclose(found[0, class_token:].reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_array_equal(found[0, :class_token], stored[0, :class_token])


sides = st.integers(1, 40)


@settings(max_examples=100, deadline=None)
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides), class_token=st.booleans())
def test_any_grid_becomes_any_other_with_corners_aligned(old, new, class_token):
    assert_bilinear(old, new, class_token=class_token)


@pytest.mark.parametrize("old", [7, 8, 12, 14, 16, 24, 28])
def test_the_last_row_is_no_row_of_zeros(old):
    """A published grid's last corner, computed, may lie a rounding error outside of the grid."""
    for new in range(1, 65):
        assert_bilinear((old, 2), (new, 2), class_token=True)


def test_the_same_grid_gives_the_same_array():
    stored = embedding((3, 4), class_token=True)

    assert resample(stored, (3, 4), (3, 4), prefix=1) is stored


def test_a_shape_with_as_many_patches_is_still_another_grid():
    stored = embedding((3, 4), class_token=False)

    assert not np.allclose(resample(stored, (3, 4), (4, 3), prefix=0), stored)


@pytest.mark.parametrize("case", list(reference.facts("interp")))
def test_the_original_codes_embeddings_come_out_bit_for_bit(case):
    facts = reference.facts("interp")[case]
    shapes = reference.official_shapes(facts["config"], facts["head"], facts["res"])
    stored = reference.make_params({POSITIONS: shapes[POSITIONS]}, facts["seed"])[POSITIONS]
    patch = reference.facts("manifests")[facts["config"]]["config"]["patches"]["size"][0]
    class_token = "cls" in shapes

    old, new = ((side // patch,) * 2 for side in (facts["res"], facts["dst_res"]))
    found = resample(stored, old, new, prefix=int(class_token))

    assert list(found.shape) == facts["pe_shape"]
    assert found.sum(dtype=np.float64) == facts["pe_sum"]
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == facts["pe_sha_f32"]


def pixel_by_pixel(row: np.ndarray, new: int, kernel, reach: float, *, antialias, offset=0.0):
    """One axis, written down from the definitions; row (old, d)."""
    old, out = len(row), []
    scale = old / (new + offset)
    wide = max(scale, 1) if antialias else 1
    for i in range(new):
        center = (i + 0.5) * scale - 0.5
        value, total = 0, 0
        for j in range(-100, old + 100):
            weight = kernel(abs(j - center) / wide) if abs(j - center) < reach * wide else 0
            if antialias and not 0 <= j < old:
                continue
            value = value + weight * row[min(max(j, 0), old - 1)]
            total += weight
        out.append(value / total)
    return np.array(out)


def cubic(a):
    def kernel(t):
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0

    return kernel


RULES = {
    "torch": (cubic(-0.75), 2, dict(antialias=False)),
    "torch-antialias": (cubic(-0.5), 2, dict(antialias=True)),
    "dinov2": (cubic(-0.75), 2, dict(antialias=False, offset=0.1)),
    "bilinear": (lambda t: 1 - t, 1, dict(antialias=False)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("old", "new"), [((5, 7), (9, 4)), ((8, 8), (3, 20)), ((6, 4), (6, 1))])
def test_rules_of_other_libraries_are_those_of_their_definition(rule, old, new):
    kernel, reach, more = RULES[rule]
    stored = embedding(old, class_token=True)

    found = resample(stored, old, new, prefix=1, rule=rule)

    grid = stored[0, 1:].reshape(*old, -1).astype(np.float64)
    rows = np.stack([pixel_by_pixel(c, new[0], kernel, reach, **more)
                     for c in grid.swapaxes(0, 1)], axis=1)  # fmt: skip
    expected = np.stack([pixel_by_pixel(r, new[1], kernel, reach, **more) for r in rows])
    np.testing.assert_allclose(found[0, 1:].reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_array_equal(found[0, :1], stored[0, :1])
