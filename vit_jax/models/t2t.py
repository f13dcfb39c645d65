"""T2T-ViT (Yuan et al., arXiv:2101.11986), as pure Flax Linen modules.

Tokens are made in three steps, each of which looks at windows that overlap, and the blocks are
those of a ViT. Shapes: n images, t tokens, d = hidden_size.
"""

import functools
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
from vit_jax.models.kernels import Kernels, attention_weights
from vit_jax.models.layers import (
    Mlp,
    check_choice,
    check_images,
    check_rates,
    fields_for,
    head,
    layer_norm,
    shown_weights,
)
from vit_jax.models.positions import resample
from vit_jax.models.stack import BlockLoop
from vit_jax.models.vit import Encoder

TOKEN_ATTENTIONS = ("performer", "transformer")

_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # Of each step the window, stride and padding.
_WIDTH = 64  # Of a token between the steps.
_FEATURES = 32  # Of the performer.
_DROPOUT = 0.1  # Of the performer, whatever the rate of the blocks.
_EPSILON = 1e-5  # Of every LayerNorm.
# As in the original: of queries and keys much longer than this gives nothing would be left of the
# performer's features, nor of its derivative.
_WEIGHTS = nn.initializers.normal(0.02)
_POSITIONS = "Transformer/posembed_input/pos_embedding"


def _t2t(width: int, depth: int, heads: int, ratio: int, attention: str = "performer") -> dict:
    return dict(
        hidden_size=width,
        num_layers=depth,
        num_heads=heads,
        mlp_dim=ratio * width,
        token_attention=attention,
    )


# Tables 1 and 2 of arXiv:2101.11986, and the names of its code; "resnext" has heads of 12 channels.
_VARIANTS = {
    "T2T-ViT-7": _t2t(256, 7, 4, 2),
    "T2T-ViT-10": _t2t(256, 10, 4, 2),
    "T2T-ViT-12": _t2t(256, 12, 4, 2),
    "T2T-ViT-14": _t2t(384, 14, 6, 3),
    "T2T-ViT-19": _t2t(448, 19, 7, 3),
    "T2T-ViT-24": _t2t(512, 24, 8, 3),
    "T2T-ViT-t-14": _t2t(384, 14, 6, 3, "transformer"),
    "T2T-ViT-t-19": _t2t(448, 19, 7, 3, "transformer"),
    "T2T-ViT-t-24": _t2t(512, 24, 8, 3, "transformer"),
    "T2T-ViT-14-resnext": _t2t(384, 14, 32, 3),
    "T2T-ViT-14-wide": _t2t(768, 4, 12, 3),
}


def soft_split(images: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """The overlapping windows of images padded with zeros (section 3.1).

    (n, h, w, c) -> (n, rows, columns, c * window**2). In a window channel goes before row before
    column.
    """
    # Slices, which XLA makes one copy of; as a convolution it would multiply with ones and zeros.
    for axis in (1, 2):
        pads = [(padding, padding) if i == axis else (0, 0) for i in range(images.ndim)]
        images = jnp.pad(images, pads)
        end = images.shape[axis] - window + 1
        slices = [
            jax.lax.slice_in_dim(images, i, i + end, stride, axis=axis) for i in range(window)
        ]
        images = jnp.stack(slices, axis=-1)
    return images.reshape(*images.shape[:3], -1)


def sinusoid(tokens: int, width: int) -> np.ndarray:
    """float32 (1, tokens, width): sines of token / 10000^(2i / width) in the even places 2i, and
    cosines in the odd ones (section 3.5 of arXiv:1706.03762)."""
    angles = np.arange(tokens)[:, None] / 10_000.0 ** (2 * (np.arange(width) // 2) / width)
    waves = np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))
    return waves[None].astype(np.float32)


def _sinusoid_init(_: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(sinusoid(*shape[1:]), dtype)


def random_features(x: jax.Array, features: jax.Array) -> jax.Array:
    """exp(w x - |x|^2 / 2) / sqrt(m) for each of the m rows w of `features`: their product for two
    vectors is close to the exponential of the vectors' product (arXiv:2009.14794, lemma 1).

    (n, t, c) and (m, c) give (n, t, m).
    """
    projected = jnp.einsum("ntc,mc->ntm", x, features, precision="highest")
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    return jnp.exp(projected - squares / 2) / math.sqrt(len(features))


def linear_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, features: jax.Array
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Attention whose weights are products of `random_features`, each row divided by its sum.

    In float32, for the exponentials have no maximum taken off; the largest array has t x m numbers.

    Returns:
      (n, t, c) in the dtype of `value`; and a function that gives (n, t), the mean over all queries
      of what each token gets.
    """
    query, key = (random_features(x.astype(jnp.float32), features) for x in (query, key))
    einsum = functools.partial(jnp.einsum, precision="highest")
    total = einsum("ntm,nm->nt", query, key.sum(axis=1)) + 1e-8
    query = query / total[..., None]
    by_feature = einsum("nsm,nsc->nmc", key, value.astype(jnp.float32))
    y = einsum("ntm,nmc->ntc", query, by_feature).astype(value.dtype)
    return y, lambda: einsum("nm,nsm->ns", query.mean(axis=1), key)


class TokenAttention(nn.Module):
    """A small transformer layer with one head, which narrows tokens.

    (n, rows, columns, d) -> (n, rows, columns, 64). Attention's output is added to the values, and
    not to the input, which is wider. If "intermediates" is mutable it sows there
    "attention_received" (n, rows, columns), the mean over all queries of what a token gets.

    Attributes:
      token_attention: "performer", linear in t (arXiv:2009.14794), or "transformer", whose scores
        are divided by the root of the input's width, not the head's.
    """

    token_attention: str
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    layer_norm_epsilon: ClassVar = _EPSILON

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        is_performer = self.token_attention == "performer"
        n, rows, columns, width = x.shape

        def dense(name: str, bias: bool) -> nn.Dense:
            return nn.Dense(
                _WIDTH,
                use_bias=bias,
                dtype=self.dtype,
                kernel_init=_WEIGHTS,
                dot_general=self.kernels.dot_general,
                name=name,
            )

        rate = _DROPOUT if is_performer else 0.0
        dropout = nn.Dropout(rate, deterministic=deterministic)
        z = layer_norm(self, "LayerNorm_0")(x.reshape(n, rows * columns, width))
        query, key, value = (dense(name, is_performer)(z) for name in ("query", "key", "value"))
        if is_performer:
            rows_init = nn.initializers.orthogonal(math.sqrt(_FEATURES))
            features = self.param("features", rows_init, (_FEATURES, _WIDTH))
            y, received = linear_attention(query, key, value, features)
        else:
            query = query * math.sqrt(_WIDTH / width)  # Attention divides by the head's width.
            y, received = self._softmax_attention(query, key, value)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow("intermediates", "attention_received", received().reshape(n, rows, columns))
        y = value + dropout(dense("out", True)(y))
        z = layer_norm(self, "LayerNorm_1")(y)
        mlp = Mlp(
            _WIDTH,
            activation="gelu_erf",
            dtype=self.dtype,
            kernels=self.kernels,
            kernel_init=_WEIGHTS,
            bias_init=nn.initializers.zeros,
            name="MlpBlock_0",
        )
        return (y + dropout(mlp(z))).reshape(n, rows, columns, _WIDTH)

    def _softmax_attention(
        self, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, Callable[[], jax.Array]]:
        """As `linear_attention`."""
        t = query.shape[1]
        padding = -t % self.kernels.token_multiple
        pads = ((0, 0), (0, padding), (0, 0))
        query, key, value = (jnp.pad(x, pads)[:, :, None] for x in (query, key, value))
        y = self.kernels.attention(query, key, value, t if padding else None)[:, :t, 0]
        return y, lambda: attention_weights(query[:, :t], key[:, :t])[:, 0].mean(axis=1)


class TokensToToken(nn.Module):
    """The tokens-to-token module (section 3.1). (n, h, w, c) -> the maps (n, h', w', 64) after the
    first two steps, and (n, rows, columns, hidden_size)."""

    hidden_size: int
    token_attention: str
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> list[jax.Array]:
        maps = []
        for i, split in enumerate(_SPLITS[:-1], 1):
            attention = TokenAttention(**fields_for(TokenAttention, self), name=f"attention{i}")
            x = attention(soft_split(x, *split), deterministic=deterministic)
            maps.append(x)
        project = nn.Dense(
            self.hidden_size,
            dtype=self.dtype,
            kernel_init=_WEIGHTS,
            dot_general=self.kernels.dot_general,
            name="project",
        )
        return [*maps, project(soft_split(x, *_SPLITS[-1]))]


@register
class T2TViT(ImageModel):
    """A T2T-ViT for images of any size and number of channels.

    Every LayerNorm's epsilon is 1e-5, every GELU exact, and queries, keys and values of the blocks
    have no bias. The features of the performer and the positions, sines and cosines at first, are
    weights that are not trained.

    Attributes:
      num_classes: width of the head; None leaves the head out and returns its input.
      hidden_size: width of a token in the blocks, d.
      num_layers, num_heads, mlp_dim: depth, attention heads and hidden width of the blocks.
      token_attention: by which tokens are made, one of TOKEN_ATTENTIONS. The performer has its own
        dropout of 0.1 with train=True.
      head_bias_init: initial value of the head's bias (its kernel starts at zero).
      dropout_rate, attention_dropout_rate, stochastic_depth_rate: of the blocks; active only with
        train=True, which needs an rng named "dropout".
      dtype: what is computed in, float32 or bfloat16. Parameters, statistics of the LayerNorms, the
        performer's attention, softmax and the returned logits are float32 in any case.
      loop: how the blocks are computed.
      kernels: in which forms, by default the stock ones of Flax; see `choose_kernels`.
    """

    num_classes: int | None
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    token_attention: str = "performer"
    head_bias_init: float = 0.0
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    kind: ClassVar = "T2T-ViT"
    variants: ClassVar = _VARIANTS
    classifiers: ClassVar = ("token",)
    classifier: ClassVar = "token"
    representation_size: ClassVar = None
    layer_norm_epsilon: ClassVar = _EPSILON
    stride: ClassVar = (16, 16)
    num_prefix_tokens: ClassVar = 1
    has_class_token: ClassVar = True
    weightless: ClassVar = (
        "dropout_rate",
        "attention_dropout_rate",
        "stochastic_depth_rate",
        "dtype",
    )
    frozen: ClassVar = (
        _POSITIONS,
        "tokens_to_token/attention1/features",
        "tokens_to_token/attention2/features",
    )
    shows_attention: ClassVar = True

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]:
        """Classifies images.

        Args:
          images: (n, h, w, c) float.
          train: whether dropout and stochastic depth are active.
          return_features: whether to return the intermediate features too.

        Returns:
          logits, float32 (n, num_classes); with num_classes=None the head's input. With
          return_features a pair (logits, features): "tokens_1" and "tokens_2" (n, h', w', 64) the
          maps of the first steps, "embedding" (n, rows, columns, d) what goes into the blocks,
          "encoderblock_0", ... (n, t, d) the output of each, "encoder_norm" (n, t, d), and
          "pre_logits" the head's input.

        Raises UserError if the fields or the images make no sense.
        """
        check_images(images)
        check_choice(self, "token_attention", TOKEN_ATTENTIONS)
        check_rates(self)
        n, h, w, _ = images.shape
        rows, columns = self.grid_size((h, w))
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "change one of them"
            )
        tokens_to_token = TokensToToken(**fields_for(TokensToToken, self), name="tokens_to_token")
        *maps, x = tokens_to_token(images.astype(self.dtype), deterministic=not train)
        features = {f"tokens_{i}": tokens for i, tokens in enumerate(maps, 1)} | {"embedding": x}
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
        x = jnp.concatenate(
            [
                jnp.tile(cls.astype(x.dtype), (n, 1, 1)),
                x.reshape(n, rows * columns, self.hidden_size),
            ],
            axis=1,
        )
        fields = fields_for(
            Encoder,
            self,
            activation="gelu_erf",
            layer_norm_epsilon=_EPSILON,
            qkv_bias=False,
            position_init=_sinusoid_init,
        )
        x, block_features = Encoder(**fields, name="Transformer")(x, deterministic=not train)
        features |= block_features | {"encoder_norm": x, "pre_logits": x[:, 0]}
        logits = head(self, x[:, 0])
        return (logits, features) if return_features else logits

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        rows, columns = image_size
        for window, stride, padding in _SPLITS:
            rows, columns = (
                (size + 2 * padding - window) // stride + 1 for size in (rows, columns)
            )
        if min(image_size) < 1 or rows < 1 or columns < 1:
            raise UserError(
                "the image of {}x{} pixels is smaller than a window of the first tokens: "
                "use a larger image size".format(*image_size)
            )
        return rows, columns

    def attention_size(self, image_size: Size) -> tuple[int, int, int]:
        return self.num_tokens(image_size), self.num_heads, self.hidden_size // self.num_heads

    # Weights that become a network.

    @classmethod
    def recognizes(cls, shapes: Shapes) -> bool:
        return "tokens_to_token/project/kernel" in shapes

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints) -> Spec:
        blocks = reading.Blocks(shapes, "Transformer/encoderblock_")
        heads = blocks.majority("query/kernel", 3, 1)
        mlp_dim = blocks.majority("Dense_0/kernel", 2, 1)
        window = "tokens_to_token/attention1/LayerNorm_0/scale"
        required = {"tokens_to_token/project/kernel": 2, window: 1, _POSITIONS: 3}
        reading.check_required(shapes, required, blocks, (heads, mlp_dim), hints.where)
        hidden_size = shapes["tokens_to_token/project/kernel"][1]
        reading.check_heads(heads, hidden_size, hints.where)
        is_performer = "tokens_to_token/attention1/features" in shapes
        model = cls(
            num_classes=reading.num_outputs(shapes, "head"),
            hidden_size=hidden_size,
            num_layers=blocks.depth,
            num_heads=heads,
            mlp_dim=mlp_dim,
            token_attention="performer" if is_performer else "transformer",
        )
        size = reading.size_of_grid(model, shapes[_POSITIONS][1] - 1, hints)
        return Spec(model, size, max(shapes[window][0] // _SPLITS[0][0] ** 2, 1))

    def with_channels(self, arrays: Arrays, channels: int) -> Arrays:
        raise UserError(
            f"the weights of a T2T-ViT can't be made ready for images of {channels} channels: it "
            "normalises a window over all of its channels; make grey images coloured (rgb in the "
            "preprocessing), choose a ViT, or train from scratch"
        )

    def resize(self, arrays: Arrays, old: Size, new: Size) -> Arrays:
        """Resamples the positions as the original does, though they are sines and cosines."""
        grids = self.grid_size(old), self.grid_size(new)
        return {**arrays, _POSITIONS: resample(arrays[_POSITIONS], *grids, prefix=1, rule="torch")}

    def summary(self) -> dict[str, str]:
        return {
            "blocks": f"{self.num_layers}, {self.hidden_size} wide, {self.num_heads} heads, "
            f"MLP {self.mlp_dim} wide",
            "tokens": f"three soft splits, with a {self.token_attention} behind the first two",
        }

    # What `explain` looks at.

    def attention_weights(self, collection: Any) -> tuple[jax.Array, jax.Array | None]:
        blocks = (collection["Transformer"][f"encoderblock_{i}"] for i in range(self.num_layers))
        return jnp.stack([shown_weights(block)[0] for block in blocks]), None

    def further_maps(self, collection: Any) -> dict[str, jax.Array]:
        steps = collection["tokens_to_token"]
        return {
            f"tokens {i}, attention received": steps[f"attention{i}"]["attention_received"][0][0]
            for i in (1, 2)
        }

    def position_vectors(self, params: Any, grid: tuple[int, int]) -> jax.Array:
        return params["Transformer"]["posembed_input"]["pos_embedding"][0, 1:]

    def embedding_filters(self, params: Any) -> np.ndarray:
        """float64 (7, 7, channels, 64): those of the first step's values."""
        first, window = params["tokens_to_token"]["attention1"], _SPLITS[0][0]
        scale = np.asarray(first["LayerNorm_0"]["scale"], np.float64)
        kernel = scale[:, None] * np.asarray(first["value"]["kernel"], np.float64)
        return kernel.reshape(-1, window, window, _WIDTH).transpose(1, 2, 0, 3)
