"""LiT: an image tower and a text tower that embed into one space (arXiv:2111.07991)."""

import difflib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.kernels import Kernels
from vit_jax.models.text import BertModel, TextTransformer
from vit_jax.models.vit import VisionTransformer

TEXT_MODELS = {"bert": BertModel, "text_transformer": TextTransformer}

_TEXT = {
    # Table 1 of arXiv:1810.04805.
    "bert-base": dict(hidden_size=768, num_layers=12, num_heads=12, mlp_dim=3072),
    "bert-large": dict(hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096),
    "S": dict(hidden_size=384, num_layers=12, num_heads=6, mlp_dim=1536),
    "Ti": dict(hidden_size=192, num_layers=12, num_heads=3, mlp_dim=768),
}


def _lit(image: str, text: str, out_dim: tuple[int | None, int]) -> dict[str, Any]:
    text_model = "bert" if text.startswith("bert") else "text_transformer"
    return dict(image=image, text_model=text_model, text=_TEXT[text], out_dim=out_dim)


# The published models; `image` names the image tower's variant.
LIT_VARIANTS: dict[str, dict[str, Any]] = {
    "LiT-B16B": _lit("ViT-B_16", "bert-base", (768, 768)),
    "LiT-B16B_2": _lit("ViT-B_16", "bert-base", (None, 768)),
    "LiT-L16L": _lit("ViT-L_16", "bert-large", (None, 1024)),
    "LiT-L16S": _lit("ViT-L_16", "S", (None, 1024)),
    "LiT-L16Ti": _lit("ViT-L_16", "Ti", (None, 1024)),
}


class LiT(nn.Module):
    """An image tower `img`, a text tower `txt` and a log-temperature `t`.

    The probability of text j among several for image i is the softmax over j of
    out["t"] * zimg[i] . ztxt[j].

    Attributes:
      image: fields of the image tower, a `VisionTransformer`, without num_classes.
      text_model: "bert" or "text_transformer".
      text: fields of the text tower, `BertModel` or `TextTransformer`, without num_classes.
      out_dim: widths of the projections on top of the image and of the text tower; None for no
        projection. Towers that end with unequal widths raise UserError.
      dtype: what is computed in, float32 or bfloat16. Parameters and embeddings are float32.
      kernels: of the image tower, see `VisionTransformer`.
    """

    image: Mapping[str, Any]
    text_model: str
    text: Mapping[str, Any]
    out_dim: tuple[int | None, int | None]
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def __post_init__(self) -> None:
        super().__post_init__()
        image, text = self._widths()
        if image != text:
            raise UserError(
                f"the image tower gives {image} numbers and the text tower {text}, expected as "
                "many: choose out_dim to make them equal"
            )

    def _widths(self) -> list[int]:
        towers = zip(self.out_dim, (self.image, self.text), strict=True)
        return [
            width or fields.get("representation_size") or fields["hidden_size"]
            for width, fields in towers
        ]

    @property
    def embedding_size(self) -> int:
        """Width of the embeddings, d."""
        return self._widths()[0]

    @nn.compact
    def __call__(
        self, images: jax.Array | None = None, tokens: jax.Array | None = None
    ) -> tuple[jax.Array | None, jax.Array | None, Mapping[str, jax.Array]]:
        """Embeds images, texts, or both.

        Args:
          images: (n, h, w, c) float in [-1, 1], or None.
          tokens: int (m, 16) from one of `vit_jax.tokenizers`, or None.

        Returns:
          (zimg, ztxt, out). Embeddings of length 1, float32 (n, d) and (m, d), None for what was
          not given. `out` holds "t" (1,), the temperature to multiply with, the lengths before
          normalisation "img/norm" (n, 1) and "txt/norm" (m, 1), and "txt/pre_logits" (m, width).

        Raises UserError for arrays of another shape.
        """
        zimg, ztxt, out = None, None, {}
        if images is not None:
            tower = VisionTransformer(
                num_classes=self.out_dim[0],
                dtype=self.dtype,
                kernels=self.kernels,
                **self.image,
                name="img",
            )
            pooled: Any = tower(images)
            zimg, out["img/norm"] = _normalize(pooled)
        if tokens is not None:
            text_tower = TEXT_MODELS[self.text_model](
                num_classes=self.out_dim[1], dtype=self.dtype, **self.text, name="txt"
            )
            embedding, features = text_tower(tokens)
            ztxt, out["txt/norm"] = _normalize(embedding)
            out["txt/pre_logits"] = features["pre_logits"]
        out["t"] = jnp.exp(self.param("t", nn.initializers.zeros, (1,)))
        return zimg, ztxt, out


def create_lit(name: str, **overrides: Any) -> LiT:
    """Makes a published LiT model by name.

    Args:
      name: e.g. "LiT-B16B_2"; the "LiT-" may be left out.
      **overrides: fields of `LiT`, e.g. dtype.

    Returns:
      A Linen module: `model.apply({"params": params}, images=images, tokens=tokens)`.

    Raises UserError for an unknown name.
    """
    from vit_jax.models import variant  # That package imports this module.

    official = name if name.startswith("LiT-") else f"LiT-{name}"
    if official not in LIT_VARIANTS:
        near = difflib.get_close_matches(official, LIT_VARIANTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(LIT_VARIANTS)}"
        raise UserError(f"unknown model {name!r}: {hint}")
    fields = LIT_VARIANTS[official]
    return LiT(**(fields | dict(image=variant(fields["image"])) | overrides))


def _normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(n, d) -> (n, d) of length 1, and the lengths (n, 1)."""
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / (norm + 1e-8), norm
