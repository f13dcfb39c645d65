"""Multi-head attention (Vaswani et al., arXiv:1706.03762) of every Vision Transformer here.

Shapes: n images or texts, t query tokens, s key and value tokens, h heads, d a token's width.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.models.kernels import Kernels, attention_weights, key_mask, weighted_sum

# Its name in the official checkpoints.
ATTENTION_NAME = "MultiHeadDotProductAttention_0"


class MultiHeadAttention(nn.Module):
    """Attention of tokens (n, t, d) to tokens (n, s, d). Returns (n, t, d).

    The parameters are those of `nn.MultiHeadDotProductAttention`, of which the official ones are.
    With the collection "intermediates" mutable it sows there "attention_weights" (n, h, t, s),
    before dropout. Zeros of that shape in the collection "perturbations" are added to them, so that
    their gradient can be taken (not with dropout); `apply(..., mutable=["perturbations"])` makes
    such zeros. Where weights are looked at or dropped, the stock form computes.

    Attributes:
      num_heads: h; it divides d.
      dropout_rate: of the weights, each drawn on its own; needs an rng named "dropout".
      dtype: what is computed in. Parameters and softmax are float32.
      kernels: the forms in which it is computed.
      length: if given, only so many of the tokens are real and attended to, and only their weights
        are sown and perturbed; the others are padding.
    """

    num_heads: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()
    length: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs_kv: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        d = x.shape[-1]

        def dense(name: str, features: Any, axis: Any = -1) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                features,
                axis=axis,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                dot_general=self.kernels.dot_general,
                name=name,
            )

        heads = (self.num_heads, d // self.num_heads)
        query = dense("query", heads)(x)
        key, value = dense("key", heads)(inputs_kv), dense("value", heads)(inputs_kv)
        drops = self.dropout_rate > 0 and not deterministic and not self.is_initializing()
        if drops or self._is_observed():
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

    def _is_observed(self) -> bool:
        # While initializing they would become a part of the network's variables.
        collections = ("intermediates", "perturbations")
        return not self.is_initializing() and (
            any(self.is_mutable_collection(name) for name in collections)
            or self.has_variable("perturbations", "attention_weights")
        )
