"""Fixtures of the tests of the command line."""

from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from tests.training.conftest import whole  # noqa: F401
from vit_jax.checkpoints import save_weights
from vit_jax.cli import main
from vit_jax.models import create_model


@pytest.fixture
def fails(capfd):
    """Runs a command that has to end with exit status 2 and one line, which is returned."""

    def run(*argv) -> str:
        capfd.readouterr()
        assert main([str(a) for a in argv]) == 2
        text = capfd.readouterr().err.splitlines()
        # A run may have reported progress before.
        lines = [line for line in text if line.startswith("vit-jax: ")]
        assert lines == text[-1:]
        assert not any("Traceback" in line for line in text)
        return lines[0].removeprefix("vit-jax: ")

    return run


def write_images(folder: Path, count: int, size: int = 24) -> Path:
    """Noise of two kinds, `count` images of each, as folder/<class>/<number>.jpg."""
    rng = np.random.default_rng(0)
    for name, low in (("bright", 128), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(low, low + 128, (size, size + i % 3, 3), np.uint8)
            cv2.imwrite(str(folder / name / f"{i}.jpg"), image)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", 10)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A file of small weights for RGB images of 16 pixels in two classes."""
    path = tmp_path_factory.mktemp("weights") / "small.npz"
    fields = dict(patch_size=(8, 8), hidden_size=64, num_layers=1, num_heads=1, mlp_dim=16)
    model = create_model("ViT-Ti_16", num_classes=2, **fields)
    save_weights(path, model.init(jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"])
    return path
