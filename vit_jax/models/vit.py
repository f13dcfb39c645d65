"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929), as pure Flax Linen modules.

The names of the sub-modules are those of the official checkpoints: flattening the parameters with
"/" gives exactly their keys. Equation numbers refer to the paper. Shapes: n images, t tokens,
d = hidden_size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.attention import ATTENTION_NAME, MultiHeadAttention
from vit_jax.models.blocks import BlockLoop, DropPath, run_blocks
from vit_jax.models.kernels import Kernels, dot_product_attention
from vit_jax.models.resnet import resnet_features, resnet_output_size, resnet_stride

CLASSIFIERS = ("token", "gap", "map", "unpooled", "token_unpooled")
POOLED = ("token", "gap", "map")  # Those that give one vector, so one answer, an image.
POSITION_EMBEDDINGS = ("learned", "sincos2d")

# The published weights were trained with it.
LAYER_NORM_EPSILON = 1e-6


def sincos_positions(grid_size: tuple[int, int], width: int) -> jax.Array:
    """Fixed position embeddings: sines and cosines of the column and of the row of a patch.

    With D = width and w_i = 10000^(-i / (D/4 - 1)), i < D/4, the four quarters are sin(x w), cos(x
    w), sin(y w) and cos(y w); x is the column and y the row (arXiv:2104.02057, section 4).

    Returns:
      (1, rows * columns, width) float32.

    Raises UserError if the width can't be cut in four.
    """
    if width % 4 or width < 8:
        raise UserError(
            f"hidden_size is {width}, expected a multiple of 4 from 8 for sincos2d positions"
        )
    rows, columns = grid_size
    # In NumPy's float64 and rounded once: the angles reach hundreds of radians.
    frequencies = 1.0 / 10_000.0 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = (axis.reshape(-1, 1) * frequencies for axis in np.mgrid[:rows, :columns])
    positions = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return jnp.asarray(positions[None], jnp.float32)


class AddPositionEmbs(nn.Module):
    """Adds a learned vector to each token (E_pos of equation 1). (n, t, d) -> (n, t, d)."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        _, t, d = tokens.shape
        embedding = self.param("pos_embedding", nn.initializers.normal(stddev=0.02), (1, t, d))
        return tokens + embedding.astype(tokens.dtype)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU (tanh form) between them. (n, t, d) -> (n, t, d)."""

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        def dense(features: int) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(stddev=1e-6),
                dot_general=self.kernels.dot_general,
            )

        dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        hidden = dropout(self.kernels.gelu(dense(self.mlp_dim)(x)))
        return dropout(dense(x.shape[-1])(hidden))


class EncoderBlock(nn.Module):
    """One pre-LayerNorm encoder block (equations 2 and 3). (n, t, d) -> (n, t, d).

    With probability `drop_path_rate` each of the two residual branches is left out for an image
    while training (stochastic depth, arXiv:1603.09382). If `length` is given, the tokens after so
    many are padding: nobody attends to them.
    """

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()
    length: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool, drop_path_rate: float | jax.Array = 0.0
    ) -> jax.Array:
        def drop_path(branch, name):  # The draws follow from the name.
            return DropPath(name=name)(branch, drop_path_rate, deterministic=deterministic)

        y = layer_norm(self, "LayerNorm_0")(x)
        y = MultiHeadAttention(
            self.num_heads,
            self.attention_dropout_rate,
            self.dtype,
            self.kernels,
            self.length,
            name=ATTENTION_NAME,
        )(y, y, deterministic=deterministic)
        y = nn.Dropout(self.dropout_rate, deterministic=deterministic)(y)
        x = x + drop_path(y, "Dropout_1")

        y = layer_norm(self, "LayerNorm_1")(x)
        mlp = MlpBlock(self.mlp_dim, self.dropout_rate, self.dtype, self.kernels)
        return x + drop_path(mlp(y, deterministic=deterministic), "Dropout_2")


class MAPHead(nn.Module):
    """Multihead attention pooling (arXiv:2106.04560, appendix). (n, t, d) -> (n, d).

    A learned probe attends to the tokens; a residual MLP block follows.
    """

    num_heads: int
    mlp_dim: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, _, d = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
        # One query is little work, and not what the kernels of self-attention are for.
        kernels = dataclasses.replace(self.kernels, attention=dot_product_attention)
        y = MultiHeadAttention(
            self.num_heads, dtype=self.dtype, kernels=kernels, name=ATTENTION_NAME
        )(jnp.tile(probe.astype(x.dtype), (n, 1, 1)), x)
        z = layer_norm(self, "LayerNorm_0")(y)
        mlp = MlpBlock(self.mlp_dim, dtype=self.dtype, kernels=self.kernels)
        y = y + mlp(z, deterministic=True)
        return y[:, 0]


class Encoder(nn.Module):
    """Position embeddings, `num_layers` blocks and a final LayerNorm. (n, t, d) -> (n, t, d).

    `positions` (1, t, d) are added in place of learned ones if they are given. Around the blocks
    tokens are padded to what the kernels take; what is returned has no padding.
    """

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool, positions: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if positions is None:
            x = AddPositionEmbs(name="posembed_input")(x)
        else:
            x = x + positions.astype(x.dtype)
        x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
        names = ["num_heads", "mlp_dim", "dropout_rate", "attention_dropout_rate"]
        names += ["dtype", "kernels"]
        fields = {name: getattr(self, name) for name in names}
        t = x.shape[1]
        if padding := -t % self.kernels.token_multiple:
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            fields["length"] = t
        x, features = run_blocks(
            EncoderBlock,
            fields,
            x,
            name="encoderblock",
            depth=self.num_layers,
            drop_path_rate=self.stochastic_depth_rate,
            loop=self.loop,
            deterministic=deterministic,
        )
        if padding:
            x, features = jax.tree.map(lambda x: x[:, :t], (x, features))
        return layer_norm(self, "encoder_norm")(x), features


def layer_norm(module: Any, name: str, epsilon: float = LAYER_NORM_EPSILON) -> nn.Module:
    """A LayerNorm (arXiv:1607.06450) in the form and dtype of the module that it is a part of."""
    return module.kernels.layer_norm(epsilon=epsilon, dtype=module.dtype, name=name)


def check_images(images: jax.Array) -> None:
    """Raises UserError if images have not four axes, or are integers: those are raw pixels."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(
            f"images are {images.dtype}, expected floats, for the official weights in [-1, 1]: "
            "preprocess them, e.g. images / 127.5 - 1"
        )
    if images.ndim != 4:
        raise UserError(
            f"images have shape {images.shape}, expected (n, height, width, channels): "
            "add the missing axis, e.g. images[None] for one image"
        )


def check_patch_size(patch_size: tuple[int, int]) -> None:
    """Raises UserError if a patch has not height and width."""
    if np.shape(patch_size) != (2,) or min(patch_size) < 1:
        raise UserError(f"patch_size is {patch_size}, expected (height, width) in pixels")


def check_rates(**rates: float) -> None:
    """Raises UserError if a rate of dropout or stochastic depth is no probability below 1."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise UserError(f"{name} is {rate}, expected a probability, at least 0 and less than 1")


class VisionTransformer(nn.Module):
    """A Vision Transformer for images of any size, shape and number of channels.

    Attributes:
      num_classes: width of the head; None leaves the head out and returns its input.
      patch_size: (height, width) of a patch in pixels. Border pixels that fill no patch are cut.
      hidden_size: width of a token, d.
      num_layers, num_heads, mlp_dim: depth, attention heads and hidden width of the blocks.
      classifier: what the head sees: "token" the class token, "gap" the mean of the patch tokens,
        "map" what attention pooling makes of them, "unpooled" every patch token, "token_unpooled"
        every token with the class token first.
      representation_size: width of the tanh layer `pre_logits` before the head; None for no layer.
      head_bias_init: initial value of the head's bias (its kernel starts at zero).
      dropout_rate, attention_dropout_rate, stochastic_depth_rate: active only with train=True,
        which then needs an rng named "dropout".
      resnet: None, or the number of units in each stage of a ResNet whose features are cut into
        patches instead of the images themselves (a hybrid); empty for the ResNet's root alone.
      position_embedding: "learned" or "sincos2d" (fixed, see `sincos_positions`).
      dtype: what is computed in, float32 or bfloat16. Parameters, statistics of the LayerNorms,
        attention softmax and the returned logits are float32 in any case.
      loop: how the blocks are computed.
      kernels: in which forms, by default the stock ones of Flax; see `choose_kernels`.
    """

    num_classes: int | None
    patch_size: tuple[int, int]
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classifier: str = "token"
    representation_size: int | None = None
    head_bias_init: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    resnet: tuple[int, ...] | None = None
    position_embedding: str = "learned"
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    @property
    def stride(self) -> tuple[int, int]:
        """(height, width) in pixels from one patch to the next."""
        pixels = 1 if self.resnet is None else resnet_stride(self.resnet)
        return self.patch_size[0] * pixels, self.patch_size[1] * pixels

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) of patches in an image of (height, width) pixels.

        Raises UserError if the image is smaller than one patch.
        """
        height, width = image_size
        if self.resnet is not None:
            height, width = (resnet_output_size(size, self.resnet) for size in image_size)
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if rows < 1 or columns < 1:
            raise UserError(
                "the image of {}x{} pixels is smaller than one patch of {}x{}: "
                "use a larger image size".format(*image_size, *self.stride)
            )
        return rows, columns

    def num_tokens(self, image_size: tuple[int, int]) -> int:
        """How many tokens go through the blocks, for an image of (height, width) pixels."""
        rows, columns = self.grid_size(image_size)
        return rows * columns + self.has_class_token

    @property
    def has_class_token(self) -> bool:
        """Whether a learned class token is put before the patch tokens."""
        return self.classifier in ("token", "token_unpooled")

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]:
        """Classifies images.

        Args:
          images: (n, h, w, c) float, for the official weights in [-1, 1].
          train: whether dropout and stochastic depth are active.
          return_features: whether to return the intermediate features too.

        Returns:
          logits, float32: (n, num_classes), or (n, t, num_classes) for the unpooled classifiers;
          with num_classes=None the head's input instead. With return_features a pair (logits,
          features): "embedding" (n, rows, columns, d) the patches, "encoderblock_0", ... (n, t, d)
          the output of each block, "encoder_norm" (n, t, d), and "pre_logits" the head's input; of
          a hybrid also "resnet" (n, h', w', c').

        Raises UserError if the fields or the images make no sense.
        """
        self._check(images)
        n, h, w, _ = images.shape
        x = images.astype(self.dtype)
        features = {}
        if self.resnet is not None:
            x = features["resnet"] = resnet_features(x, self.resnet, self.dtype)
        patches = features["embedding"] = nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            conv_general_dilated=self.kernels.conv_general_dilated,
            name="embedding",
        )(x)
        grid = self.grid_size((h, w))
        x = patches.reshape(n, grid[0] * grid[1], self.hidden_size)
        positions = None
        if self.position_embedding == "sincos2d":
            positions = sincos_positions(grid, self.hidden_size)

        if self.has_class_token:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
            x = jnp.concatenate([jnp.tile(cls.astype(x.dtype), (n, 1, 1)), x], axis=1)
            if positions is not None:  # The class token has no place.
                positions = jnp.pad(positions, ((0, 0), (1, 0), (0, 0)))

        encoded, block_features = Encoder(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dropout_rate,
            self.attention_dropout_rate,
            self.stochastic_depth_rate,
            self.dtype,
            self.loop,
            self.kernels,
            name="Transformer",
        )(x, deterministic=not train, positions=positions)

        x = encoded
        if self.classifier == "token":
            x = x[:, 0]  # Equation 4.
        elif self.classifier == "gap":
            x = x.astype(jnp.float32).mean(axis=1)
        elif self.classifier == "map":
            x = MAPHead(self.num_heads, self.mlp_dim, self.dtype, self.kernels, name="MAPHead_0")(x)

        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x)
            x = nn.tanh(x)
        features |= block_features | {"encoder_norm": encoded, "pre_logits": x}
        if self.num_classes is not None:
            # The head computes in float32: it costs little, and the loss wants all the digits.
            x = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(self.head_bias_init),
                name="head",
            )(x.astype(jnp.float32))
        logits = x.astype(jnp.float32)
        return (logits, features) if return_features else logits

    def _check(self, images: jax.Array) -> None:
        check_images(images)
        check_patch_size(self.patch_size)
        if self.resnet is not None and min(self.resnet, default=1) < 1:
            raise UserError(
                f"resnet is {self.resnet}, expected the number of units of each stage, at least 1"
            )
        _, height, width, _ = images.shape
        self.grid_size((height, width))
        if self.classifier not in CLASSIFIERS:
            raise UserError(
                f"unknown classifier {self.classifier!r}, expected one of {', '.join(CLASSIFIERS)}"
            )
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise UserError(
                f"unknown position_embedding {self.position_embedding!r}, expected one of "
                f"{', '.join(POSITION_EMBEDDINGS)}"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "change one of them"
            )
        check_rates(
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            stochastic_depth_rate=self.stochastic_depth_rate,
        )
