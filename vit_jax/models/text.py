"""Text towers of LiT (Zhai et al., arXiv:2111.07991), as pure Flax Linen modules.

The names of the sub-modules are those of the official checkpoints below `txt/`. Shapes: n texts, t
tokens, d = hidden_size.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vit_jax.errors import UserError
from vit_jax.models import shapes as reading
from vit_jax.models.family import Shapes
from vit_jax.models.kernels import attention_weights, gelu, weighted_sum
from vit_jax.models.layers import fields_for
from vit_jax.models.vit import Encoder

# Those of Devlin et al. (arXiv:1810.04805), with which BERT's published weights were trained.
_BERT_EPSILON = 1e-12
_BERT_INIT = nn.initializers.truncated_normal(stddev=0.02)


class TextTower(nn.Module):
    """What both towers have in common.

    Attributes:
      num_classes: width of the projection `head`; None leaves it out.
      hidden_size, num_layers, num_heads, mlp_dim: as in `VisionTransformer`.
      vocab_size: number of token ids. max_len: the longest text in tokens.
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


class TextTransformer(TextTower):
    """A Vision Transformer's encoder over words; the last token stands for the text.

    All texts have `max_len` tokens.
    """

    blocks: ClassVar = ("encoderblock",)

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
        encoder = Encoder(**fields_for(Encoder, self), name="Encoder_0")
        x, _ = encoder(x, deterministic=True, positions=positions)
        return _project(x[:, -1], self.num_classes)

    @classmethod
    def fields_from_shapes(cls, shapes: Shapes, where: str) -> dict[str, Any]:
        """The fields but for the head. Raises UserError if the arrays are not there."""
        blocks = reading.Blocks(shapes, "Encoder_0/encoderblock_")
        heads = blocks.majority("query/kernel", 3, 1)
        mlp_dim = blocks.majority("MlpBlock_0/Dense_0/kernel", 2, 1)
        required = {"Embed_0/embedding": 2, "pos_embedding": 3}
        return _fields(shapes, required, blocks, heads, mlp_dim, where)


class BertModel(TextTower):
    """BERT (arXiv:1810.04805) without its pooler; the first token stands for the text."""

    vocab_size: int = 30_522
    max_len: int = 512

    blocks: ClassVar = ("layers",)

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

        def embed(kind: str, rows: int, ids: jax.Array) -> jax.Array:
            size, name = self.hidden_size, f"embedders_{kind}_ids"
            table = nn.Embed(rows, size, embedding_init=_BERT_INIT, dtype=self.dtype, name=name)
            return table(ids)

        def embedder() -> jax.Array:
            positions = embed("position", self.max_len, jnp.arange(tokens.shape[1]))
            # BERT tells a first and a second sentence apart; here there is only a first one.
            segments = embed("segment", 2, jnp.zeros_like(tokens))
            return positions + segments + embed("token", self.vocab_size, tokens)

        def blocks(x: jax.Array) -> jax.Array:
            for i in range(self.num_layers):
                block = BertBlock(self.num_heads, self.mlp_dim, self.dtype, name=f"layers_{i}")
                x = block(x, tokens > 0)
            return x

        def sequence(x: jax.Array) -> jax.Array:
            return _Level(blocks, name="layer_sequence")(x)

        def encoder() -> jax.Array:
            x = _Level(embedder, name="embedder")()
            x = nn.LayerNorm(_BERT_EPSILON, dtype=self.dtype, name="layer_norm")(x)
            return _Level(sequence, name="encoder_block")(x)

        x = _Level(encoder, name="BertEncoder_0")()
        return _project(x[:, 0], self.num_classes)

    @classmethod
    def fields_from_shapes(cls, shapes: Shapes, where: str) -> dict[str, Any]:
        """The fields but for the head. Raises UserError if the arrays are not there."""
        encoder = "BertEncoder_0"
        blocks = reading.Blocks(shapes, f"{encoder}/encoder_block/layer_sequence/layers_")
        mlp_dim = blocks.majority("mlp/dense_layer/kernel", 2, 1)
        # BERT's heads leave no trace in its arrays, but all its published sizes are 64 wide.
        heads = blocks.majority("query/kernel", 2, 1) // 64
        tables = (
            f"{encoder}/embedder/embedders_{kind}_ids/embedding" for kind in ("token", "position")
        )
        return _fields(shapes, dict.fromkeys(tables, 2), blocks, heads, mlp_dim, where)


class _Level(nn.Module):
    """A level of the tree of weights: what `function` makes lies below its name."""

    function: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        return self.function(*inputs)


class BertBlock(nn.Module):
    """Attention and MLP, each followed by a residual sum and a LayerNorm.

    (n, t, d) and mask (n, t), False for tokens that nobody attends to -> (n, t, d).
    """

    num_heads: int
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        n, t, d = x.shape

        def dense(features: int, name: str = "dense_layer") -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=_BERT_INIT, name=name)

        def attention(x: jax.Array) -> jax.Array:  # The heads' outputs stand side by side.
            query, key, value = (
                dense(d, name)(x).reshape(n, t, self.num_heads, d // self.num_heads)
                for name in ("query", "key", "value")
            )
            weights = attention_weights(query, key, mask[:, None, None, :])
            return weighted_sum(weights, value).reshape(n, t, d)

        def mlp(x: jax.Array) -> jax.Array:  # In the tanh form, as Google's BERT.
            return gelu(dense(self.mlp_dim)(x))

        def residual(name: str, function: Callable) -> Callable[[jax.Array], jax.Array]:
            def apply(x: jax.Array) -> jax.Array:
                y = x + dense(d)(_Level(function, name=name)(x))
                return nn.LayerNorm(_BERT_EPSILON, dtype=self.dtype, name="layer_norm")(y)

            return apply

        x = _Level(residual("attention_layer", attention), name="attention_block")(x)
        return _Level(residual("mlp", mlp), name="mlp_block")(x)


def _fields(
    shapes: Shapes,
    required: Mapping[str, int],
    blocks: reading.Blocks,
    heads: int,
    mlp_dim: int,
    where: str,
) -> dict[str, Any]:
    """Fields of either tower. `required`: the tables of words and of positions, and their ranks."""
    reading.check_required(shapes, required, blocks, (heads, mlp_dim), where)
    words, positions = (shapes[name] for name in required)
    reading.check_heads(heads, words[1], where)
    return {
        "hidden_size": words[1],
        "num_layers": blocks.depth,
        "num_heads": heads,
        "mlp_dim": mlp_dim,
        "vocab_size": words[0],
        "max_len": positions[-2],
    }


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
