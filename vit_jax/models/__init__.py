"""What a network is: pure Flax Linen modules, a family a file, and the models that have a name."""

import dataclasses
import difflib
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.family import FAMILIES, VARIANTS, ImageModel, Spec, register, unregister
from vit_jax.models.kernels import Kernels, choose_kernels
from vit_jax.models.lit import LIT_VARIANTS, LiT, create_lit
from vit_jax.models.mixer import MlpMixer

# Importing a family makes it known. What none recognises is taken for the first one, the ViT.
from vit_jax.models.swin import SwinTransformer
from vit_jax.models.t2t import T2TViT
from vit_jax.models.vit import CLASSIFIERS, POOLED, POSITION_EMBEDDINGS, VisionTransformer

__all__ = [
    "CLASSIFIERS",
    "FAMILIES",
    "LIT_VARIANTS",
    "POOLED",
    "POSITION_EMBEDDINGS",
    "VARIANTS",
    "ImageModel",
    "Kernels",
    "LiT",
    "MlpMixer",
    "Spec",
    "SwinTransformer",
    "T2TViT",
    "VisionTransformer",
    "choose_kernels",
    "create_lit",
    "create_model",
    "family_of",
    "list_models",
    "register",
    "unregister",
    "variant",
]


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(VARIANTS)


def variant(name: str) -> dict[str, Any]:
    """The fields of a named variant, by its official name or the one in AugReg file names.

    The latter leaves "ViT-" out and has "_" for "+": "Ti_16", "R26_S_32".

    Raises UserError naming the nearest names if there is none.
    """
    return dict(VARIANTS[_official(name)])


def family_of(name: str) -> type[ImageModel]:
    """The module that a named variant is of. Raises UserError as `variant`."""
    official = _official(name)
    return next(family for family in FAMILIES if official in family.variants)


def _official(name: str) -> str:
    if name in VARIANTS:
        return name
    for official in VARIANTS:
        if name in (official.replace("ViT-", ""), official.replace("ViT-", "").replace("+", "_")):
            return official
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VARIANTS)}"
    raise UserError(f"unknown model {name!r}: {hint}")


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> Any:
    """Makes an official model by name.

    Args:
      name: an official name, e.g. "ViT-Ti_16"; see `list_models`.
      num_classes: width of the head; None for the features without a head.
      **overrides: any other field of the module, e.g. dropout_rate=0.1 or patch_size=(20, 20).

    Returns:
      A Linen module: `model.init(rng, images, train=False)`, `model.apply(variables, images)`.

    Raises UserError for an unknown name or field.
    """
    family: Any = family_of(name)
    known = {f.name for f in dataclasses.fields(family)} - {"parent", "name"}
    for field in overrides:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown field {field!r} of model {name}: {hint}")
    return family(num_classes=num_classes, **(variant(name) | overrides))
