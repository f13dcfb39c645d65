"""Weights meet another number of channels by timm's rule."""

import math

import numpy as np
import pytest

from tests.families import SPECS
from vit_jax.errors import UserError


def timm_rule(kernel, channels):
    """As timm's manual describes it, of kernels as PyTorch has them, (out, in, h, w)."""
    if channels == 1:
        return kernel.sum(axis=1, keepdims=True)
    repeated = np.concatenate([kernel] * math.ceil(channels / 3), axis=1)
    return repeated[:, :channels] * (3 / channels)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 12])
@pytest.mark.parametrize("family", [name for name in SPECS if name != "T2T"])
def test_the_first_layer_follows_timms_rule_and_nothing_else_changes(family, channels):
    spec = SPECS[family]
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=shape).astype("f4") for k, shape in spec.shapes().items()}
    changed, new = spec.adapt(arrays, channels=channels)
    assert {k: v.shape for k, v in changed.items()} == new.shapes()
    assert new.channels == channels
    differing = [k for k in arrays if changed[k] is not arrays[k]]
    assert differing == [spec.first_layer]
    kernel = arrays[spec.first_layer].transpose(3, 2, 0, 1)
    np.testing.assert_allclose(
        changed[spec.first_layer].transpose(3, 2, 0, 1), timm_rule(kernel, channels), rtol=1e-6
    )


def test_grey_weights_meet_colours_and_others_are_refused():
    spec = SPECS["MAP"].replace(channels=1)
    arrays = {k: np.ones(shape, "f4") for k, shape in spec.shapes().items()}
    changed, _ = spec.adapt(arrays, channels=3)
    np.testing.assert_allclose(changed["embedding/kernel"].sum(axis=2), 1, rtol=1e-6)
    with pytest.raises(UserError, match="only those of 1 or 3 channels can"):
        spec.replace(channels=4).adapt(
            {"embedding/kernel": np.ones((4, 4, 4, 16), "f4")}, channels=3
        )
