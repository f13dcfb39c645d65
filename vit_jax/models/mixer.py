"""MLP-Mixer (Tolstikhin et al., arXiv:2105.01601), as pure Flax Linen modules.

The names of the sub-modules are those of the official checkpoints. Shapes: n images, t tokens,
d = hidden_size.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import shapes as reading
from vit_jax.models.family import Arrays, Hints, ImageModel, Shapes, Size, Spec, register
from vit_jax.models.kernels import Kernels
from vit_jax.models.layers import (
    LAYER_NORM_EPSILON,
    DropPath,
    Mlp,
    check_images,
    check_patch_size,
    check_rates,
    fields_for,
    head,
    layer_norm,
)
from vit_jax.models.stack import BlockLoop, run_blocks

# Table 1 of arXiv:2105.01601.
_SIZES = {
    "B": dict(hidden_size=768, num_layers=12, tokens_mlp_dim=384, channels_mlp_dim=3072),
    "L": dict(hidden_size=1024, num_layers=24, tokens_mlp_dim=512, channels_mlp_dim=4096),
}


class MixerBlock(nn.Module):
    """Mixes over tokens, then over channels (equation 1). (n, t, d) -> (n, t, d)."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    layer_norm_epsilon: ClassVar = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool, drop_path_rate: float | jax.Array = 0.0
    ) -> jax.Array:
        drop_path = functools.partial(
            DropPath(name="Dropout_0"), rate=drop_path_rate, deterministic=deterministic
        )

        def mlp(mlp_dim: int, name: str) -> Mlp:
            return Mlp(
                mlp_dim,
                dtype=self.dtype,
                # In the stock form: no other was measured to be faster here.
                kernels=dataclasses.replace(self.kernels, dot_general=jax.lax.dot_general),
                kernel_init=nn.initializers.lecun_normal(),
                bias_init=nn.initializers.zeros,
                name=name,
            )

        y = layer_norm(self, "LayerNorm_0")(x)
        y = mlp(self.tokens_mlp_dim, "token_mixing")(y.swapaxes(1, 2))
        x = x + drop_path(y.swapaxes(1, 2))
        y = layer_norm(self, "LayerNorm_1")(x)
        y = mlp(self.channels_mlp_dim, "channel_mixing")(y)
        return x + drop_path(y)


@register
class MlpMixer(ImageModel):
    """An MLP-Mixer. Its weights fit one number of tokens, that is one size of image.

    Attributes:
      num_classes: width of the head; None leaves the head out and returns its input.
      patch_size: (height, width) of a patch in pixels; the border is padded with zeros to fill
        patches.
      hidden_size: width of a token, d.
      num_layers, tokens_mlp_dim, channels_mlp_dim: depth, and hidden widths of the two MLPs.
      head_bias_init: initial value of the head's bias (its kernel starts at zero).
      stochastic_depth_rate: active only with train=True, which then needs an rng named "dropout".
      dtype: what is computed in, float32 or bfloat16; parameters and logits are float32.
      loop: how the blocks are computed.
      kernels: in which forms, by default the stock ones of Flax; see `choose_kernels`.
    """

    num_classes: int | None
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    head_bias_init: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    kind: ClassVar = "Mixer"
    variants: ClassVar = {
        "Mixer-B_16": dict(_SIZES["B"], patch_size=(16, 16)),
        "Mixer-B_32": dict(_SIZES["B"], patch_size=(32, 32)),
        "Mixer-L_16": dict(_SIZES["L"], patch_size=(16, 16)),
    }
    blocks: ClassVar = ("MixerBlock",)
    classifier: ClassVar = "gap"
    representation_size: ClassVar = None
    layer_norm_epsilon: ClassVar = LAYER_NORM_EPSILON

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]:
        """Classifies images.

        Args:
          images: (n, h, w, c) float, for the official weights in [-1, 1].
          train: whether stochastic depth is active.
          return_features: whether to return the intermediate features too.

        Returns:
          logits, float32 (n, num_classes); with num_classes=None the head's input, (n, d). With
          return_features a pair (logits, features): "stem" (n, rows, columns, d), "MixerBlock_0",
          ... (n, t, d), "pre_head_layer_norm" (n, t, d), and "pre_logits" the head's input.

        Raises UserError if the fields or the images make no sense, or stored weights are for
        another number of tokens.
        """
        check_images(images)
        check_patch_size(self.patch_size)
        check_rates(self)
        rows, columns = self.grid_size((images.shape[1], images.shape[2]))
        self._check_tokens(rows * columns)
        stem = nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="SAME",
            dtype=self.dtype,
            conv_general_dilated=self.kernels.conv_general_dilated,
            name="stem",
        )(images.astype(self.dtype))
        features = {"stem": stem}
        x = stem.reshape(len(images), rows * columns, self.hidden_size)
        x, block_features = run_blocks(
            MixerBlock,
            fields_for(MixerBlock, self),
            x,
            name="MixerBlock",
            depth=self.num_layers,
            drop_path_rate=self.stochastic_depth_rate,
            loop=self.loop,
            deterministic=not train,
        )
        features |= block_features
        x = layer_norm(self, "pre_head_layer_norm")(x)
        features["pre_head_layer_norm"] = x
        x = features["pre_logits"] = x.astype(jnp.float32).mean(axis=1)
        x = head(self, x)
        return (x, features) if return_features else x

    def _check_tokens(self, tokens: int) -> None:
        if self.is_initializing():
            return
        params = self.variables.get("params", {})
        if "MixerBlock_0" in params:
            stored = params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"].shape[0]
            if stored != tokens:
                raise UserError(
                    f"these Mixer weights are for {stored} tokens, the images make {tokens}: the "
                    "number of tokens of a Mixer is fixed; resize the images, or train anew"
                )

    @property
    def stride(self) -> Size:
        return self.patch_size

    @property
    def final_norm(self) -> str:
        return "pre_head_layer_norm"

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        return (-(-image_size[0] // self.patch_size[0]), -(-image_size[1] // self.patch_size[1]))

    @classmethod
    def recognizes(cls, shapes: Shapes) -> bool:
        return "stem/kernel" in shapes

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints) -> Spec:
        blocks = reading.Blocks(shapes, "MixerBlock_")
        tokens = blocks.majority("token_mixing/Dense_0/kernel", 2, 0)
        tokens_mlp_dim = blocks.majority("token_mixing/Dense_0/kernel", 2, 1)
        channels_mlp_dim = blocks.majority("channel_mixing/Dense_0/kernel", 2, 1)
        sizes = (tokens, tokens_mlp_dim, channels_mlp_dim)
        reading.check_required(shapes, {"stem/kernel": 4}, blocks, sizes, hints.where)
        ph, pw, channels, hidden_size = shapes["stem/kernel"]
        model = cls(
            num_classes=reading.num_outputs(shapes, "head"),
            patch_size=(ph, pw),
            hidden_size=hidden_size,
            num_layers=blocks.depth,
            tokens_mlp_dim=tokens_mlp_dim,
            channels_mlp_dim=channels_mlp_dim,
        )
        return Spec(model, reading.size_of_grid(model, tokens, hints), channels)

    @property
    def first_layer(self) -> str:
        return "stem/kernel"

    def resize(self, arrays: Arrays, old: Size, new: Size) -> Arrays:
        if self.grid_size(new) != self.grid_size(old):
            raise UserError(
                "this Mixer has {} tokens, for images of {}x{} pixels, and can't take {}x{}: the "
                "number of tokens of a Mixer is fixed; keep its size, or choose a ViT".format(
                    self.num_tokens(old), *old, *new
                )
            )
        return arrays

    def summary(self) -> dict[str, str]:
        mlps = f"{self.tokens_mlp_dim} wide over tokens and {self.channels_mlp_dim} over channels"
        return {"blocks": f"{self.num_layers}, {self.hidden_size} wide, MLPs {mlps}"}
