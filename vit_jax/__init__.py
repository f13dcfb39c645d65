"""Vision Transformers in JAX and Flax.

The public names are `list_models`, `create_model`, `load` and the sub-packages `models`,
`checkpoints`, `data`, `evaluation`, `explain` and `training`.
"""

from typing import TYPE_CHECKING, Any

from vit_jax import original
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.models import create_model, list_models
    from vit_jax.pretrained import Pretrained, load

__version__ = "0.1.0"
__all__ = ["Pretrained", "UserError", "create_model", "list_models", "load"]

_HOME = {
    "create_model": "vit_jax.models",
    "list_models": "vit_jax.models",
    "Pretrained": "vit_jax.pretrained",
    "load": "vit_jax.pretrained",
}


original.answer_imports()


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `import vit_jax` costs next to nothing.
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in ("checkpoints", "data", "evaluation", "explain", "models", "pretrained", "training"):
        return importlib.import_module(f"vit_jax.{name}")
    if name in original.MODULES:  # `from vit_jax import NAME` goes on, and finds it explained, too.
        raise AttributeError(str(original.explain(name)))
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
