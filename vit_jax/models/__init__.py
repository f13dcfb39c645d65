"""What a network is: pure Flax Linen modules, and the table of the official variants."""

import dataclasses
import difflib
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.vit import CLASSIFIERS, VisionTransformer

__all__ = ["CLASSIFIERS", "VARIANTS", "VisionTransformer", "create_model", "list_models", "variant"]

# Width, depth, MLP width and heads: Table 1 of arXiv:2010.11929 (B, L, H) and Table 2 of
# arXiv:2106.10270 (Ti, S).
_SIZES = {
    "Ti": dict(hidden_size=192, num_layers=12, mlp_dim=768, num_heads=3),
    "S": dict(hidden_size=384, num_layers=12, mlp_dim=1536, num_heads=6),
    "B": dict(hidden_size=768, num_layers=12, mlp_dim=3072, num_heads=12),
    "L": dict(hidden_size=1024, num_layers=24, mlp_dim=4096, num_heads=16),
    "H": dict(hidden_size=1280, num_layers=32, mlp_dim=5120, num_heads=16),
}


def _vit(size: str, patch: int, classifier: str = "token", **more: Any) -> dict[str, Any]:
    return dict(_SIZES[size], patch_size=(patch, patch), classifier=classifier, **more)


VARIANTS: dict[str, dict[str, Any]] = {
    "ViT-Ti_16": _vit("Ti", 16),
    "ViT-S_16": _vit("S", 16),
    "ViT-S_32": _vit("S", 32),
    "ViT-B_8": _vit("B", 8),
    "ViT-B_16": _vit("B", 16),
    "ViT-B_32": _vit("B", 32),
    "ViT-L_16": _vit("L", 16, dropout_rate=0.1),
    "ViT-L_32": _vit("L", 32),
    "ViT-H_14": _vit("H", 14, dropout_rate=0.1),
    # Global average pooling instead of a class token, no representation layer (arXiv:2106.01548).
    "ViT-S_16-gap-norep": _vit("S", 16, "gap"),
    "ViT-S_32-gap-norep": _vit("S", 32, "gap"),
    "ViT-B_16-gap-norep": _vit("B", 16, "gap"),
    "ViT-B_32-gap-norep": _vit("B", 32, "gap"),
}


def list_models() -> list[str]:
    """The official names that `create_model` knows."""
    return list(VARIANTS)


def variant(name: str) -> dict[str, Any]:
    """The fields of a named variant, by its official name with or without the leading "ViT-".

    Raises UserError naming the nearest names if there is none.
    """
    for key in (name, f"ViT-{name}"):
        if key in VARIANTS:
            return dict(VARIANTS[key])
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VARIANTS)}"
    raise UserError(f"unknown model {name!r}: {hint}")


def create_model(name: str, num_classes: int | None = None, **overrides: Any) -> VisionTransformer:
    """Makes an official model by name.

    Args:
      name: an official name, e.g. "ViT-Ti_16"; see `list_models`.
      num_classes: width of the head; None for the features without a head.
      **overrides: any other field of `VisionTransformer`, e.g. dropout_rate=0.1 or
        patch_size=(20, 20).

    Returns:
      A Linen module: `model.init(rng, images, train=False)`, `model.apply(variables, images)`.

    Raises UserError for an unknown name or field.
    """
    fields = variant(name)
    known = {f.name for f in dataclasses.fields(VisionTransformer)} - {"parent", "name"}
    for field in overrides:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown field {field!r} of model {name}: {hint}")
    return VisionTransformer(num_classes=num_classes, **(fields | overrides))
