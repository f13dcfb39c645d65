"""Text towers of LiT (Zhai et al., arXiv:2111.07991), as pure Flax Linen modules.

The names of the sub-modules are those of the official checkpoints below `txt/`. Shapes: n texts, t
tokens, d = hidden_size.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models.kernels import attention_weights, gelu, weighted_sum
from vit_jax.models.vit import Encoder

# Those of Devlin et al. (arXiv:1810.04805), with which BERT's published weights were trained.
_BERT_EPSILON = 1e-12
_BERT_INIT = nn.initializers.truncated_normal(stddev=0.02)


class TextTransformer(nn.Module):
    """A Vision Transformer's encoder over words; the last token stands for the text.

    Attributes:
      num_classes: width of the projection `head`; None leaves it out.
      vocab_size, max_len: number of token ids, and tokens in every text.
      hidden_size, num_layers, num_heads, mlp_dim: as in `VisionTransformer`.
      dtype: what is computed in, float32 or bfloat16; parameters stay float32.
    """

    num_classes: int | None
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    vocab_size: int = 16_000
    max_len: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Embeds texts.

        Args:
          tokens: int (n, max_len). The last one must end the text: padding is no different.

        Returns:
          float32 (n, num_classes), not normalised, and {"pre_logits": (n, d)}, the head's input.

        Raises UserError for another shape or type.
        """
        _check_tokens(tokens)
        t, d = self.max_len, self.hidden_size
        if tokens.shape[1] != t:
            raise UserError(
                f"texts have {tokens.shape[1]} tokens, expected {t}: this tower knows no other "
                "length, so pad or cut them"
            )
        x = nn.Embed(self.vocab_size, d, dtype=self.dtype, name="Embed_0")(tokens)
        positions = self.param("pos_embedding", nn.initializers.normal(d**-0.5), (1, t, d))
        x, _ = Encoder(
            self.num_layers, self.num_heads, self.mlp_dim, dtype=self.dtype, name="Encoder_0"
        )(x, deterministic=True, positions=positions)
        return _project(x[:, -1], self.num_classes)


class BertModel(nn.Module):
    """BERT (arXiv:1810.04805) without its pooler; the first token stands for the text.

    Attributes:
      num_classes: width of the projection `head`; None leaves it out.
      hidden_size, num_layers, num_heads, mlp_dim: depth, width, heads and MLP width.
      vocab_size: number of token ids. max_len: the longest text in tokens.
      dtype: what is computed in, float32 or bfloat16; parameters stay float32.
    """

    num_classes: int | None
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    vocab_size: int = 30_522
    max_len: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Embeds texts.

        Args:
          tokens: int (n, t), t up to `max_len`: [CLS] first; 0 is padding and attended by nobody.

        Returns:
          float32 (n, num_classes), not normalised, and {"pre_logits": (n, d)}, the head's input.

        Raises UserError for another shape or type.
        """
        _check_tokens(tokens)
        if tokens.shape[1] > self.max_len:
            raise UserError(
                f"texts have {tokens.shape[1]} tokens, expected at most {self.max_len}: cut them"
            )
        x = BertEncoder(
            self.hidden_size,
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.vocab_size,
            self.max_len,
            self.dtype,
            name="BertEncoder_0",
        )(tokens)
        return _project(x[:, 0], self.num_classes)


class BertEncoder(nn.Module):
    """Embeddings and blocks of BERT. Tokens (n, t) -> (n, t, d); the fields are `BertModel`'s."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    vocab_size: int
    max_len: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = _Embedder(self.vocab_size, self.max_len, self.hidden_size, self.dtype, name="embedder")(
            tokens
        )
        x = nn.LayerNorm(_BERT_EPSILON, dtype=self.dtype, name="layer_norm")(x)
        return _Blocks(
            self.num_layers, self.num_heads, self.mlp_dim, self.dtype, name="encoder_block"
        )(x, tokens > 0)


class _Embedder(nn.Module):
    """The sum of a token's, a position's and a segment's embedding. (n, t) -> (n, t, d)."""

    vocab_size: int
    max_len: int
    hidden_size: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        def embed(kind, rows, ids):
            table = nn.Embed(
                rows,
                self.hidden_size,
                embedding_init=_BERT_INIT,
                dtype=self.dtype,
                name=f"embedders_{kind}_ids",
            )
            return table(ids)

        positions = embed("position", self.max_len, jnp.arange(tokens.shape[1]))
        # BERT tells a first and a second sentence apart; here there is only a first one.
        segments = embed("segment", 2, jnp.zeros_like(tokens))
        return positions + segments + embed("token", self.vocab_size, tokens)


class _Blocks(nn.Module):
    """`encoder_block/layer_sequence` of the checkpoints: block after block."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return _LayerSequence(
            self.num_layers, self.num_heads, self.mlp_dim, self.dtype, name="layer_sequence"
        )(x, mask)


class _LayerSequence(nn.Module):
    """The blocks of BERT. (n, t, d) and mask (n, t) -> (n, t, d)."""

    num_layers: int
    num_heads: int
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.num_layers):
            x = _BertBlock(self.num_heads, self.mlp_dim, self.dtype, name=f"layers_{i}")(x, mask)
        return x


class _BertBlock(nn.Module):
    """Attention and MLP, each followed by a residual sum and a LayerNorm."""

    num_heads: int
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = _AttentionBlock(self.num_heads, self.dtype, name="attention_block")(x, mask)
        return _MlpBlock(self.mlp_dim, self.dtype, name="mlp_block")(x)


class _AttentionBlock(nn.Module):
    """LayerNorm(x + Dense(Attention(x)))."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        y = _Attention(self.num_heads, self.dtype, name="attention_layer")(x, mask)
        y = _dense(x.shape[-1], self.dtype, "dense_layer")(y)
        return nn.LayerNorm(_BERT_EPSILON, dtype=self.dtype, name="layer_norm")(x + y)


class _Attention(nn.Module):
    """Self-attention without its output projection; the heads' outputs stand side by side.

    (n, t, d) and mask (n, t), False for tokens that nobody attends to -> (n, t, d).
    """

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        n, t, d = x.shape
        query, key, value = (
            _dense(d, self.dtype, name)(x).reshape(n, t, self.num_heads, d // self.num_heads)
            for name in ("query", "key", "value")
        )
        weights = attention_weights(query, key, mask[:, None, None, :])
        return weighted_sum(weights, value).reshape(n, t, d)


class _MlpBlock(nn.Module):
    """LayerNorm(x + Dense(GELU(Dense(x))))."""

    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _Mlp(self.mlp_dim, self.dtype, name="mlp")(x)
        y = _dense(x.shape[-1], self.dtype, "dense_layer")(y)
        return nn.LayerNorm(_BERT_EPSILON, dtype=self.dtype, name="layer_norm")(x + y)


class _Mlp(nn.Module):
    """GELU(Dense(x)), in the tanh form, with which Google's BERT was trained too."""

    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return gelu(_dense(self.mlp_dim, self.dtype, "dense_layer")(x))


def _dense(features: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=_BERT_INIT, name=name)


def _project(x: jax.Array, num_classes: int | None) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The `head` of the module that calls, in float32 as that of `VisionTransformer`."""
    pre_logits = x.astype(jnp.float32)
    head = nn.Dense(num_classes, name="head") if num_classes is not None else lambda x: x
    return head(pre_logits), {"pre_logits": pre_logits}


def _check_tokens(tokens: jax.Array) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(
            f"tokens have shape {tokens.shape} and type {tokens.dtype}, expected integers of "
            "(n, tokens): make them with a tokenizer of vit_jax.tokenizers"
        )
