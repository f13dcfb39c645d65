"""What a network is: pure Flax Linen modules, and the table of the official variants."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.lit import LIT_VARIANTS, LiT, create_lit
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.vit import CLASSIFIERS, POOLED, POSITION_EMBEDDINGS, VisionTransformer

__all__ = [
    "CLASSIFIERS",
    "LIT_VARIANTS",
    "POOLED",
    "POSITION_EMBEDDINGS",
    "VARIANTS",
    "LiT",
    "MlpMixer",
    "VisionTransformer",
    "create_lit",
    "create_model",
    "list_models",
    "model_class",
    "variant",
]

# Width, depth, MLP width and heads: Table 1 of arXiv:2010.11929 (B, L, H), Table 2 of
# arXiv:2106.10270 (Ti, S), Table 2 of arXiv:2106.04560 and big_vision's names (the others).
_SIZES = {
    "mu": dict(hidden_size=32, num_layers=1, mlp_dim=128, num_heads=2),
    "Ti": dict(hidden_size=192, num_layers=12, mlp_dim=768, num_heads=3),
    "S": dict(hidden_size=384, num_layers=12, mlp_dim=1536, num_heads=6),
    "M": dict(hidden_size=512, num_layers=12, mlp_dim=2048, num_heads=8),
    "B": dict(hidden_size=768, num_layers=12, mlp_dim=3072, num_heads=12),
    "L": dict(hidden_size=1024, num_layers=24, mlp_dim=4096, num_heads=16),
    "So400m": dict(hidden_size=1152, num_layers=27, mlp_dim=4304, num_heads=16),
    "H": dict(hidden_size=1280, num_layers=32, mlp_dim=5120, num_heads=16),
    "g": dict(hidden_size=1408, num_layers=40, mlp_dim=6144, num_heads=16),
    "g-opt": dict(hidden_size=1536, num_layers=40, mlp_dim=6144, num_heads=16),
    "G": dict(hidden_size=1664, num_layers=48, mlp_dim=8192, num_heads=16),
    "G-opt": dict(hidden_size=1536, num_layers=48, mlp_dim=8192, num_heads=16),
    "e": dict(hidden_size=1792, num_layers=56, mlp_dim=15360, num_heads=16),
}

# Table 1 of arXiv:2105.01601.
_MIXER_SIZES = {
    "B": dict(hidden_size=768, num_layers=12, tokens_mlp_dim=384, channels_mlp_dim=3072),
    "L": dict(hidden_size=1024, num_layers=24, tokens_mlp_dim=512, channels_mlp_dim=4096),
}


def _vit(size: str, patch: int, classifier: str = "token", **more: Any) -> dict[str, Any]:
    return dict(_SIZES[size], patch_size=(patch, patch), classifier=classifier, **more)


def _mixer(size: str, patch: int) -> dict[str, Any]:
    return dict(_MIXER_SIZES[size], patch_size=(patch, patch))


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
    # Hybrids. The patch is counted in steps of the ResNet's features, the name counts pixels; that
    # of R+ViT-Ti_16 is a misnomer, its patches are 32 pixels wide.
    "R+ViT-Ti_16": _vit("Ti", 8, resnet=()),
    "R26+ViT-S_32": _vit("S", 1, resnet=(2, 2, 2, 2)),
    "R26+ViT-B_32": _vit("B", 1, resnet=(2, 2, 2, 2)),
    "R50+ViT-B_16": _vit("B", 1, resnet=(3, 4, 9), dropout_rate=0.1),
    "R50+ViT-L_32": _vit("L", 1, resnet=(3, 4, 6, 3), dropout_rate=0.1),
    # The sizes of the scaling studies, with attention pooling (arXiv:2106.04560, arXiv:2305.13035).
    "ViT-mu_16": _vit("mu", 16, "map"),
    "ViT-M_16": _vit("M", 16, "map"),
    "ViT-So400m_14": _vit("So400m", 14, "map"),
    "ViT-g_14": _vit("g", 14, "map"),
    "ViT-g-opt_14": _vit("g-opt", 14, "map"),
    "ViT-G_14": _vit("G", 14, "map"),
    "ViT-G-opt_14": _vit("G-opt", 14, "map"),
    "ViT-e_14": _vit("e", 14, "map"),
    "Mixer-B_16": _mixer("B", 16),
    "Mixer-B_32": _mixer("B", 32),
    "Mixer-L_16": _mixer("L", 16),
}


def list_models() -> list[str]:
    """The official names that `create_model` knows."""
    return list(VARIANTS)


def variant(name: str) -> dict[str, Any]:
    """The fields of a named variant, by its official name or the one in AugReg file names.

    The latter leaves "ViT-" out and has "_" for "+": "Ti_16", "R26_S_32".

    Raises UserError naming the nearest names if there is none.
    """
    if name in VARIANTS:
        return dict(VARIANTS[name])
    for official, fields in VARIANTS.items():
        if name in (official.replace("ViT-", ""), official.replace("ViT-", "").replace("+", "_")):
            return dict(fields)
    near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(VARIANTS)}"
    raise UserError(f"unknown model {name!r}: {hint}")


def model_class(fields: Mapping[str, Any]) -> type[VisionTransformer] | type[MlpMixer]:
    """The module that a variant's fields are of."""
    return MlpMixer if "tokens_mlp_dim" in fields else VisionTransformer


def create_model(
    name: str, num_classes: int | None = None, **overrides: Any
) -> VisionTransformer | MlpMixer:
    """Makes an official model by name.

    Args:
      name: an official name, e.g. "ViT-Ti_16"; see `list_models`.
      num_classes: width of the head; None for the features without a head.
      **overrides: any other field of the module, e.g. dropout_rate=0.1 or patch_size=(20, 20).

    Returns:
      A Linen module: `model.init(rng, images, train=False)`, `model.apply(variables, images)`.

    Raises UserError for an unknown name or field.
    """
    fields = variant(name)
    module = model_class(fields)
    known = {f.name for f in dataclasses.fields(module)} - {"parent", "name"}
    for field in overrides:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UserError(f"unknown field {field!r} of model {name}: {hint}")
    return module(num_classes=num_classes, **(fields | overrides))
