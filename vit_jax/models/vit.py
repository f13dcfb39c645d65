"""The Vision Transformer (Dosovitskiy et al., arXiv:2010.11929), as pure Flax Linen modules.

The names of the sub-modules are those of the official checkpoints: flattening the parameters with
"/" gives exactly their keys. Equation numbers refer to the paper. Shapes: n images, t tokens,
d = hidden_size.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import shapes as reading
from vit_jax.models.family import Arrays, Hints, ImageModel, Shapes, Size, Spec, register
from vit_jax.models.kernels import Kernels
from vit_jax.models.layers import (
    ACTIVATIONS,
    ATTENTION_NAME,
    LAYER_NORM_EPSILON,
    MLPS,
    DropPath,
    LayerScale,
    MAPHead,
    Mlp,
    MultiHeadAttention,
    check_choice,
    check_images,
    check_patch_size,
    check_rates,
    fields_for,
    head,
    layer_norm,
    shown_weights,
)
from vit_jax.models.positions import POSITION_RESIZE, resample, sincos_positions
from vit_jax.models.resnet import (
    resnet_features,
    resnet_output_size,
    resnet_stages,
    resnet_stride,
    standardize,
)
from vit_jax.models.stack import BlockLoop, run_blocks

CLASSIFIERS = ("token", "gap", "map", "first", "unpooled", "token_unpooled", "token_gap")
# Those that give one vector, so one answer, an image.
POOLED = ("token", "gap", "map", "first", "token_gap")
POSITION_EMBEDDINGS = ("learned", "sincos2d")
DISTILLED = ("none", "token", "heads")
DROP_PATH_MODES = ("linear", "constant")

_POSITIONS = "Transformer/posembed_input/pos_embedding"
# Fixed sines and cosines leave no trace in a file; most networks saw images of this size.
_USUAL_SIZE = (224, 224)
# What none of the original's networks has, with the words for it.
_UNLIKE = {
    "qkv_bias": "attention without biases",
    "layer_scale": "layer scale",
    "num_registers": "registers",
}
# Of a stored layer scale no array tells what it was at first.
_LAYER_SCALE = 1e-5

_BEFORE_THE_GRID = ("cls_has_position", "unread_class_token")

_log = logging.getLogger(__name__)

# Width, depth, MLP width and heads: Table 1 of arXiv:2010.11929 (B, L, H), Table 2 of
# arXiv:2106.10270 (Ti, S), Table 2 of arXiv:2106.04560 and big_vision's names (the others).
_SIZES = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "g-swiglu": (1536, 40, 4096, 24),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


def _vit(size: str, patch: int, classifier: str = "token", **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "num_layers", "mlp_dim", "num_heads")
    fields = dict(zip(names, _SIZES[size], strict=True), patch_size=(patch, patch))
    return fields | dict(classifier=classifier, **more)


_TORCH: dict[str, Any] = dict(activation="gelu_erf", position_resize="torch")
_DINOV2: dict[str, Any] = dict(activation="gelu_erf", layer_scale=1e-5)

_VARIANTS: dict[str, dict[str, Any]] = {
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
    # arXiv:2012.12877, Table 1.
    **{
        f"DeiT-{size}_16{ending}": _vit(size, 16, distilled=distilled, **_TORCH)
        for ending, distilled in (("", "none"), ("-distilled", "heads"))
        for size in ("Ti", "S", "B")
    },
    # arXiv:2204.07118, Table 1 and section 3.
    **{
        f"DeiT3-{size}_{patch}": _vit(
            size,
            patch,
            layer_scale=1e-4,
            cls_has_position=False,
            drop_path_mode="constant",
            **_TORCH,
        )
        for size, patch in (("S", 16), ("M", 16), ("B", 16), ("L", 16), ("H", 14))
    },
    # arXiv:2304.07193, Table 17; with registers arXiv:2309.16588.
    **{
        f"DINOv2-{name}_14{ending}": _vit(size, 14, **more) | registers
        for ending, registers in (
            ("", dict(position_resize="dinov2")),
            ("-reg", dict(position_resize="torch-antialias", num_registers=4)),
        )
        for name, size, more in (
            ("S", "S", _DINOV2),
            ("B", "B", _DINOV2),
            ("L", "L", _DINOV2),
            ("g", "g-swiglu", _DINOV2 | dict(mlp="swiglu")),
        )
    },
    # arXiv:2303.15343 and arXiv:2502.14786, the image tower.
    **{
        f"SigLIP-{size}_{patch}": _vit(size, patch, "map")
        for size, patch in (("B", 16), ("L", 16), ("So400m", 14), ("So400m", 16), ("g-opt", 16))
    },
    # arXiv:2111.06377, fine-tuned: the mean of the patches, then the LayerNorm.
    **{
        f"MAE-{size}_{patch}": _vit(
            size,
            patch,
            "gap",
            fc_norm=True,
            unread_class_token=True,
            **_TORCH,
        )
        for size, patch in (("B", 16), ("L", 16), ("H", 14))
    },
}


class AddPositionEmbs(nn.Module):
    """Adds a learned vector to each token (E_pos of equation 1). (n, t, d) -> (n, t, d).

    The first `placeless` tokens get none.
    """

    placeless: int = 0
    embedding_init: Callable = nn.initializers.normal(stddev=0.02)

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        _, t, d = tokens.shape
        shape = (1, t - self.placeless, d)
        embedding = self.param("pos_embedding", self.embedding_init, shape)
        if self.placeless:
            embedding = jnp.pad(embedding, ((0, 0), (self.placeless, 0), (0, 0)))
        return tokens + embedding.astype(tokens.dtype)


class BlockFields(nn.Module):
    """What blocks and encoder have in common; see `VisionTransformer` for the fields."""

    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    mlp: str = "gelu"
    layer_norm_epsilon: float = LAYER_NORM_EPSILON
    qkv_bias: bool = True
    layer_scale: float | None = None
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()


class EncoderBlock(BlockFields):
    """One pre-LayerNorm encoder block (equations 2 and 3). (n, t, d) -> (n, t, d).

    With probability `drop_path_rate` each of the two residual branches is left out for an image
    while training (stochastic depth, arXiv:1603.09382). If `length` is given, the tokens after so
    many are padding: nobody attends to them.
    """

    length: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool, drop_path_rate: float | jax.Array = 0.0
    ) -> jax.Array:
        def residual(branch: jax.Array, i: int) -> jax.Array:
            if self.layer_scale is not None:
                branch = LayerScale(self.layer_scale, name=f"LayerScale_{i}")(branch)
            # The draws follow from the name.
            drop_path = DropPath(name=f"Dropout_{i + 1}")
            return drop_path(branch, drop_path_rate, deterministic=deterministic)

        y = layer_norm(self, "LayerNorm_0")(x)
        fields = fields_for(MultiHeadAttention, self, dropout_rate=self.attention_dropout_rate)
        y = MultiHeadAttention(**fields, name=ATTENTION_NAME)(y, y, deterministic=deterministic)
        y = nn.Dropout(self.dropout_rate, deterministic=deterministic)(y)
        x = x + residual(y, 0)

        y = layer_norm(self, "LayerNorm_1")(x)
        y = Mlp(**fields_for(Mlp, self), name="MlpBlock_0")(y, deterministic=deterministic)
        return x + residual(y, 1)


class Encoder(BlockFields):
    """Position embeddings, `num_layers` blocks and a final LayerNorm. (n, t, d) -> (n, t, d).

    `positions` (1, t, d) are added in place of learned ones if they are given. Then `registers`
    (1, r, d) are put before the patches, of which there are the last `patches` of the tokens.
    Around the blocks tokens are padded to what the kernels take; what is returned has no padding.
    The first `placeless` tokens have no position; the others' are `position_init` at first. With
    `fc_norm` there is no final LayerNorm.
    """

    num_layers: int = 12
    stochastic_depth_rate: float = 0.0
    drop_path_mode: str = "linear"
    placeless: int = 0
    position_init: Callable = AddPositionEmbs.embedding_init
    fc_norm: bool = False
    loop: BlockLoop = BlockLoop()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool,
        positions: jax.Array | None = None,
        registers: jax.Array | None = None,
        patches: int = 0,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        if positions is None:
            x = AddPositionEmbs(self.placeless, self.position_init, name="posembed_input")(x)
        else:
            x = x + positions.astype(x.dtype)
        if registers is not None:
            registers = jnp.tile(registers.astype(x.dtype), (len(x), 1, 1))
            x = jnp.concatenate([x[:, :-patches], registers, x[:, -patches:]], axis=1)
        x = nn.Dropout(self.dropout_rate, deterministic=deterministic)(x)
        t = x.shape[1]
        padding = -t % self.kernels.token_multiple
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        x, features = run_blocks(
            EncoderBlock,
            fields_for(EncoderBlock, self, length=t if padding else None),
            x,
            name="encoderblock",
            depth=self.num_layers,
            drop_path_rate=self.stochastic_depth_rate,
            drop_path_mode=self.drop_path_mode,
            loop=self.loop,
            deterministic=deterministic,
        )
        if padding:
            x, features = jax.tree.map(lambda x: x[:, :t], (x, features))
        return x if self.fc_norm else layer_norm(self, "encoder_norm")(x), features


def _guessed(pooled: str, hints: Hints) -> str:
    """How tokens are pooled where there is neither a class token nor a word of it."""
    if pooled == "gap":
        _log.warning(
            "%s: no array tells how its tokens are pooled; taken as their mean (gap). If that is "
            "wrong, tell: load(..., classifier=...), one of %s",
            *(hints.where, ", ".join(c for c in CLASSIFIERS if c in ("first", "unpooled"))),
        )
    return pooled


@register
class VisionTransformer(ImageModel):
    """A Vision Transformer for images of any size, shape and number of channels.

    Attributes:
      num_classes: width of the head; None leaves the head out and returns its input.
      patch_size: (height, width) of a patch in pixels. Border pixels that fill no patch are cut.
      hidden_size: width of a token, d.
      num_layers, num_heads, mlp_dim: depth, attention heads and hidden width of the blocks.
      classifier: what the head sees: "token" the class token, "gap" the mean of the patch tokens,
        "map" what attention pooling makes of all tokens, "first" the token of the first patch,
        "unpooled" every patch token, "token_unpooled" every token with the class token first,
        "token_gap" the class token and behind it the mean of the patch tokens.
      representation_size: width of the tanh layer `pre_logits` before the head; None for no layer.
      head_bias_init: initial value of the head's bias (its kernel starts at zero).
      dropout_rate, attention_dropout_rate, stochastic_depth_rate: active only with train=True,
        which then needs an rng named "dropout".
      drop_path_mode: "linear", stochastic depth grows with depth up to its rate; "constant", all
        blocks have it.
      resnet: None, or the number of units in each stage of a ResNet whose features are cut into
        patches instead of the images themselves (a hybrid); empty for the ResNet's root alone.
      position_embedding: "learned" or "sincos2d" (fixed, see `sincos_positions`).
      position_resize: how learned positions become those of another grid, one of POSITION_RESIZE.
      cls_has_position: whether class and distillation token get a learned position; without, only
        the patches do (arXiv:2204.07118).
      unread_class_token: whether there is a class token though the head sees patches only, as in
        fine-tuned MAE (arXiv:2111.06377).
      distilled: "none"; "token", a distillation token stands behind the class token; "heads", and
        the logits are the mean of those of two heads, `head` for the class token and `head_dist`
        for it (arXiv:2012.12877).
      fc_norm: whether the LayerNorm stands behind the mean ("gap") instead of before it.
      activation: of the MLPs, one of ACTIVATIONS.
      mlp: "gelu", or "swiglu" for MLPs with a gate (arXiv:2002.05202) and no other activation.
      layer_norm_epsilon: added to the variance by every LayerNorm.
      qkv_bias: whether queries, keys and values have a bias.
      layer_scale: None, or the initial value of the numbers that each channel of a residual branch
        is multiplied with (arXiv:2103.17239).
      num_registers: how many learned tokens without a position stand before the patches
        (arXiv:2309.16588); "gap", "token_gap" and "unpooled" leave them out.
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
    drop_path_mode: str = "linear"
    resnet: tuple[int, ...] | None = None
    position_embedding: str = "learned"
    position_resize: str = "official"
    cls_has_position: bool = True
    unread_class_token: bool = False
    distilled: str = "none"
    fc_norm: bool = False
    activation: str = "gelu_tanh"
    mlp: str = "gelu"
    layer_norm_epsilon: float = LAYER_NORM_EPSILON
    qkv_bias: bool = True
    layer_scale: float | None = None
    num_registers: int = 0
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    kind: ClassVar = "ViT"
    variants: ClassVar = _VARIANTS
    classifiers: ClassVar = CLASSIFIERS
    weightless: ClassVar = (
        "dropout_rate",
        "attention_dropout_rate",
        "stochastic_depth_rate",
        "drop_path_mode",
        "dtype",
    )
    shows_attention: ClassVar = True
    untold: ClassVar = (
        "position_resize",
        "activation",
        "layer_norm_epsilon",
        "layer_scale",
        "distilled",
        "cls_has_position",
        "unread_class_token",
        "drop_path_mode",
    )

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
        positions = registers = None
        if self.position_embedding == "sincos2d":
            positions = sincos_positions(grid, self.hidden_size)

        if "cls" in self._tokens:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
            tokens = [jnp.tile(cls.astype(x.dtype), (n, 1, 1)), x]
            if "dist" in self._tokens:
                dist = self.param("dist", nn.initializers.zeros, (1, 1, self.hidden_size))
                tokens.insert(1, jnp.tile(dist.astype(x.dtype), (n, 1, 1)))
            x = jnp.concatenate(tokens, axis=1)
            if positions is not None:  # The class token has no place.
                positions = jnp.pad(positions, ((0, 0), (len(self._tokens), 0), (0, 0)))
        if self.num_registers:
            shape = (1, self.num_registers, self.hidden_size)
            registers = self.param("registers", nn.initializers.normal(stddev=0.02), shape)

        placeless = 0 if self.cls_has_position else len(self._tokens)
        encoder = Encoder(**fields_for(Encoder, self, placeless=placeless), name="Transformer")
        encoded, block_features = encoder(
            x,
            deterministic=not train,
            positions=positions,
            registers=registers,
            patches=grid[0] * grid[1],
        )

        x = encoded
        if self.classifier == "token":
            x = x[:, 0]  # Equation 4.
        elif self.classifier in ("gap", "token_gap"):
            x = x[:, self.num_prefix_tokens :].astype(jnp.float32).mean(axis=1)
            if self.fc_norm:
                x = layer_norm(self, "fc_norm")(x)
            if self.classifier == "token_gap":
                x = jnp.concatenate([encoded[:, 0].astype(jnp.float32), x], axis=-1)
        elif self.classifier == "map":
            x = MAPHead(**fields_for(MAPHead, self), name="MAPHead_0")(x)
        elif self.classifier == "first":
            x = x[:, self.num_prefix_tokens]
        elif self.classifier == "unpooled":
            x = x[:, self.num_prefix_tokens :]

        if self.representation_size is not None:
            x = nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x)
            x = nn.tanh(x)
        features |= block_features | ({} if self.fc_norm else {"encoder_norm": encoded})
        if self.distilled == "heads":
            logits = (head(self, x) + head(self, encoded[:, 1], "head_dist")) / 2
            x = (x + encoded[:, 1]) / 2
        else:
            logits = head(self, x)
        features["pre_logits"] = x
        return (logits, features) if return_features else logits

    def _check(self, images: jax.Array) -> None:
        check_images(images)
        check_patch_size(self.patch_size)
        if self.resnet is not None and min(self.resnet, default=1) < 1:
            raise UserError(
                f"resnet is {self.resnet}, expected the number of units of each stage, at least 1"
            )
        self.grid_size((images.shape[1], images.shape[2]))
        check_choice(self, "classifier", CLASSIFIERS)
        check_choice(self, "position_embedding", POSITION_EMBEDDINGS)
        check_choice(self, "position_resize", tuple(POSITION_RESIZE))
        check_choice(self, "activation", ACTIVATIONS)
        check_choice(self, "mlp", MLPS)
        check_choice(self, "distilled", DISTILLED)
        check_choice(self, "drop_path_mode", DROP_PATH_MODES)
        only = {
            "distilled": (self.distilled != "none", ("token",)),
            "fc_norm": (self.fc_norm, ("gap",)),
            "unread_class_token": (self.unread_class_token, ("gap", "map", "first", "unpooled")),
        }
        for name, (given, classifiers) in only.items():
            if given and self.classifier not in classifiers:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, which goes with classifier "
                    f"{' or '.join(classifiers)}, not {self.classifier!r}: change one of them"
                )
        if self.distilled == "heads" and self.representation_size is not None:
            raise UserError("distilled='heads' has no pre_logits: leave representation_size out")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "change one of them"
            )
        if self.num_registers < 0:
            raise UserError(f"num_registers is {self.num_registers}, expected at least 0")
        if not 0 < self.layer_norm_epsilon < 1:
            raise UserError(
                f"layer_norm_epsilon is {self.layer_norm_epsilon}, expected a small number over 0"
            )
        check_rates(self)

    @property
    def stride(self) -> Size:
        pixels = 1 if self.resnet is None else resnet_stride(self.resnet)
        return self.patch_size[0] * pixels, self.patch_size[1] * pixels

    def grid_size(self, image_size: Size) -> tuple[int, int]:
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

    @property
    def has_class_token(self) -> bool:
        return self.classifier in ("token", "token_unpooled") and self.distilled != "heads"

    @property
    def head_reads(self) -> tuple[slice, ...]:
        if self.distilled == "heads":
            return slice(0, 1), slice(1, 2)
        if self.classifier == "token_gap":
            return slice(0, 1), slice(self.num_prefix_tokens, None)
        if self.classifier == "first":
            return (slice(self.num_prefix_tokens, self.num_prefix_tokens + 1),)
        return super().head_reads

    @property
    def _tokens(self) -> tuple[str, ...]:
        """Those that stand before registers and patches."""
        has_cls = self.classifier.startswith("token") or self.unread_class_token
        cls = ("cls",) if has_cls else ()
        return cls if self.distilled == "none" else (*cls, "dist")

    @property
    def num_prefix_tokens(self) -> int:
        """The class token, the distillation token and the registers."""
        return len(self._tokens) + self.num_registers

    @property
    def _placed(self) -> int:
        """How many tokens with a stored position stand before the patches."""
        return len(self._tokens) if self.cls_has_position else 0

    @property
    def num_features(self) -> int:
        if self.representation_size is None and self.classifier == "token_gap":
            return 2 * self.hidden_size
        return super().num_features

    @property
    def final_norm(self) -> str:
        return f"encoderblock_{self.num_layers - 1}" if self.fc_norm else "encoder_norm"

    @property
    def gives_classes(self) -> bool:
        return self.num_classes is not None and self.classifier in POOLED

    def attention_size(self, image_size: Size) -> tuple[int, int, int]:
        return self.num_tokens(image_size), self.num_heads, self.hidden_size // self.num_heads

    # Weights that become a network.

    @classmethod
    def recognizes(cls, shapes: Shapes) -> bool:
        return "embedding/kernel" in shapes

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints) -> Spec:
        blocks = reading.Blocks(shapes, "Transformer/encoderblock_")
        heads = blocks.majority("query/kernel", 3, 1)
        mlp_dim = blocks.majority("Dense_0/kernel", 2, 1)
        # With a class token only the notes of a size tell them from positions that got lost.
        fixed_positions = "embedding/kernel" in shapes and not (
            _POSITIONS in shapes or ("cls" in shapes and hints.image_size is None)
        )
        required = {"embedding/kernel": 4} | ({} if fixed_positions else {_POSITIONS: 3})
        required |= {"conv_root/kernel": 4} if "conv_root/kernel" in shapes else {}
        reading.check_required(shapes, required, blocks, (heads, mlp_dim), hints.where)
        ph, pw, channels, hidden_size = shapes["embedding/kernel"]
        reading.check_heads(heads, hidden_size, hints.where)
        registers = shapes.get("registers", ())
        has_heads = "head_dist/kernel" in shapes or "head/kernel" not in shapes
        model = cls(
            num_classes=reading.num_outputs(shapes, "head"),
            patch_size=(ph, pw),
            hidden_size=hidden_size,
            num_layers=blocks.depth,
            num_heads=heads,
            mlp_dim=mlp_dim,
            classifier="gap",
            representation_size=reading.num_outputs(shapes, "pre_logits"),
            resnet=resnet_stages(shapes),
            position_embedding="sincos2d" if fixed_positions else "learned",
            qkv_bias=blocks.majority("query/bias", 2, 0) > 0,
            layer_scale=_LAYER_SCALE if blocks.majority("LayerScale_0/scale", 1, 0) else None,
            num_registers=registers[1] if len(registers) == 3 else 0,
            mlp="swiglu" if blocks.majority("MlpBlock_0/Dense_2/kernel", 2, 0) else "gelu",
            distilled="none" if "dist" not in shapes else "heads" if has_heads else "token",
            fc_norm="fc_norm/scale" in shapes,
            # They decide which rows of the positions are a grid's.
            **{k: v for k, v in (hints.untold or {}).items() if k in _BEFORE_THE_GRID},
        )
        if model.resnet is not None:
            channels = shapes["conv_root/kernel"][2]
        classifier = hints.classifier
        pooled = "map" if "MAPHead_0/probe" in shapes else "gap"
        unlike = [f for f in _UNLIKE if getattr(model, f) != getattr(cls, f)]
        if hints.untold is None and unlike:
            _log.warning(
                "%s: it has %s, so it is no network of the original's, and no array tells its "
                "activation and layer_norm_epsilon: taken as %s and %g. If that is wrong, tell: "
                "load(..., activation=..., layer_norm_epsilon=...)",
                *(
                    hints.where,
                    " and ".join(_UNLIKE[f] for f in unlike),
                    model.activation,
                    model.layer_norm_epsilon,
                ),
            )
        if fixed_positions:
            size = hints.image_size or hints.likely_size or _USUAL_SIZE
            if not hints.image_size:
                _log.warning(
                    "%s: it has no position embeddings; taken as fixed sines and cosines, for "
                    "images of %dx%d pixels",
                    *(hints.where, *size),
                )
            classifier = classifier or ("token" if "cls" in shapes else _guessed(pooled, hints))
            return Spec(model.clone(classifier=classifier), size, channels)
        tokens = shapes[_POSITIONS][1]
        classifier = classifier or ("gap" if model.fc_norm else None)
        if classifier is None:
            lacks_class_token = (  # 197 positions are a square and one more.
                not any(
                    reading.fits(model, tokens, size)
                    for size in (hints.image_size, hints.likely_size)
                )
                and math.isqrt(tokens) ** 2 != tokens
                and math.isqrt(tokens - 1) ** 2 == tokens - 1
            )
            has_class_token = "cls" in shapes or lacks_class_token
            classifier = "token" if has_class_token else _guessed(pooled, hints)
        model = model.clone(classifier=classifier)
        size = reading.size_of_grid(model, tokens - model._placed, hints)
        return Spec(model, size, channels)

    def shapes(self, image_size: Size, channels: int) -> dict[str, tuple[int, ...]]:
        if self.position_embedding != "learned":  # One patch tells all shapes.
            height, width = self.stride
            image_size = min(image_size[0], height), min(image_size[1], width)
        return super().shapes(image_size, channels)

    @property
    def first_layer(self) -> str:
        return "embedding/kernel" if self.resnet is None else "conv_root/kernel"

    def resize(self, arrays: Arrays, old: Size, new: Size) -> Arrays:
        """Resamples learned positions by the rule of `position_resize`."""
        if self.position_embedding != "learned":
            return arrays
        grids = self.grid_size(old), self.grid_size(new)
        positions = resample(
            arrays[_POSITIONS], *grids, prefix=self._placed, rule=self.position_resize
        )
        return {**arrays, _POSITIONS: positions}

    def with_head(
        self, arrays: Arrays, num_classes: int | None, pre_logits: bool | None
    ) -> tuple[Any, Arrays]:
        model, arrays = super().with_head(arrays, num_classes, pre_logits)
        if num_classes and self.distilled == "heads":
            arrays |= {f"head_dist/{x}": arrays[f"head/{x}"] for x in ("kernel", "bias")}
        return model, arrays

    def summary(self) -> dict[str, str]:
        width = self.representation_size
        activation = self.activation if self.mlp == "gelu" else self.mlp
        lines = {
            "blocks": f"{self.num_layers}, {self.hidden_size} wide, {self.num_heads} heads, "
            f"MLP {self.mlp_dim} wide",
            "classifier": self.classifier,
            "pre_logits": f"tanh, {width} wide" if width else "none",
            "computes": f"{activation}, LayerNorm's epsilon {self.layer_norm_epsilon:g}, "
            f"positions of other sizes by {self.position_resize}",
        }
        if self.resnet is not None:
            stages = ", ".join(map(str, self.resnet)) or "no"
            lines["resnet"] = f"a root and stages of {stages} units"
        if self.position_embedding != "learned":
            lines["positions"] = self.position_embedding
        if self.num_registers:
            lines["registers"] = str(self.num_registers)
        usual = ("activation", "layer_norm_epsilon", "qkv_bias", "layer_scale", "position_resize")
        added = ("cls_has_position", "unread_class_token", "distilled", "fc_norm", "mlp")
        unusual = [
            f"{f} {getattr(self, f)}"
            for f in usual + added
            if getattr(self, f) != getattr(type(self), f)
        ]
        return lines | ({"unlike the original": ", ".join(unusual)} if unusual else {})

    # What `explain` looks at.

    def attention_weights(self, collection: Any) -> tuple[jax.Array, jax.Array | None]:
        blocks = (collection["Transformer"][f"encoderblock_{i}"] for i in range(self.num_layers))
        pooling = None
        if self.classifier == "map":
            pooling = shown_weights(collection["MAPHead_0"])[0, :, 0]
        return jnp.stack([shown_weights(block)[0] for block in blocks]), pooling

    def position_vectors(self, params: Any, grid: tuple[int, int]) -> jax.Array:
        if self.position_embedding == "sincos2d":
            return sincos_positions(grid, self.hidden_size)[0]
        stored = params["Transformer"]["posembed_input"]["pos_embedding"][0]
        return stored[self._placed :]

    def embedding_filters(self, params: Any) -> np.ndarray:
        """float64 (h, w, channels, filters): of the patches, of a hybrid of its first layer."""
        if self.resnet is None:
            return np.asarray(params["embedding"]["kernel"], np.float64)
        return standardize(np.asarray(params["conv_root"]["kernel"], np.float64))
