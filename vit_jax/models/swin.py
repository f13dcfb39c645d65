"""Swin Transformers (Liu et al., arXiv:2103.14030, and version 2, arXiv:2111.09883), as pure Flax
Linen modules.

Stages of blocks with ever fewer and wider tokens, which attend within windows of a map; in every
second block the windows are shifted. Shapes: n images, d a token's width, which doubles from stage
to stage, t tokens of a window, h heads.
"""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models import shapes as reading
from vit_jax.models.family import Arrays, Hints, ImageModel, Shapes, Size, Spec, register
from vit_jax.models.kernels import Kernels, attention_weights, weighted_sum
from vit_jax.models.layers import (
    DropPath,
    Mlp,
    check_images,
    check_patch_size,
    check_rates,
    fields_for,
    head,
    is_observed,
    layer_norm,
    shown_weights,
)
from vit_jax.models.positions import resample
from vit_jax.models.stack import BlockLoop, run_blocks

VERSIONS = (1, 2)

_ATTENTION = "WindowAttention_0"
_NO_WINDOWS = (0, 0, 0, 0)
_MASKED = -100.0  # Added to the scores of what doesn't lie side by side.
_WEIGHTS = nn.initializers.truncated_normal(0.02)
_LARGEST_SCALE = math.log(100)
_POSITION_MLP = 512  # Width of the MLP that gives version 2 its biases.

_log = logging.getLogger(__name__)

# Table 7 of arXiv:2103.14030; S, B and L have 18 blocks in the third stage.
_SIZES = {
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def _swin(size: str, window: int, **more: Any) -> dict[str, Any]:
    fields = dict(zip(("hidden_size", "depths", "heads"), _SIZES[size], strict=True))
    return fields | dict(patch_size=(4, 4), window=window) | more


_FINE_TUNED = dict(version=2, pretrained_windows=(12, 12, 12, 6))
_VARIANTS = {
    **{f"Swin-{size}_4-w{w}": _swin(size, w) for w in (7, 12) for size in _SIZES},
    # Of the code that was published with the paper.
    "Swin-T_4-c24-w8": _swin("T", 8, heads=(4, 8, 16, 32)),
    # Table 1 of arXiv:2111.09883, and the published code; "12to16": pre-trained with windows of 12.
    **{f"SwinV2-{size}_4-w{w}": _swin(size, w, version=2) for w in (8, 16) for size in "TSB"},
    **{f"SwinV2-{size}_4-w12": _swin(size, 12, version=2) for size in "BL"},
    **{
        f"SwinV2-{size}_4-w12to{w}": _swin(size, w, **_FINE_TUNED)
        for w in (16, 24)
        for size in "BL"
    },
}


def window_and_shift(grid: Size, window: int) -> tuple[Size, Size]:
    """The window, and how far it is shifted in every second block, on a map, for each axis.

    A map that is no larger than a window is a window, which isn't shifted (timm's rule; the
    original and Hugging Face decide by the shorter side).
    """
    fits = [size > window for size in grid]
    return (
        (window if fits[0] else grid[0], window if fits[1] else grid[1]),
        (window // 2 if fits[0] else 0, window // 2 if fits[1] else 0),
    )


def cut_windows(x: Any, window: Size) -> Any:
    """(n, rows, columns, ...) -> (n, windows, t, ...), both row by row."""
    (n, rows, columns, *rest), (height, width) = x.shape, window
    down, across = rows // height, columns // width
    x = x.reshape(n, down, height, across, width, *rest)
    return x.swapaxes(2, 3).reshape(n, down * across, height * width, *rest)


def join_windows(x: jax.Array, window: Size, grid: Size) -> jax.Array:
    """Undoes `cut_windows`."""
    (n, _, _, *rest), (height, width), (rows, columns) = x.shape, window, grid
    x = x.reshape(n, rows // height, columns // width, height, width, *rest)
    return x.swapaxes(2, 3).reshape(n, rows, columns, *rest)


@functools.cache
def shift_mask(grid: Size, window: Size, shift: Size) -> np.ndarray:
    """What is added to the scores where windows are shifted, float32 (windows, 1, t, t).

    A map of a grid that windows fill is rolled, so that what comes from opposite borders stands in
    one window; such pairs don't attend to each other.
    """
    rows, columns = (
        np.searchsorted([size - w, size - s], np.arange(size), side="right") if s else [0] * size
        for size, w, s in zip(grid, window, shift, strict=True)
    )
    regions = 3 * np.array(rows)[:, None] + np.array(columns)
    (regions,) = cut_windows(regions[None], window)
    apart = regions[:, None, :, None] != regions[:, None, None, :]
    return np.where(apart, np.float32(_MASKED), np.float32(0))


@functools.cache
def places_in_windows(map_size: Size, grid: Size, window: Size, shift: Size) -> np.ndarray:
    """(windows, t): which token of a map stands there, where it is rolled and padded to a grid.

    Tokens are numbered row by row, behind them what was padded.
    """
    count, numbers = math.prod(map_size), np.full(grid, -1)
    rolled = np.roll(np.arange(count).reshape(map_size), (-shift[0], -shift[1]), (0, 1))
    numbers[: map_size[0], : map_size[1]] = rolled
    numbers[numbers < 0] = np.arange(count, numbers.size)
    return cut_windows(numbers[None], window)[0]


@functools.cache
def relative_index(window: Size) -> np.ndarray:
    """(t, t): the row of a table of ((2 height - 1) (2 width - 1)) for each query and each key."""
    places = np.argwhere(np.ones(window))
    difference = places[:, None] - places + np.array(window) - 1
    return difference @ np.array([2 * window[1] - 1, 1])


def relative_coordinates(window: Size, pretrained: int) -> np.ndarray:
    """float32 ((2 height - 1) (2 width - 1), 2): how far query and key are apart in rows and
    columns, on a scale of logarithms (equation 4 of arXiv:2111.09883), which is the same for
    whatever window as for the one of training, if it is not 0."""
    axes = (8 * np.arange(1 - w, w) / max((pretrained or w) - 1, 1) for w in window)
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return (np.sign(places) * np.log2(np.abs(places) + 1) / 3).astype(np.float32)


class WindowAttention(nn.Module):
    """Attention within windows with a bias for each relative position. (n, rows, columns, d) ->
    the same.

    With the collection "intermediates" mutable it sows there "attention_received" (n, h, rows,
    columns), how much of their weights all tokens give to each, on average; and in a last stage
    "attention_weights" (n, h, tokens, tokens), see `layers.MultiHeadAttention`, zero for those that
    stand in no window together. What is padded is left out.

    Attributes:
      window: (rows, columns), which divide those of the map.
      pretrained_window: see `relative_coordinates`.
      merges: whether it isn't the last stage's.
    """

    num_heads: int
    window: Size
    version: int
    pretrained_window: int
    merges: bool
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | np.ndarray | None, map_size: Size, shift: Size
    ) -> jax.Array:
        d, grid = x.shape[-1], (x.shape[1], x.shape[2])

        def dense(name: str, features: Any, axis: Any = -1, bias: bool = True) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=bias,
                dtype=self.dtype,
                kernel_init=_WEIGHTS,
                dot_general=self.kernels.dot_general,
                name=name,
            )

        heads = (self.num_heads, d // self.num_heads)
        query = dense("query", heads)(x)
        key = dense("key", heads, bias=self.version == 1)(x)
        value = dense("value", heads)(x)
        if self.version == 2:
            query, key = self._cosine(query, key)
        query, key, value = (cut_windows(a, self.window) for a in (query, key, value))
        bias = self._bias()
        if mask is not None:
            bias = bias + mask
        if is_observed(self):
            weights = attention_weights(query, key, bias=bias)
            places = places_in_windows(map_size, grid, self.window, shift)
            y = weighted_sum(self._shown(weights, places, map_size), value)
        else:
            y = self.kernels.attention(query, key, value, None, bias)
        return dense("out", d, (-2, -1))(join_windows(y, self.window, grid))

    def _shown(self, weights: jax.Array, places: np.ndarray, map_size: Size) -> jax.Array:
        """The weights, with what is added to them where they are looked at."""
        weights, count = weights.swapaxes(1, 2), math.prod(map_size)  # (n, h, windows, t, t)
        n, heads, *_ = weights.shape
        received = jnp.zeros((n, heads, places.size), weights.dtype)
        by_tokens = (weights * (places < count)[..., None]).sum(axis=-2)
        received = received.at[:, :, places].set(by_tokens)[..., :count]
        received = received.reshape(n, heads, *map_size) / count
        self.sow("intermediates", "attention_received", received)
        if not self.merges:
            rows, columns = places[:, :, None], places[:, None]
            pairs = jnp.zeros((n, heads, places.size, places.size), weights.dtype)
            pairs = pairs.at[:, :, rows, columns].set(weights)
            real = pairs[:, :, :count, :count]
            self.sow("intermediates", "attention_weights", real)
            real = self.perturb("attention_weights", real)
            weights = pairs.at[:, :, :count, :count].set(real)[:, :, rows, columns]
        return weights.swapaxes(1, 2)

    def _cosine(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Those of which attention's scores are cosines times a learned number for each head."""
        initial = nn.initializers.constant(math.log(10))
        scale = self.param("logit_scale", initial, (self.num_heads, 1, 1))[:, 0]
        # Attention divides by the root.
        scale = jnp.exp(jnp.minimum(scale, _LARGEST_SCALE)) * math.sqrt(query.shape[-1])
        return (
            (_unit(query) * scale).astype(query.dtype),
            _unit(key).astype(key.dtype),
        )

    def _bias(self) -> jax.Array:
        """float32 (h, t, t)."""
        if self.version == 1:
            rows = math.prod(2 * size - 1 for size in self.window)
            table = self.param("relative_position_bias", _WEIGHTS, (rows, self.num_heads))
        else:
            places = relative_coordinates(self.window, self.pretrained_window)
            table = PositionMlp(self.num_heads, name="position_mlp")(places)
            table = 16 * nn.sigmoid(table)
        return jnp.take(table.T, relative_index(self.window), axis=1)


def _unit(x: jax.Array) -> jax.Array:
    """float32 of length 1 over the last axis; what is shorter than 1e-12 is divided by that."""
    x = x.astype(jnp.float32)
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    is_long = square > 1e-24
    # Of what isn't chosen derivatives would be infinite.
    return x * jnp.where(is_long, jax.lax.rsqrt(jnp.where(is_long, square, 1)), 1e12)


class PositionMlp(nn.Module):
    """(places, 2) -> float32 (places, h)."""

    num_heads: int

    @nn.compact
    def __call__(self, places: jax.Array | np.ndarray) -> jax.Array:
        hidden = nn.relu(nn.Dense(_POSITION_MLP, kernel_init=_WEIGHTS, name="Dense_0")(places))
        return nn.Dense(self.num_heads, use_bias=False, kernel_init=_WEIGHTS, name="Dense_1")(
            hidden
        )


class SwinBlock(nn.Module):
    """Attention within windows, and an MLP. (n, rows, columns, d) -> the same.

    Windows are shifted by rolling the map. What doesn't fill them is padded with zeros at the
    bottom and on the right, after rolling.
    """

    num_heads: int
    mlp_dim: int
    window: int
    version: int
    pretrained_window: int
    merges: bool = True
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    layer_norm_epsilon: ClassVar = 1e-5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        shifted: bool | jax.Array,
        deterministic: bool,
        drop_path_rate: float | jax.Array = 0.0,
    ) -> jax.Array:
        _, rows, columns, _ = x.shape
        window, shift = window_and_shift((rows, columns), self.window)
        padding = [(0, -size % w) for size, w in zip((rows, columns), window, strict=True)]
        grid = rows + padding[0][1], columns + padding[1][1]

        def norm(name: str, x: jax.Array, is_here: bool) -> jax.Array:
            # Version 2 has them behind the branches, which are nothing at first.
            if not is_here:
                return x
            initial = nn.initializers.zeros if self.version == 2 else nn.initializers.ones
            return layer_norm(self, name, scale_init=initial)(x)

        def residual(x: jax.Array, branch: jax.Array, i: int) -> jax.Array:
            branch = norm(f"LayerNorm_{i}", branch, self.version == 2)
            drop_path = DropPath(name=f"Dropout_{i}")
            return x + drop_path(branch, drop_path_rate, deterministic=deterministic)

        is_rolled = any(shift) and shifted is not False
        y, mask = norm("LayerNorm_0", x, self.version == 1), None
        if is_rolled:  # In a loop over blocks the number says whether it is, and nothing else.
            mask = shift_mask(grid, window, shift) * (1 if shifted is True else shifted)
            y = _roll(y, (-shift[0], -shift[1]), shifted)
        if any(after for _, after in padding):
            y = jnp.pad(y, ((0, 0), *padding, (0, 0)))
        fields = fields_for(WindowAttention, self, window=window)
        attention = WindowAttention(**fields, name=_ATTENTION)
        y = attention(y, mask, (rows, columns), shift if is_rolled else (0, 0))[:, :rows, :columns]
        if is_rolled:
            y = _roll(y, shift, shifted)
        x = residual(x, y, 0)

        y = norm("LayerNorm_1", x, self.version == 1)
        initial = dict(kernel_init=_WEIGHTS, bias_init=nn.initializers.zeros)
        fields = fields_for(Mlp, self, activation="gelu_erf", **initial)
        return residual(x, Mlp(**fields, name="MlpBlock_0")(y), 1)


def _roll(x: jax.Array, steps: Size, times: bool | jax.Array) -> jax.Array:
    """Rolls maps (n, rows, columns, d), if `times` is 1 and not 0."""
    if isinstance(times, bool):
        return jnp.roll(x, steps, axis=(1, 2)) if times else x
    return jnp.roll(x, jnp.array(steps) * times.astype(jnp.int32), axis=(1, 2))


class PatchMerging(nn.Module):
    """Joins each two by two tokens to one of twice the width. (n, rows, columns, d) ->
    (n, rows / 2, columns / 2, 2 d); odd maps are padded with zeros."""

    version: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    layer_norm_epsilon: ClassVar = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, rows, columns, d = x.shape
        if rows % 2 or columns % 2:
            x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
        rows, columns = -(-rows // 2), -(-columns // 2)
        x = x.reshape(n, rows, 2, columns, 2, d)
        # Column by column: below each other stand the first and the second.
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(n, rows, columns, 4 * d)
        if self.version == 1:
            x = layer_norm(self, "LayerNorm_0")(x)
        x = nn.Dense(
            2 * d,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_WEIGHTS,
            dot_general=self.kernels.dot_general,
            name="Dense_0",
        )(x)
        return layer_norm(self, "LayerNorm_0")(x) if self.version == 2 else x


class Stage(nn.Module):
    """Equal blocks. Returns what comes out of the last, and of each by its name, see `run_blocks`.

    Attributes:
      drop_path_rates: of stochastic depth, for each block.
    """

    num_heads: int
    mlp_dim: int
    window: int
    version: int
    pretrained_window: int
    drop_path_rates: tuple[float, ...]
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()
    merges: bool = True

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        depth = len(self.drop_path_rates)
        x, features = run_blocks(
            SwinBlock,
            fields_for(SwinBlock, self),
            x,
            name="encoderblock",
            depth=depth,
            drop_path_rate=self.drop_path_rates[-1],
            own={
                "drop_path_rate": self.drop_path_rates,
                "shifted": [i % 2 == 1 for i in range(depth)],
            },
            loop=self.loop,
            deterministic=deterministic,
        )
        if not self.merges:
            return x, x, features
        merged = PatchMerging(**fields_for(PatchMerging, self), name="PatchMerging_0")(x)
        return merged, x, features


@register
class SwinTransformer(ImageModel):
    """A Swin Transformer of either version, for images of any size and shape.

    On maps that no whole number of windows fills it follows timm: they are rolled, then padded
    (Hugging Face pads first, which gives other logits). `window_and_shift` has the other rule.

    Attributes:
      num_classes: width of the head; None leaves the head out and returns its input.
      patch_size: (height, width) of a patch in pixels. Border pixels that fill no patch are cut.
      hidden_size: width of a token in the first stage; it doubles from stage to stage.
      depths, heads: blocks and attention heads of each stage.
      window: how many tokens a window is wide and high, where the map is larger.
      version: 1; or 2, with norms behind the branches, attention by cosines, and biases that an MLP
        makes of relative positions.
      pretrained_windows: of version 2, the window of each stage for which that MLP was trained, if
        it isn't the one that it is used with; 0 if it is.
      mlp_ratio: how many times as wide as a token the MLPs are.
      head_bias_init: initial value of the head's bias (its kernel starts at zero).
      stochastic_depth_rate: of the last block; it grows from 0 in the first over all stages. Active
        only with train=True, which then needs an rng named "dropout".
      dtype: what is computed in, float32 or bfloat16; parameters and logits are float32.
      loop: how the blocks of each stage are computed.
      kernels: in which forms, by default the stock ones of Flax; see `choose_kernels`.
    """

    num_classes: int | None
    patch_size: tuple[int, int]
    hidden_size: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    version: int = 1
    pretrained_windows: tuple[int, ...] = _NO_WINDOWS
    mlp_ratio: float = 4.0
    head_bias_init: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32
    loop: BlockLoop = BlockLoop()
    kernels: Kernels = Kernels()

    kind: ClassVar = "Swin Transformer"
    variants: ClassVar = _VARIANTS
    untold: ClassVar = ("window", "pretrained_windows")
    shows_attention: ClassVar = True
    value_range: ClassVar = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"
    classifier: ClassVar = "gap"
    representation_size: ClassVar = None
    layer_norm_epsilon: ClassVar = 1e-5

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool = False, return_features: bool = False
    ) -> jax.Array | tuple[jax.Array, Mapping[str, jax.Array]]:
        """Classifies images.

        Args:
          images: (n, h, w, c) float; the published weights are for ImageNet's mean and deviation.
          train: whether stochastic depth is active.
          return_features: whether to return the intermediate features too.

        Returns:
          logits, float32 (n, num_classes); with num_classes=None the head's input, (n, features).
          With return_features a pair (logits, features): "embedding" (n, rows, columns, d) the
          patches; "stage_0", ... the map that comes out of each stage, (n, rows, columns, d), and
          "stage_0/encoderblock_0", ... out of each of its blocks; "encoder_norm" (n, t, d), and
          "pre_logits" the head's input.

        Raises UserError if the fields or the images make no sense.
        """
        self._check(images)
        x = nn.Conv(
            self.hidden_size,
            self.patch_size,
            strides=self.patch_size,
            padding="VALID",
            dtype=self.dtype,
            conv_general_dilated=self.kernels.conv_general_dilated,
            name="embedding",
        )(images.astype(self.dtype))
        features = {"embedding": x}
        x = layer_norm(self, "embedding_norm")(x)
        last, first = max(self.num_layers - 1, 1), 0
        for i, depth in enumerate(self.depths):
            blocks = range(first, first + depth)
            first += depth
            stage = Stage(
                **fields_for(
                    Stage,
                    self,
                    num_heads=self.heads[i],
                    mlp_dim=round(self._width(i) * self.mlp_ratio),
                    pretrained_window=self.pretrained_windows[i],
                    drop_path_rates=tuple(self.stochastic_depth_rate * b / last for b in blocks),
                    merges=i < len(self.depths) - 1,
                ),
                name=f"stage_{i}",
            )
            x, features[f"stage_{i}"], own = stage(x, deterministic=not train)
            features |= {f"stage_{i}/{name}": value for name, value in own.items()}
        n, rows, columns, d = x.shape
        x = layer_norm(self, "encoder_norm")(x.reshape(n, rows * columns, d))
        features["encoder_norm"] = x
        x = features["pre_logits"] = x.astype(jnp.float32).mean(axis=1)
        logits = head(self, x)
        return (logits, features) if return_features else logits

    def _check(self, images: jax.Array) -> None:
        check_images(images)
        check_patch_size(self.patch_size)
        check_rates(self)
        self.grid_size((images.shape[1], images.shape[2]))
        if self.version not in VERSIONS:
            raise UserError(f"version is {self.version}, expected 1 or 2")
        lengths = {len(self.depths), len(self.heads), len(self.pretrained_windows)}
        if len(lengths) > 1 or not min(self.depths, default=0) > 0:
            raise UserError(
                f"depths {self.depths}, heads {self.heads} and pretrained_windows "
                f"{self.pretrained_windows}: expected a number for each stage, of blocks at least 1"
            )
        if self.window < 1:
            raise UserError(f"window is {self.window}, expected at least 1")
        if self.version == 1 and any(self.pretrained_windows):
            raise UserError("pretrained_windows are of version 2: leave them out")
        for i, heads in enumerate(self.heads):
            if heads < 1 or self._width(i) % heads:
                raise UserError(
                    f"{heads} heads don't divide the width {self._width(i)} of stage {i + 1}: "
                    "change heads or hidden_size"
                )

    def _width(self, stage: int) -> int:
        return self.hidden_size * 2**stage

    @property
    def num_layers(self) -> int:
        return sum(self.depths)

    @property
    def num_features(self) -> int:
        return self._width(len(self.depths) - 1)

    @property
    def stride(self) -> Size:
        return self.patch_size

    def grid_size(self, image_size: Size) -> tuple[int, int]:
        rows, columns = (a // b for a, b in zip(image_size, self.patch_size, strict=True))
        if rows < 1 or columns < 1:
            raise UserError(
                "the image of {}x{} pixels is smaller than one patch of {}x{}: "
                "use a larger image size".format(*image_size, *self.patch_size)
            )
        return rows, columns

    def stage_grids(self, image_size: Size) -> tuple[Size, ...]:
        rows, columns = self.grid_size(image_size)
        return tuple((-(-rows // 2**i), -(-columns // 2**i)) for i in range(len(self.depths)))

    def stage_windows(self, image_size: Size) -> tuple[Size, ...]:
        """The windows of each stage; they are no larger than its map."""
        return tuple(window_and_shift(g, self.window)[0] for g in self.stage_grids(image_size))

    # Weights that become a network.

    @classmethod
    def recognizes(cls, shapes: Shapes) -> bool:
        return any(key.startswith("stage_0/") for key in shapes)

    @classmethod
    def from_shapes(cls, shapes: Shapes, hints: Hints) -> Spec:
        stages: list[reading.Blocks] = []
        while any(key.startswith(f"stage_{len(stages)}/") for key in shapes):
            stages.append(reading.Blocks(shapes, f"stage_{len(stages)}/encoderblock_"))
        heads = [stage.majority("query/kernel", 3, 1) for stage in stages]
        mlp_dim = stages[0].majority("MlpBlock_0/Dense_0/kernel", 2, 1)
        required = {"embedding/kernel": 4}
        reading.check_required(shapes, required, stages[0], (*heads, mlp_dim), hints.where)
        *patch_size, channels, width = shapes["embedding/kernel"]
        version = 2 if any(stage.majority("logit_scale", 3, 0) for stage in stages) else 1
        told = {k: v for k, v in (hints.untold or {}).items() if k in cls.untold}
        if version == 1 and "window" not in told:
            rows = stages[0].majority("relative_position_bias", 2, 0)
            told["window"] = (math.isqrt(rows) + 1) // 2
        elif "window" not in told and hints.window:
            told["window"] = hints.window
        elif "window" not in told:
            _log.warning(
                "%s: no array tells the windows of version 2: taken as %d. If that is wrong, tell: "
                "--window N or load(..., window=N)",
                *(hints.where, cls.window),
            )
        model = cls(
            num_classes=reading.num_outputs(shapes, "head"),
            patch_size=(patch_size[0], patch_size[1]),
            hidden_size=width,
            depths=tuple(stage.depth for stage in stages),
            heads=tuple(heads),
            version=version,
            mlp_ratio=mlp_dim / width,
            **{"pretrained_windows": (0,) * len(stages)} | told,
        )
        size = hints.image_size or model.usual_size
        if hints.likely_size and not hints.image_size:  # Of version 1 the tables tell if it fits.
            tables = [stage.majority("relative_position_bias", 2, 0) for stage in stages]
            windows = model.stage_windows(hints.likely_size)
            if tables == [(2 * h - 1) * (2 * w - 1) for h, w in windows]:
                size = hints.likely_size
        return Spec(model, size, channels)

    def shapes(self, image_size: Size, channels: int) -> dict[str, tuple[int, ...]]:
        images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
        init = self.clone(loop=BlockLoop(scan=True)).init  # One block of each stage is traced.
        params = jax.eval_shape(lambda x: init(jax.random.key(0), x), images)["params"]
        shapes = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            key = "/".join(k.key for k in path)
            if "/encoderblock/" in key:
                for i in range(leaf.shape[0]):
                    name = key.replace("/encoderblock/", f"/encoderblock_{i}/")
                    shapes[name] = leaf.shape[1:]
            else:
                shapes[key] = leaf.shape
        return shapes

    @property
    def usual_size(self) -> Size:
        """What published networks of such windows are for."""
        of_version_2 = {8: 256, 12: 192, 16: 256, 24: 384} if self.version == 2 else {}
        pixels = of_version_2.get(self.window, 32 * self.window)
        return pixels, pixels

    # Weights for another task.

    @property
    def first_layer(self) -> str:
        return "embedding/kernel"

    def for_images(
        self, arrays: Arrays, old: Size, new: Size, window: int | None = None
    ) -> tuple[Self, Arrays]:
        """With other windows the tables of biases are resized as the original does, bicubically
        with a of -0.75; in version 2 their MLP goes on to see what it was trained for."""
        model = self if window is None else self.clone(window=window)
        windows = zip(self.stage_windows(old), model.stage_windows(new), strict=True)
        changed = {i: (a, b) for i, (a, b) in enumerate(windows) if a != b}
        if self.version == 2:
            trained = list(self.pretrained_windows)
            for i, (before, _) in changed.items():
                if not trained[i] and before[0] != before[1]:
                    raise UserError(
                        "stage {} has windows of {}x{}, which are not square, and so no single "
                        "one that it was trained for: keep its images".format(i + 1, *before)
                    )
                trained[i] = trained[i] or before[0]
            return model.clone(pretrained_windows=tuple(trained)), arrays
        arrays = dict(arrays)
        for i, (before, after) in changed.items():
            for j in range(self.depths[i]):
                key = f"stage_{i}/encoderblock_{j}/{_ATTENTION}/relative_position_bias"
                grids = [(2 * rows - 1, 2 * columns - 1) for rows, columns in (before, after)]
                (arrays[key],) = resample(arrays[key][None], *grids, prefix=0, rule="torch")
        return model, arrays

    # What `explain` looks at: the last stage as it does at a ViT, and of others the last block's
    # attention within windows.

    def attended_grid(self, image_size: Size) -> Size:
        return self.stage_grids(image_size)[-1]

    @property
    def attended_blocks(self) -> range:
        return range(self.num_layers - self.depths[-1], self.num_layers)

    def attention_weights(self, collection: Any) -> tuple[jax.Array, jax.Array | None]:
        last = collection[f"stage_{len(self.depths) - 1}"]
        blocks = (last[f"encoderblock_{i}"] for i in range(self.depths[-1]))
        return jnp.stack([shown_weights(block, _ATTENTION)[0] for block in blocks]), None

    def further_maps(self, collection: Any) -> dict[str, jax.Array]:
        maps = {}
        for i, depth in enumerate(self.depths[:-1]):
            block = collection[f"stage_{i}"][f"encoderblock_{depth - 1}"]
            ((received,),) = block[_ATTENTION]["attention_received"]
            for number, values in enumerate(received, 1):
                maps[f"stage {i + 1}, head {number}, received"] = values
        return maps

    def block_outputs(self, features: Mapping[str, jax.Array]) -> jax.Array:
        name = f"stage_{len(self.depths) - 1}/encoderblock"
        blocks = [features[f"{name}_{i}"][0] for i in range(self.depths[-1])]
        return jnp.stack([x.reshape(-1, x.shape[-1]) for x in blocks])

    def embedding_filters(self, params: Any) -> np.ndarray:
        return np.asarray(params["embedding"]["kernel"], np.float64)

    def summary(self) -> dict[str, str]:
        depths, heads = (", ".join(map(str, x)) for x in (self.depths, self.heads))
        lines = {
            "blocks": f"stages of {depths}, from {self.hidden_size} to {self.num_features} wide, "
            f"{heads} heads, MLPs {self.mlp_ratio:g} times as wide",
            "windows": f"{self.window}x{self.window} tokens, or the map if it is smaller",
            "version": str(self.version),
        }
        if any(self.pretrained_windows):
            trained = ", ".join(map(str, self.pretrained_windows))
            lines["windows"] += f"; positions are those of windows of {trained}"
        return lines
