"""How batches change weights: state, step, optimizer, parallelism, the run.

Names are looked up on first use: `vit-jax train --help` needs the table of fields alone.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax.sharding import make_mesh
    from vit_jax.training.config import check_config, default_config
    from vit_jax.training.optimizer import make_optimizer, make_schedule
    from vit_jax.training.run import run
    from vit_jax.training.state import TrainState
    from vit_jax.training.step import make_train_step

_HOMES = {
    "TrainState": "training.state",
    "check_config": "training.config",
    "default_config": "training.config",
    "make_mesh": "sharding",
    "make_optimizer": "training.optimizer",
    "make_schedule": "training.optimizer",
    "make_train_step": "training.step",
    "run": "training.run",
}
__all__ = [
    "TrainState",
    "check_config",
    "default_config",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "run",
]


class _Package(ModuleType):
    """`training.run` is the function, whoever imports the file of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "run" or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vit_jax.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vit_jax.{_HOMES[name]}"), name)
