"""Multi-head attention (Vaswani et al., arXiv:1706.03762) of every network here.

Shapes: n pictures or texts, t tokens that ask, s tokens that are asked, h heads, d a token's width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    scores = jnp.einsum("nhtd,nhsd->nhts", query, key).astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores).astype(query.dtype)


class MultiHeadAttention(nn.Module):
    """Attention of tokens (n, t, d) to tokens (n, s, d). Returns (n, t, d).

    With the collection "intermediates" mutable it sows there "attention_weights" (n, h, t, s),
    before dropout. Zeros of that shape in the collection "perturbations" are added to them, so that
    their gradient can be taken; `apply(..., mutable=["perturbations"])` makes such zeros.

    Attributes:
      num_heads: h; it divides d.
      dropout_rate: of the weights, each drawn on its own; needs an rng named "dropout".
      dtype: what is computed in. Parameters and softmax are float32.
    """

    num_heads: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, asked: jax.Array, *, deterministic: bool = True) -> jax.Array:
        d = x.shape[-1]

        def dense(name: str, features: Any, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )

        def heads(name: str, tokens: jax.Array) -> jax.Array:
            n, t, _ = tokens.shape
            split = dense(name, (self.num_heads, d // self.num_heads))(tokens.reshape(n * t, -1))
            return split.reshape(n, t, *split.shape[1:]).swapaxes(1, 2)  # (n, h, t, d / h)

        query, key, value = heads("query", x), heads("key", asked), heads("value", asked)
        weights = attention_weights(query, key)
        self.sow("intermediates", "attention_weights", weights)
        if not self.is_initializing():  # They would be a part of the network's variables.
            weights = self.perturb("attention_weights", weights)
        weights = nn.Dropout(self.dropout_rate, deterministic=deterministic)(weights)
        y = jnp.einsum("nhts,nhsd->nthd", weights, value)
        return dense("out", d, (-2, -1))(y.reshape(-1, *y.shape[2:])).reshape(x.shape)
