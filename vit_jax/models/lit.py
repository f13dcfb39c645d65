"""LiT: an image tower and a text tower that embed into one space (arXiv:2111.07991)."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from vit_jax.errors import UserError
from vit_jax.models.family import (
    VARIANTS,
    Arrays,
    Hints,
    ImageModel,
    Shapes,
    Size,
    Spec,
    register,
    traced_shapes,
)
from vit_jax.models.kernels import Kernels
from vit_jax.models.shapes import below, num_outputs
from vit_jax.models.stack import BlockLoop
from vit_jax.models.text import BertModel, TextTransformer
from vit_jax.models.vit import VisionTransformer

TEXT_MODELS: dict[str, Any] = {"bert": BertModel, "text_transformer": TextTransformer}

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


# The published models, which `create_lit` makes; `image` names the image tower's variant.
LIT_VARIANTS: dict[str, dict[str, Any]] = {
    "LiT-B16B": _lit("ViT-B_16", "bert-base", (768, 768)),
    "LiT-B16B_2": _lit("ViT-B_16", "bert-base", (None, 768)),
    "LiT-L16L": _lit("ViT-L_16", "bert-large", (None, 1024)),
    "LiT-L16S": _lit("ViT-L_16", "S", (None, 1024)),
    "LiT-L16Ti": _lit("ViT-L_16", "Ti", (None, 1024)),
}


@register
class LiT(ImageModel):
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
      loop, kernels: of the image tower, see `VisionTransformer`.
    """

    image: Mapping[str, Any]
    text_model: str
    text: Mapping[str, Any]
    out_dim: tuple[int | None, int | None]
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    kind: ClassVar = "LiT bundle"
    classifier: ClassVar = "lit"
    classifiers: ClassVar = ("lit",)
    num_classes: ClassVar = None
    representation_size: ClassVar = None
    weightless: ClassVar = ("dtype",)
    classifies_by_text: ClassVar = True
    value_range: ClassVar = "uint8|value_range(-1, 1)"  # The towers saw whole grey levels.

    @property
    def vocabulary_suffixes(self) -> tuple[str, str]:
        """Of the tokenizer's file: WordPiece or SentencePiece, that of the text tower first."""
        return (".txt", ".model") if self.text_model == "bert" else (".model", ".txt")

    def __post_init__(self) -> None:
        # With a hash, as other modules have.
        self.image, self.text = FrozenDict(self.image), FrozenDict(self.text)
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
            pooled: Any = self._image_model(name="img")(images)
            zimg, out["img/norm"] = _normalize(pooled)
        if tokens is not None:
            embedding, features = self._text_model(name="txt")(tokens)
            ztxt, out["txt/norm"] = _normalize(embedding)
            out["txt/pre_logits"] = features["pre_logits"]
        out["t"] = jnp.exp(self.param("t", nn.initializers.zeros, (1,)))
        return zimg, ztxt, out

    def _image_model(self, **place: Any) -> VisionTransformer:
        """`place`: name and parent, as of any Flax module."""
        how = dict(dtype=self.dtype, loop=self.loop, kernels=self.kernels)
        return VisionTransformer(num_classes=self.out_dim[0], **self.image, **how, **place)

    def _text_model(self, **place: Any) -> Any:
        tower = TEXT_MODELS[self.text_model]
        return tower(num_classes=self.out_dim[1], dtype=self.dtype, **self.text, **place)

    def image_tower(self) -> VisionTransformer:
        return self._image_model(parent=None)

    def image_params(self, params: Any) -> Any:
        return params["img"]

    @property
    def stride(self) -> Size:
        return self.image_tower().stride

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        return self.image_tower().grid_size(image_size)

    @property
    def num_prefix_tokens(self) -> int:
        return self.image_tower().num_prefix_tokens

    @classmethod
    def recognizes(cls, shapes: Shapes) -> bool:
        return any(key.startswith("txt/") for key in shapes)

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints) -> Spec:
        text = below(shapes, "txt/")
        image = VisionTransformer.from_shapes(
            below(shapes, "img/"),
            hints._replace(classifier=None, where=f"{hints.where} (img/)"),
        )
        bert = any(key.startswith("BertEncoder_0/") for key in text)
        text_model = "bert" if bert else "text_transformer"
        fields = TEXT_MODELS[text_model].fields_from_shapes(text, f"{hints.where} (txt/)")
        try:
            model = cls(
                image={k: v for k, v in image.architecture().items() if k != "num_classes"},
                text_model=text_model,
                text=fields,
                out_dim=(image.num_classes, num_outputs(text, "head")),
            )
        except UserError as e:
            raise UserError(f"{hints.where}: {e}") from e
        return Spec(model, image.image_size, image.channels)

    def shapes(self, image_size: Size, channels: int) -> dict[str, tuple[int, ...]]:
        image = self.image_tower().shapes(image_size, channels)
        tower = self._text_model(parent=None)
        text = traced_shapes(tower, jax.ShapeDtypeStruct((1, tower.max_len), jnp.int32))
        both = {f"img/{k}": v for k, v in image.items()} | {f"txt/{k}": v for k, v in text.items()}
        return both | {"t": (1,)}

    @property
    def first_layer(self) -> str:
        return f"img/{self.image_tower().first_layer}"

    def resize(self, arrays: Arrays, old: Size, new: Size) -> Arrays:
        image = self.image_tower().resize(below(arrays, "img/"), old, new)
        return arrays | {f"img/{key}": array for key, array in image.items()}

    def with_head(
        self, arrays: Arrays, num_classes: int | None, pre_logits: bool | None
    ) -> tuple["LiT", Arrays]:
        if num_classes is not None or pre_logits is not None:
            raise UserError(
                "these weights are a LiT bundle, which has no classes: leave num_classes and "
                "pre_logits out, and classify by words (zero-shot)"
            )
        return self, dict(arrays)

    def official_name(self) -> str | None:
        image = self.image_tower().official_name()
        own = (image, self.text_model, self.out_dim)
        for name, fields in LIT_VARIANTS.items():
            same = own == (fields["image"], fields["text_model"], fields["out_dim"])
            if same and all(self.text[k] == v for k, v in fields["text"].items()):
                return name
        return None

    def description(self) -> str:
        image = self.image_tower().description()
        return self.official_name() or f"a LiT bundle of {image} and a {self.text_model}"

    def summary(self) -> dict[str, str]:
        image, text = self.image_tower(), self._text_model(parent=None)
        return image.summary() | {
            "image tower": image.description(),
            "text tower": f"{self.text_model}: {text.num_layers} blocks, {text.hidden_size} wide, "
            f"{text.num_heads} heads, {text.vocab_size:,} words",
            "embeddings": f"{self.embedding_size} wide",
        }

    def facts(self, image_size: Size, channels: int) -> dict[str, Any]:
        return {
            "image": self.image_tower().facts(image_size, channels),
            "text_model": self.text_model,
            "text": list(self.text.items()),
            "text_classes": self.out_dim[1],
        }


def create_lit(name: str, **overrides: Any) -> LiT:
    """Makes a published LiT model by name.

    Args:
      name: e.g. "LiT-B16B_2"; the "LiT-" may be left out.
      **overrides: fields of `LiT`, e.g. dtype.

    Returns:
      A Linen module: `model.apply({"params": params}, images=images, tokens=tokens)`.

    Raises UserError for an unknown name.
    """
    official = name if name.startswith("LiT-") else f"LiT-{name}"
    if official not in LIT_VARIANTS:
        near = difflib.get_close_matches(official, LIT_VARIANTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(LIT_VARIANTS)}"
        raise UserError(f"unknown model {name!r}: {hint}")
    fields = LIT_VARIANTS[official]
    return LiT(**(fields | dict(image=VARIANTS[fields["image"]]) | overrides))


def _normalize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(n, d) -> (n, d) of length 1, and the lengths (n, 1)."""
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / (norm + 1e-8), norm
