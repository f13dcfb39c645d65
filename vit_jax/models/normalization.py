"""Layer normalisation (Ba et al., arXiv:1607.06450) with its derivative written down.

What JAX derives by itself keeps more and computes more: benchmarks/results/train.md.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32.

    Args:
      x: (..., d). scale, bias: float32 (d,).
      dtype: of what is returned.
    """
    return _forwards(x, scale, bias, epsilon, dtype)[0]


def _forwards(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any) -> Any:
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    # One pass over x. Rounding may give less than zero.
    variance = jnp.maximum(jnp.square(y).mean(axis=-1, keepdims=True) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return ((y - mean) * (inverse * scale) + bias).astype(dtype), (x, scale, mean, inverse)


def _backwards(epsilon: float, dtype: Any, kept: Any, grad: jax.Array) -> Any:
    x, scale, mean, inverse = kept
    grad = grad.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    product = grad * normal
    if jax.default_backend() == "cpu":  # Or XLA would compute it anew, and slowly, in each sum.
        product = jax.lax.optimization_barrier(product)
    # What moves the mean, or stretches, has no effect on what is normalised.
    moves, stretches = _mean(grad, scale), _mean(product, scale)
    change = inverse * (grad * scale - moves - normal * stretches)
    rows = tuple(range(grad.ndim - 1))
    return change.astype(x.dtype), product.sum(rows), grad.sum(rows)


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean of x * weights over the last axis: (..., d) and (d,) give (..., 1)."""
    # On CPUs a product of matrices is faster.
    if jax.default_backend() == "cpu":
        return jnp.matmul(x, weights, precision="highest")[..., None] / x.shape[-1]
    return (x * weights).mean(axis=-1, keepdims=True)


layer_norm.defvjp(_forwards, _backwards)


class LayerNorm(nn.Module):
    """`layer_norm` with learned scale and bias. (..., d) -> (..., d) of `dtype`."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon, self.dtype)
