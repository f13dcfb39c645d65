"""How batches change weights: state, step, optimizer, parallelism, the loop."""

from typing import TYPE_CHECKING, Any

from vit_jax.sharding import make_mesh
from vit_jax.training.config import check_config
from vit_jax.training.fields import default_config
from vit_jax.training.optimizer import make_optimizer, make_schedule
from vit_jax.training.state import TrainState
from vit_jax.training.step import make_train_step

if TYPE_CHECKING:
    from vit_jax.training.trainer import run

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


def __getattr__(name: str) -> Any:
    if name == "run":  # The only one that needs data and checkpoints, which are slow to import.
        from vit_jax.training.trainer import run

        return run
    raise AttributeError(f"module 'vit_jax.training' has no attribute {name!r}")
