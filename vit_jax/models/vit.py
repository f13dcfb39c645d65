"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929), as pure Flax Linen modules.

The names of the sub-modules are those of the official checkpoints: flattening the parameters with
"/" gives exactly their keys. Equation numbers refer to the paper. Shapes: n pictures, t tokens,
d = hidden_size.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError

CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")

# The published weights were trained with it.
LAYER_NORM_EPSILON = 1e-6


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

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        def dense(features):
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(stddev=1e-6),
            )

        dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        hidden = dropout(nn.gelu(dense(self.mlp_dim)(x), approximate=True))
        return dropout(dense(x.shape[-1])(hidden))


class EncoderBlock(nn.Module):
    """One pre-LayerNorm encoder block (equations 2 and 3). (n, t, d) -> (n, t, d).

    `drop_path_rate` is the probability with which each of the two residual branches is left out
    for a picture while training (stochastic depth, arXiv:1603.09382).
    """

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        def drop_path(branch):
            # One draw a picture: the mask is broadcast over tokens and features.
            return nn.Dropout(
                self.drop_path_rate, broadcast_dims=(1, 2), deterministic=deterministic
            )(branch)

        y = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            broadcast_dropout=False,
            dropout_rate=self.attention_dropout_rate,
            deterministic=deterministic,
            force_fp32_for_softmax=True,
        )(y, y)
        y = nn.Dropout(self.dropout_rate, deterministic=deterministic)(y)
        x = x + drop_path(y)

        y = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype)(x)
        y = MlpBlock(self.mlp_dim, self.dropout_rate, self.dtype)(y, deterministic=deterministic)
        return x + drop_path(y)


class Encoder(nn.Module):
    """Position embeddings, `num_layers` blocks and a final LayerNorm. (n, t, d) -> (n, t, d)."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        features = {}
        x = AddPositionEmbs(name="posembed_input")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
        for i in range(self.num_layers):
            x = EncoderBlock(
                self.num_heads,
                self.mlp_dim,
                self.dropout_rate,
                self.attention_dropout_rate,
                # The rate grows linearly with depth, up to the full one in the last block.
                self.stochastic_depth_rate * i / max(self.num_layers - 1, 1),
                self.dtype,
                name=f"encoderblock_{i}",
            )(x, deterministic=deterministic)
            features[f"encoderblock_{i}"] = x
        return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="encoder_norm")(x), features


class VisionTransformer(nn.Module):
    """A Vision Transformer for pictures of any size, shape and number of channels.

    Attributes:
      num_classes: width of the head; None leaves the head out and returns its input.
      patch_size: (height, width) of a patch in pixels. Border pixels that fill no patch are cut.
      hidden_size: width of a token, d.
      num_layers, num_heads, mlp_dim: depth, attention heads and hidden width of the blocks.
      classifier: what the head sees: "token" the class token, "gap" the mean of the patch tokens,
        "unpooled" every patch token, "token_unpooled" every token with the class token first.
      representation_size: width of the tanh layer `pre_logits` before the head; None for no layer.
      head_bias_init: initial value of the head's bias (its kernel starts at zero).
      dropout_rate, attention_dropout_rate, stochastic_depth_rate: active only with train=True,
        which then needs an rng named "dropout".
      dtype: what is computed in, float32 or bfloat16. Parameters, statistics of the LayerNorms,
        attention softmax and the returned logits are float32 in any case.
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
    dtype: Any = jnp.float32

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The (rows, columns) of patches in a picture of (height, width) pixels.

        Raises UserError if the picture is smaller than one patch.
        """
        rows, columns = (s // p for s, p in zip(image_size, self.patch_size, strict=True))
        if rows < 1 or columns < 1:
            raise UserError(
                "the picture of {}x{} pixels is smaller than one patch of {}x{}: "
                "use a larger image size".format(*image_size, *self.patch_size)
            )
        return rows, columns

    @property
    def has_class_token(self) -> bool:
        """Whether a learned class token is put before the patch tokens."""
        return self.classifier in ("token", "token_unpooled")

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]:
        """Classifies pictures.

        Args:
          images: (n, h, w, c) float, for the official weights in [-1, 1].
          train: whether dropout and stochastic depth are active.
          return_features: whether to return the intermediate features too.

        Returns:
          logits, float32: (n, num_classes), or (n, t, num_classes) for the unpooled classifiers;
          with num_classes=None the head's input instead. With return_features a pair (logits,
          features): "embedding" (n, rows, columns, d) the patches, "encoderblock_0", ... (n, t, d)
          the output of each block, "encoder_norm" (n, t, d), and "pre_logits" the head's input.

        Raises UserError if the fields or the pictures make no sense.
        """
        self._check(images)
        n, h, w, _ = images.shape
        patches = nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="embedding",
        )(images.astype(self.dtype))
        rows, columns = self.grid_size((h, w))
        x = patches.reshape(n, rows * columns, self.hidden_size)

        if self.has_class_token:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
            x = jnp.concatenate([jnp.tile(cls.astype(x.dtype), (n, 1, 1)), x], axis=1)

        encoded, features = Encoder(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dropout_rate,
            self.attention_dropout_rate,
            self.stochastic_depth_rate,
            self.dtype,
            name="Transformer",
        )(x, deterministic=not train)

        x = encoded
        if self.classifier == "token":
            x = x[:, 0]  # Equation 4.
        elif self.classifier == "gap":
            x = x.astype(jnp.float32).mean(axis=1)

        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x)
            x = nn.tanh(x)
        pre_logits = x
        if self.num_classes is not None:
            # The head computes in float32: it costs little, and the loss wants all the digits.
            x = nn.Dense(
                self.num_classes,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(self.head_bias_init),
                name="head",
            )(x.astype(jnp.float32))
        logits = x.astype(jnp.float32)
        if not return_features:
            return logits
        return logits, {
            "embedding": patches,
            **features,
            "encoder_norm": encoded,
            "pre_logits": pre_logits,
        }

    def _check(self, images: jax.Array) -> None:
        if images.ndim != 4:
            raise UserError(
                f"images have shape {images.shape}, expected (n, height, width, channels): "
                "add the missing axis, e.g. images[None] for one picture"
            )
        if np.shape(self.patch_size) != (2,) or min(self.patch_size) < 1:
            raise UserError(f"patch_size is {self.patch_size}, expected (height, width) in pixels")
        _, height, width, _ = images.shape
        self.grid_size((height, width))
        if self.classifier not in CLASSIFIERS:
            raise UserError(
                f"unknown classifier {self.classifier!r}, expected one of {', '.join(CLASSIFIERS)}"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "change one of them"
            )
        for field in ("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(
                    f"{field} is {getattr(self, field)}, expected a probability, at least 0 and "
                    "less than 1"
                )
