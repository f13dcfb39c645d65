"""Architectures in numbers: what is needed to build a network and to feed it."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vit_jax.models import VARIANTS, MlpMixer, VisionTransformer
from vit_jax.models.lit import LIT_VARIANTS, TEXT_MODELS, LiT

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _ImageSpec:
    """What all networks for images have.

    patch_size and image_size are (height, width); num_classes is None where there is no head.
    """

    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_classes: int | None
    channels: int
    image_size: tuple[int, int]

    module: ClassVar[type[nn.Module]]
    kind: ClassVar[str]  # What a person calls such a network.

    @property
    def name(self) -> str | None:
        """The official name of this architecture, or None if it has none."""
        defaults = {"resnet": None, "position_embedding": "learned"}
        for name, fields in VARIANTS.items():
            fields = {k: v for k, v in (defaults | fields).items() if k != "dropout_rate"}
            if all(getattr(self, k, defaults.get(k)) == v for k, v in fields.items()):
                return name
        return None

    @property
    def description(self) -> str:
        """The official name, or what the network is."""
        return self.name or (
            f"a {self.kind} of width {self.hidden_size} and {self.num_layers} blocks"
        )

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.model().grid_size(self.image_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, the class token among them."""
        return math.prod(self.grid_size)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def summary(self) -> dict[str, str]:
        """What a person wants to know of the network, {title: text}."""
        (rows, columns), (h, w) = self.grid_size, self.image_size
        return {
            "architecture": self.description,
            "parameters": f"{self.num_parameters:,}",
            "blocks": f"{self.num_layers}, {self.hidden_size} wide",
            "patches": "{}x{} pixels, ".format(*self.model().stride)
            + f"{rows}x{columns} of them, {self.num_tokens} tokens in all",
            "images": f"{h}x{w} pixels, {self.channels} channels",
        }

    @property
    def traced_size(self) -> tuple[int, int]:
        """(height, width) of images that tell all shapes: one patch where positions are fixed."""
        if getattr(self, "position_embedding", "learned") == "learned":
            return self.image_size
        (h, w), stride = self.image_size, self.model().stride
        return min(h, stride[0]), min(w, stride[1])

    def fields(self) -> dict[str, Any]:
        """The fields of the module that depend on the architecture."""
        names = {f.name for f in dataclasses.fields(self.module)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names}

    def model(self, **overrides: Any) -> Any:
        """The network. Overrides are fields of the module, e.g. dropout_rate."""
        return self.module(**(self.fields() | overrides))

    def shapes(self) -> Shapes:
        """Name and shape of every parameter, {"a/b/c": shape}."""
        images = jax.ShapeDtypeStruct((1, *self.traced_size, self.channels), jnp.float32)
        return _init_shapes(self.model, self.num_layers, images)


@dataclasses.dataclass(frozen=True)
class Spec(_ImageSpec):
    """A Vision Transformer, hybrid ones included; see `models.VisionTransformer` for the fields."""

    num_heads: int
    mlp_dim: int
    classifier: str
    representation_size: int | None = None
    resnet: tuple[int, ...] | None = None
    position_embedding: str = "learned"

    module = VisionTransformer
    kind = "ViT"

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, the class token among them."""
        return math.prod(self.grid_size) + self.model().has_class_token

    def summary(self) -> dict[str, str]:
        """What a person wants to know of the network, {title: text}."""
        lines = super().summary()
        lines["blocks"] += f", {self.num_heads} heads, MLP {self.mlp_dim} wide"
        lines["classifier"] = self.classifier
        width = self.representation_size
        lines["pre_logits"] = f"tanh, {width} wide" if width else "none"
        if self.resnet is not None:
            lines["resnet"] = (
                f"a root and stages of {', '.join(map(str, self.resnet)) or 'no'} units"
            )
        if self.position_embedding != "learned":
            lines["positions"] = self.position_embedding
        return lines


@dataclasses.dataclass(frozen=True)
class MixerSpec(_ImageSpec):
    """An MLP-Mixer; see `models.MlpMixer` for the fields."""

    tokens_mlp_dim: int
    channels_mlp_dim: int

    module = MlpMixer
    kind = "Mixer"

    def summary(self) -> dict[str, str]:
        """What a person wants to know of the network, {title: text}."""
        lines = super().summary()
        lines["blocks"] += f", MLPs {self.tokens_mlp_dim} wide over tokens"
        lines["blocks"] += f" and {self.channels_mlp_dim} over channels"
        return lines

    classifier: ClassVar[str] = "gap"
    representation_size: ClassVar[None] = None


@dataclasses.dataclass(frozen=True)
class LiTSpec:
    """A LiT bundle.

    Attributes:
      image: the image tower; its num_classes is the width of the projection, or None.
      text_model: "bert" or "text_transformer".
      text: fields of the text tower, as ordered pairs.
      text_classes: width of the text tower's projection, or None.
    """

    image: Spec
    text_model: str
    text: tuple[tuple[str, int], ...]
    text_classes: int | None

    classifier: ClassVar[str] = "lit"
    num_classes: ClassVar[None] = None
    representation_size: ClassVar[None] = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the image tower's positions are for."""
        return self.image.image_size

    @property
    def channels(self) -> int:
        """Colour channels of an image."""
        return self.image.channels

    @property
    def name(self) -> str | None:
        """The official name of this architecture, or None if it has none."""
        text = dict(self.text)
        for name, fields in LIT_VARIANTS.items():
            if (
                fields["image"] == self.image.name
                and fields["text_model"] == self.text_model
                and fields["out_dim"] == (self.image.num_classes, self.text_classes)
                and all(text[k] == v for k, v in fields["text"].items())
            ):
                return name
        return None

    @property
    def description(self) -> str:
        """The official name, or what the network is."""
        return self.name or f"a LiT bundle of {self.image.description} and a {self.text_model}"

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def summary(self) -> dict[str, str]:
        """What a person wants to know of the network, {title: text}."""
        text = dict(self.text)
        width = self.text_classes or text["hidden_size"]
        return {
            **self.image.summary(),
            "architecture": self.description,
            "parameters": f"{self.num_parameters:,}",
            "image tower": self.image.description,
            "text tower": f"{self.text_model}: {text['num_layers']} blocks, {text['hidden_size']} "
            f"wide, {text['num_heads']} heads, {text['vocab_size']:,} words",
            "embeddings": f"{width} wide",
        }

    def model(self, **overrides: Any) -> LiT:
        """The network. Overrides are fields of `LiT`, e.g. dtype."""
        image = {k: v for k, v in self.image.fields().items() if k != "num_classes"}
        fields: dict[str, Any] = {
            "image": image,
            "text_model": self.text_model,
            "text": dict(self.text),
            "out_dim": (self.image.num_classes, self.text_classes),
        }
        return LiT(**(fields | overrides))

    def shapes(self) -> Shapes:
        """Name and shape of every parameter, {"img/...": shape, "txt/...": shape, "t": shape}."""
        self.model()  # Raises UserError if the towers end with unequal widths.
        text = dict(self.text)
        tokens = jax.ShapeDtypeStruct((1, text["max_len"]), jnp.int32)
        fields: dict[str, Any] = text | {"num_classes": self.text_classes}
        tower = functools.partial(TEXT_MODELS[self.text_model], **fields)
        shapes = {f"img/{key}": shape for key, shape in self.image.shapes().items()}
        for key, shape in _init_shapes(tower, text["num_layers"], tokens).items():
            shapes[f"txt/{key}"] = shape
        return shapes | {"t": (1,)}


AnySpec = Spec | MixerSpec | LiTSpec


def _init_shapes(
    make: Callable[..., nn.Module], num_layers: int, inputs: jax.ShapeDtypeStruct
) -> Shapes:
    # All blocks have the same shapes, so that tracing one of them is enough.
    variables: Mapping = jax.eval_shape(make(num_layers=1).init, jax.random.key(0), inputs)
    shapes = {}
    first = re.compile(r"(.*\b(?:encoderblock_|MixerBlock_|layers_))0(/.+)")
    for key, leaf in flatten_dict(variables["params"], sep="/").items():
        if match := first.fullmatch(key):
            for i in range(num_layers):
                shapes[f"{match[1]}{i}{match[2]}"] = leaf.shape
        else:
            shapes[key] = leaf.shape
    return shapes
