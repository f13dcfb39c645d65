"""The Gaussian error linear unit (Hendrycks and Gimpel, arXiv:1606.08415), section 2, by tanh."""

import math

import jax
import jax.numpy as jnp

_CUBIC = 0.044715
_TWICE = 2 * math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of any shape, in the type of x.

    Backwards it is computed anew from x: keeping anything else costs more. It has no forward-mode
    derivative (`jax.jvp`). benchmarks/results/train.md has figures.
    """
    # (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)). XLA computes whatever ends in a division once, and
    # not again in each place that reads it.
    return x / (1 + _decay(x))


def _decay(x: jax.Array) -> jax.Array:
    return jnp.exp(-_TWICE * (x + _CUBIC * x * x * x))


def _forwards(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _backwards(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    x = jax.lax.optimization_barrier(x)  # Or XLA keeps the exponential from the way forwards.
    share = 1 / (1 + _decay(x))
    slope = _TWICE * (1 + 3 * _CUBIC * x * x)
    return (grad * (share + x * share * (1 - share) * slope),)


gelu.defvjp(_forwards, _backwards)
