"""The Gaussian error linear unit (Hendrycks and Gimpel, arXiv:1606.08415), section 2, by tanh."""

import math

import jax
import jax.numpy as jnp

_CUBIC = 0.044715
_TWICE = 2 * math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of any shape, in the type of x.

    It is computed in float32, and backwards anew from x: on a CPU keeping anything else costs more
    (benchmarks/results/train.md; there are no figures of other devices).
    """
    return _forwards(x)[0]


def _forwards(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)). XLA computes whatever ends in a division once, and
    # not again in each place that reads it.
    exact = x.astype(jnp.float32)
    return (exact / (1 + _decay(exact))).astype(x.dtype), x


def _decay(x: jax.Array) -> jax.Array:
    return jnp.exp(-_TWICE * (x + _CUBIC * x * x * x))


def _backwards(kept: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA keeps the exponential from the way forwards.
    x = jax.lax.optimization_barrier(kept).astype(jnp.float32)
    share = 1 / (1 + _decay(x))
    slope = share + x * share * (1 - share) * _TWICE * (1 + 3 * _CUBIC * x * x)
    return ((grad * slope).astype(kept.dtype),)


gelu.defvjp(_forwards, _backwards)
