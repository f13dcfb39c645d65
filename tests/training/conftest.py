"""Fixtures of the tests of training."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from vit_jax.training import outputs, run
from vit_jax.training.options import load_config, override

# The module; `training.run` is the function.
run_module = importlib.import_module("vit_jax.training.run")
TINY = Path(__file__).resolve().parents[1] / "tiny.py"


@pytest.fixture(scope="session")
def whole(tmp_path_factory, _compile_once) -> Path:
    """The workdir of a very small run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    result = run(load_config(str(TINY)), workdir)
    assert (result.finished, result.step) == (True, 40)
    return workdir


@pytest.fixture(scope="session")
def tiny():
    """Makes the configuration of a very small run; `tiny("total_steps=8")` changes fields."""

    def make(*fields: str) -> ConfigDict:
        return override(load_config(str(TINY)), [f"--config.{field}" for field in fields])

    return make


@pytest.fixture(scope="session")
def outcome():
    """Reads what a run leaves that must be the same whenever and wherever it runs."""

    def read(workdir: Path) -> tuple[dict[str, bytes], list[dict]]:
        with np.load(workdir / "weights.npz", allow_pickle=False) as arrays:
            weights = {name: arrays[name].tobytes() for name in arrays.files}
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        return weights, [
            {k: v for k, v in line.items() if not k.startswith("time/")} for line in lines
        ]

    return read


@pytest.fixture
def no_image(monkeypatch):
    """Drawing the report takes most of so small a run; the first of all draws it."""
    monkeypatch.setattr(outputs, "write_report", lambda report, path: path.touch())


@pytest.fixture(scope="session")
def saved_steps():
    """Reads the steps of which a run has checkpoints."""

    def read(workdir: Path) -> list[int]:
        return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())

    return read
