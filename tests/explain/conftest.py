"""Small networks of every kind that has attention."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

from tests import families
from vit_jax.pretrained import Pretrained

# What is changed of a family of `tests.families`; images are 20 x 27 pixels, so that the grid is
# not square and border pixels fill no patch.
_OBLONG = dict(image_size=(20, 27))
KINDS: dict[str, tuple[str, dict]] = {
    "token": ("sincos2d token", dict(position_embedding="learned", **_OBLONG)),
    "gap": ("sincos2d", dict(position_embedding="learned", **_OBLONG)),
    "sincos2d": ("sincos2d", _OBLONG),
    "unpooled": ("MAP", dict(classifier="unpooled", representation_size=None, **_OBLONG)),
    "MAP": ("MAP", _OBLONG),
    "hybrid": ("hybrid", dict(image_size=(40, 64))),
    "grey": ("MAP", dict(channels=1)),
    "LiT": ("LiT", {}),
    "T2T": ("T2T", dict(image_size=(33, 52))),
}


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Callable[..., Pretrained]:
    """Gives one of KINDS, with fields of it changed; the same to all tests."""

    @functools.cache
    def make(kind: str, **changes) -> Pretrained:
        family, fields = KINDS[kind]
        vit = families.make(family, tmp_path_factory.mktemp("words"), **(fields | changes))
        size = tuple(vit.image_size)
        return dataclasses.replace(vit, preprocess=f"resize({size})|value_range(-1, 1)")

    return make


def random_images(vit: Pretrained, n: int = 2) -> np.ndarray:
    """Preprocessed noise."""
    shape = n, *vit.image_size, vit.spec.channels
    return np.random.default_rng(n).uniform(-1, 1, shape).astype(np.float32)
