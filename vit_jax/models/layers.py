"""The layers that Vision Transformers are made of.

Shapes: n images or texts, t query tokens, s key and value tokens, h heads, d a token's width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.kernels import (
    Kernels,
    attention_weights,
    dot_product_attention,
    key_mask,
    weighted_sum,
)

# Its name in the official checkpoints.
ATTENTION_NAME = "MultiHeadDotProductAttention_0"

# The GELU (arXiv:1606.08415) approximated by tanh, exactly x Phi(x) by the error function, or x
# sigmoid(1.702 x).
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "quick_gelu")

# What stands between the dense layers: an activation, or the SwiGLU (arXiv:2002.05202).
MLPS = ("gelu", "swiglu")

# The published weights were trained with it.
LAYER_NORM_EPSILON = 1e-6


def layer_norm(module: Any, name: str, **fields: Any) -> nn.Module:
    """A LayerNorm (arXiv:1607.06450) in the form, dtype and epsilon of its module."""
    return module.kernels.layer_norm(
        epsilon=module.layer_norm_epsilon, dtype=module.dtype, name=name, **fields
    )


def fields_for(target: type[nn.Module], source: nn.Module, **changes: Any) -> dict[str, Any]:
    """The fields of `target` that `source` has too, with its values, but for the changes."""
    names = {f.name for f in dataclasses.fields(target)} - {"name", "parent"}
    shared = names & {f.name for f in dataclasses.fields(source)}
    return {name: getattr(source, name) for name in shared} | changes


class Mlp(nn.Module):
    """Two dense layers with a GELU between them, over the last axis. (..., d) -> (..., d).

    With mlp "swiglu" three: the last one sees silu(Dense_0(x)) * Dense_1(x), and `activation` is
    not used.
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    mlp: str = "gelu"
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()
    kernel_init: Callable = nn.initializers.xavier_uniform()
    bias_init: Callable = nn.initializers.normal(stddev=1e-6)

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        def dense(features: int) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                dot_general=self.kernels.dot_general,
            )

        dropout = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        hidden = dense(self.mlp_dim)(x)
        if self.mlp == "swiglu":
            hidden = _in_float32(nn.silu, hidden) * dense(self.mlp_dim)(x)
        elif self.activation == "gelu_tanh":
            hidden = self.kernels.gelu(hidden)
        elif self.activation == "gelu_erf":
            hidden = _in_float32(functools.partial(nn.gelu, approximate=False), hidden)
        else:
            hidden = _in_float32(lambda x: x * nn.sigmoid(1.702 * x), hidden)
        return dropout(dense(x.shape[-1])(dropout(hidden)))


def _in_float32(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """As the stock form of the GELU by tanh computes."""
    return function(x.astype(jnp.float32)).astype(x.dtype)


class MultiHeadAttention(nn.Module):
    """Attention (arXiv:1706.03762) of tokens (n, t, d) to tokens (n, s, d). Returns (n, t, d).

    The parameters are those of `nn.MultiHeadDotProductAttention`, of which the official ones are.
    With the collection "intermediates" mutable it sows there "attention_weights" (n, h, t, s),
    before dropout. Zeros of that shape in the collection "perturbations" are added to them, so that
    their gradient can be taken (not with dropout); `apply(..., mutable=["perturbations"])` makes
    such zeros. Where weights are looked at or dropped, the stock form computes.

    Attributes:
      num_heads: h; it divides d.
      dropout_rate: of the weights, each drawn on its own; needs an rng named "dropout".
      qkv_bias: whether queries, keys and values have a bias.
      dtype: what is computed in. Parameters and softmax are float32.
      kernels: the forms in which it is computed.
      length: if given, only so many of the tokens are real and attended to, and only their weights
        are sown and perturbed; the others are padding.
    """

    num_heads: int
    dropout_rate: float = 0.0
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()
    length: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs_kv: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        d = x.shape[-1]

        def dense(name: str, features: Any, axis: Any = -1, bias: bool = True) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                use_bias=bias,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                dot_general=self.kernels.dot_general,
                name=name,
            )

        heads = (self.num_heads, d // self.num_heads)
        query = dense("query", heads, bias=self.qkv_bias)(x)
        key = dense("key", heads, bias=self.qkv_bias)(inputs_kv)
        value = dense("value", heads, bias=self.qkv_bias)(inputs_kv)
        drops = self.dropout_rate > 0 and not deterministic and not self.is_initializing()
        if drops or is_observed(self):
            weights = self._weights(query, key, perturbed=not drops)
            weights = nn.Dropout(self.dropout_rate, deterministic=not drops)(weights)
            y = weighted_sum(weights, value)
        else:
            y = self.kernels.attention(query, key, value, self.length)
        return dense("out", d, (-2, -1))(y)

    def _weights(self, query: jax.Array, key: jax.Array, *, perturbed: bool) -> jax.Array:
        weights = attention_weights(query, key, key_mask(key.shape[1], self.length))
        real = weights[:, :, : self.length, : self.length]
        self.sow("intermediates", "attention_weights", real)
        if perturbed:
            real = self.perturb("attention_weights", real)
        if self.length is None:
            return real
        return weights.at[:, :, : self.length, : self.length].set(real)


def is_observed(attention: nn.Module) -> bool:
    """Whether attention's weights are looked at."""
    # While initializing they would become a part of the network's variables.
    collections = ("intermediates", "perturbations")
    return not attention.is_initializing() and (
        any(attention.is_mutable_collection(name) for name in collections)
        or attention.has_variable("perturbations", "attention_weights")
    )


def shown_weights(module_variables: Any, name: str = ATTENTION_NAME) -> jax.Array:
    """(n, h, t, s): what attention left in "intermediates" or "perturbations".

    Args:
      module_variables: the part of the collection that belongs to the module around attention.
      name: that of attention.
    """
    weights = module_variables[name]["attention_weights"]
    (sown,) = weights if type(weights) is tuple else (weights,)
    return sown


class MAPHead(nn.Module):
    """Multihead attention pooling (arXiv:2106.04560, appendix). (n, t, d) -> (n, d).

    A learned probe attends to the tokens; a residual MLP block follows.
    """

    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = LAYER_NORM_EPSILON
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, _, d = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
        # One query is little work, and not what the kernels of self-attention are for.
        kernels = dataclasses.replace(self.kernels, attention=dot_product_attention)
        attention = MultiHeadAttention(
            self.num_heads, dtype=self.dtype, kernels=kernels, name=ATTENTION_NAME
        )
        y = attention(jnp.tile(probe.astype(x.dtype), (n, 1, 1)), x)
        z = layer_norm(self, "LayerNorm_0")(y)
        y = y + Mlp(**fields_for(Mlp, self), name="MlpBlock_0")(z)
        return y[:, 0]


class LayerScale(nn.Module):
    """Multiplies each channel with a learned number, at first `initial` (arXiv:2103.17239)."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(self.initial), (x.shape[-1],))
        return x * scale.astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): leaves a branch out for an image with probability
    `rate`, which may be traced, and divides by 1 - rate if not. (n, ...) -> (n, ...)."""

    @nn.compact
    def __call__(
        self, branch: jax.Array, rate: float | jax.Array, *, deterministic: bool
    ) -> jax.Array:
        if deterministic or (type(rate) is float and rate == 0):
            return branch
        keep = 1.0 - rate
        shape = (len(branch), *[1] * (branch.ndim - 1))
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        return jnp.where(kept, branch / jnp.asarray(keep, branch.dtype), jnp.zeros_like(branch))


def head(module: Any, x: jax.Array, name: str = "head") -> jax.Array:
    """The logits of `module.num_classes` by a dense layer of `module`, x itself for None; float32.

    It computes in float32: it costs little, and the loss wants all the digits.
    """
    x = x.astype(jnp.float32)
    if module.num_classes is None:
        return x
    return nn.Dense(
        module.num_classes,
        kernel_init=nn.initializers.zeros,
        bias_init=nn.initializers.constant(module.head_bias_init),
        name=name,
    )(x)


def check_images(images: jax.Array) -> None:
    """Raises UserError unless images are floats of (n, height, width, channels)."""
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


def check_rates(module: Any) -> None:
    """Raises UserError if a rate of dropout or stochastic depth is no probability below 1."""
    for name in module.weightless:
        rate = getattr(module, name)
        if name.endswith("_rate") and not 0 <= rate < 1:
            raise UserError(f"{name} is {rate}, expected a probability, at least 0 and less than 1")


def check_choice(module: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises UserError if a field is none of its choices."""
    if getattr(module, name) not in choices:
        raise UserError(
            f"unknown {name} {getattr(module, name)!r}, expected one of {', '.join(choices)}"
        )
