"""The dense layers of the blocks.

How products are written down decides how fast XLA computes them on a CPU:
benchmarks/results/train.md has the figures.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dense(nn.Module):
    """A dense layer over the last axis: (..., d) -> (..., features) of `dtype`.

    Its name is that of Flax's, from which the parameters of the checkpoints have theirs.

    Attributes:
      kernel_shape, bias_shape: in which the float32 parameters are kept, if it is not (d, features)
        and (features,).
    """

    features: int
    dtype: Any = jnp.float32
    bias_init: Any = nn.initializers.zeros
    kernel_shape: tuple[int, ...] | None = None
    bias_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d = x.shape[-1]

        def initial(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            kernel = nn.initializers.xavier_uniform()(key, (d, self.features), jnp.float32)
            return kernel.reshape(shape)

        kernel = self.param("kernel", initial, self.kernel_shape or (d, self.features))
        shape = self.bias_shape or (self.features,)
        bias = self.param("bias", self.bias_init, shape, jnp.float32)
        kernel, bias = kernel.reshape(d, self.features), bias.reshape(self.features)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Two axes are faster on a CPU than three. (There may be no rows.)
        rows = x.reshape(math.prod(x.shape[:-1]), d)
        narrower = d > self.features and jax.default_backend() == "cpu"
        y = (_narrowing if narrower else jnp.matmul)(rows, kernel) + bias
        return y.reshape(*x.shape[:-1], self.features)


@jax.custom_vjp
def _narrowing(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """(n, d) @ (d, f) for d > f: JAX's own derivative by the kernel is slower. No `jax.jvp`."""
    return rows @ kernel


def _forwards(rows: jax.Array, kernel: jax.Array) -> Any:
    return rows @ kernel, (rows, kernel)


def _backwards(kept: Any, grad: jax.Array) -> Any:
    rows, kernel = kept
    # Without the barrier XLA joins transposition and product, and has no fast library for both.
    return grad @ kernel.T, jax.lax.optimization_barrier(rows.T) @ grad


_narrowing.defvjp(_forwards, _backwards)
