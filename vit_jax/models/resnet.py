"""The ResNet in front of a hybrid's Transformer (arXiv:1912.11370, section 3).

Convolutions are weight-standardised (arXiv:1903.10520) and without bias, normalisation is GroupNorm
(arXiv:1803.08494). All modules map (n, h, w, c) to (n, h', w', c').
"""

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.family import Shapes
from vit_jax.models.shapes import last_of

# As in the code that trained the published weights. The first is added outside the root.
WEIGHT_STANDARDISATION_EPSILON = 1e-5
GROUP_NORM_EPSILON = 1e-6

_ROOT_WIDTH = 64
_ROOT_STRIDE = 4  # A convolution and a pooling of stride 2.


def resnet_stride(blocks: Sequence[int]) -> int:
    """How many pixels a step in the features is wide: 4 after the root, twice that a later
    stage."""
    return _ROOT_STRIDE * 2 ** max(len(blocks) - 1, 0)


def resnet_output_size(size: int, blocks: Sequence[int]) -> int:
    """Height or width of the features of an image of `size` pixels: halved, rounding up."""
    return -(-size // resnet_stride(blocks))


def resnet_stages(shapes: Shapes) -> tuple[int, ...] | None:
    """Units in each stage of the ResNet whose arrays have these shapes; None if there is none."""
    if "conv_root/kernel" not in shapes:
        return None
    units: dict[int, set[int]] = {}
    for key in shapes:
        # Published networks have up to four stages and 36 units.
        if match := re.match(r"block([1-8])/unit([1-9][0-9]?)/", key):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    stages = last_of(units) if units else 0
    return tuple(last_of(units.get(stage, ())) for stage in range(1, stages + 1))


def standardize(kernel: Any) -> Any:
    """A kernel (h, w, in, out) with mean 0 and deviation 1 for each output."""
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    return kernel / (kernel.std(axis=(0, 1, 2)) + WEIGHT_STANDARDISATION_EPSILON)


class StdConv(nn.Module):
    """A convolution whose kernel is normalised over (h, w, in) for each output, padded "SAME"."""

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = standardize(self.param("kernel", nn.initializers.lecun_normal(), shape))
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def _group_norm(name: str, dtype: Any, scale: float = 1.0) -> nn.GroupNorm:
    return nn.GroupNorm(
        num_groups=32,
        epsilon=GROUP_NORM_EPSILON,
        dtype=dtype,
        scale_init=nn.initializers.constant(scale),
        name=name,
    )


class ResidualUnit(nn.Module):
    """A bottleneck: 1x1, 3x3 with the stride, 1x1 to four times the width, added to its input."""

    width: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = 4 * self.width
        shortcut = x
        if x.shape[-1] != out or self.stride != 1:
            shortcut = StdConv(out, (1, 1), self.stride, self.dtype, name="conv_proj")(x)
            shortcut = _group_norm("gn_proj", self.dtype)(shortcut)
        y = StdConv(self.width, (1, 1), 1, self.dtype, name="conv1")(x)
        y = nn.relu(_group_norm("gn1", self.dtype)(y))
        y = StdConv(self.width, (3, 3), self.stride, self.dtype, name="conv2")(y)
        y = nn.relu(_group_norm("gn2", self.dtype)(y))
        y = StdConv(out, (1, 1), 1, self.dtype, name="conv3")(y)
        # Starts at zero, so that a new unit passes its input on.
        y = _group_norm("gn3", self.dtype, scale=0.0)(y)
        return nn.relu(shortcut + y)


class ResNetStage(nn.Module):
    """Units of one width; the first has the stride."""

    units: int
    width: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.units):
            unit_stride = self.stride if i == 0 else 1
            x = ResidualUnit(self.width, unit_stride, self.dtype, name=f"unit{i + 1}")(x)
        return x


def resnet_features(x: jax.Array, blocks: Sequence[int], dtype: Any) -> jax.Array:
    """Root and stages, for a module that wants them among its own sub-modules.

    Args:
      x: (n, h, w, c) images.
      blocks: units a stage; empty for the root alone.
      dtype: what is computed in.

    Returns:
      (n, h', w', c'), see `resnet_output_size`.
    """
    x = StdConv(_ROOT_WIDTH, (7, 7), 2, dtype, name="conv_root")(x)
    x = nn.relu(_group_norm("gn_root", dtype)(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for i, units in enumerate(blocks):
        width, first = _ROOT_WIDTH * 2**i, 1 if i == 0 else 2
        x = ResNetStage(units, width, first, dtype, name=f"block{i + 1}")(x)
    return x
