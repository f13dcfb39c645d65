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
