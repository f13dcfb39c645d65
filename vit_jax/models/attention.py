"""Multi-head attention (Vaswani et al., arXiv:1706.03762) of every network here.

Shapes: n pictures or texts, t tokens that ask, s tokens that are asked, h heads, d a token's width.
How products are written down decides how fast XLA computes them on a CPU:
benchmarks/results/train.md has the figures; there are none of other devices.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.dense import Dense

# By what it is computed: products and a softmax that XLA compiles, or cuDNN's one kernel.
ATTENTION = ("xla", "cudnn")

# Its name in the official checkpoints.
ATTENTION_NAME = "MultiHeadDotProductAttention_0"


def attention_weights(query: jax.Array, key: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Whom each token attends to: softmax(Q K^T / sqrt(width of a head)), equation 1.

    Args:
      query, key: (n, h, t, d / h) and (n, h, s, d / h).
      mask: bool, broadcast to (n, h, t, s); where it is False nobody attends.

    Returns:
      (n, h, t, s) of the queries' type, computed in float32; each row sums to 1.
    """
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    scores = (query @ key.swapaxes(2, 3)).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores).astype(query.dtype)


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention_weights(query, key) @ value`, and its derivative, in less time.

    On a CPU, XLA computes a batch of small products on one core, and independent ones side by side:
    there the pictures are taken in slices. It has no forward-mode derivative (`jax.jvp`).

    Args:
      query, key, value: (n, h, t, d / h), (n, h, s, d / h), (n, h, s, d / h).

    Returns:
      (n, h, t, d / h).
    """
    slices = _slices(query.shape[0]) if jax.default_backend() == "cpu" else 1
    if slices == 1:
        return _attend(query, key, value)

    def cut(x: jax.Array) -> tuple[jax.Array, ...]:
        # Of the pictures that lie on a device, so that none has to be moved: every so many.
        return jnp.unstack(x.reshape(-1, slices, *x.shape[1:]), axis=1)

    parts = [_attend(*part) for part in zip(cut(query), cut(key), cut(value), strict=True)]
    return jnp.stack(parts, axis=1).reshape(query.shape)


def _slices(pictures: int) -> int:
    on_each, rest = divmod(pictures, jax.device_count())
    if rest or not on_each:
        return 1
    # Of two pictures at least: XLA lays out a single one otherwise, which takes longer. (Their
    # number may be a symbol, which can only be asked whether it is equal.)
    return max((i for i in range(1, 5) if on_each % i == 0 and on_each != i), default=1)


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _attend_forwards(query, key, value)[0]


def _attend_forwards(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    scores = (query @ key.swapaxes(2, 3)).astype(jnp.float32)
    raised = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(value.dtype)
    # Of the rounded numbers, so that weights sum to 1. Dividing (t, d / h) is less than (t, s).
    inverse = 1 / raised.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    y = ((raised @ value) * inverse).astype(value.dtype)
    return y, (query, key, value, raised, inverse)


def _attend_backwards(kept: Any, grad: jax.Array) -> Any:
    query, key, value, raised, inverse = kept
    weights = raised * inverse
    by_weights = grad @ value.swapaxes(2, 3)
    # The softmax's derivative, in float32: what all scores have in common has to cancel.
    mean = (weights * by_weights).sum(axis=-1, keepdims=True)
    scores = (weights * (by_weights - mean)).astype(query.dtype)
    scale = jnp.sqrt(query.shape[-1]).astype(query.dtype)
    return (
        (scores @ key) / scale,
        scores.swapaxes(2, 3) @ query,
        weights.astype(grad.dtype).swapaxes(2, 3) @ grad,
    )


_attend.defvjp(_attend_forwards, _attend_backwards)


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attention_weights(query, key) @ value` by cuDNN: (n, h, t, d / h) of bfloat16 or float16."""
    rows = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.nn.dot_product_attention(*rows, implementation="cudnn").swapaxes(1, 2)


def split_heads(tokens: jax.Array, num_heads: int) -> jax.Array:
    """(n, t, d) -> (n, h, t, d / h)."""
    n, t, d = tokens.shape
    return tokens.reshape(n, t, num_heads, d // num_heads).swapaxes(1, 2)


def join_heads(heads: jax.Array) -> jax.Array:
    """(n, h, t, d / h) -> (n, t, d)."""
    n, h, t, width = heads.shape
    return heads.swapaxes(1, 2).reshape(n, t, h * width)


class MultiHeadAttention(nn.Module):
    """Attention of tokens (n, t, d) to tokens (n, s, d). Returns (n, t, d).

    With the collection "intermediates" mutable it sows there "attention_weights" (n, h, t, s),
    before dropout. Zeros of that shape in the collection "perturbations" are added to them, so that
    their gradient can be taken (not with dropout); `apply(..., mutable=["perturbations"])` makes
    such zeros. The answers are the same with and without anybody looking.

    Attributes:
      num_heads: h; it divides d.
      dropout_rate: of the weights, each drawn on its own; needs an rng named "dropout".
      dtype: what is computed in. Parameters and softmax are float32.
      implementation: one of ATTENTION. "cudnn" is for NVIDIA GPUs, dtype bfloat16 and no dropout;
        weights that are looked at are computed beside it.
    """

    num_heads: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, asked: jax.Array, *, deterministic: bool = True) -> jax.Array:
        d = x.shape[-1]
        heads = (self.num_heads, d // self.num_heads)

        def project(name: str, tokens: jax.Array) -> jax.Array:
            dense = Dense(d, self.dtype, kernel_shape=(d, *heads), bias_shape=heads, name=name)
            return split_heads(dense(tokens), self.num_heads)

        query, key, value = project("query", x), project("key", asked), project("value", asked)
        if self.dropout_rate > 0 and not deterministic:
            weights = attention_weights(query, key)
            self.sow("intermediates", "attention_weights", weights)
            y = nn.Dropout(self.dropout_rate, deterministic=False)(weights) @ value
        else:
            # Initializing, which may be done on a CPU, needs no speed.
            cudnn = self.implementation == "cudnn" and not self.is_initializing()
            y = (cudnn_attention if cudnn else attend)(query, key, value)
            if self._watched():
                weights = attention_weights(query, key)
                self.sow("intermediates", "attention_weights", weights)
                y += self.perturb("attention_weights", jnp.zeros_like(weights)) @ value
        return Dense(d, self.dtype, kernel_shape=(*heads, d), name="out")(join_heads(y))

    def _watched(self) -> bool:
        # While initializing they would become a part of the network's variables.
        collections = ("intermediates", "perturbations")
        return not self.is_initializing() and (
            any(self.is_mutable_collection(name) for name in collections)
            or self.has_variable("perturbations", "attention_weights")
        )
