"""Text towers compute their formulas, in float64 NumPy here, and BERT ignores padding."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.models.text import BertModel, TextTransformer

SIZES = dict(hidden_size=24, num_layers=2, num_heads=3, mlp_dim=40)
BERT = BertModel(num_classes=8, vocab_size=50, max_len=20, **SIZES)
PLAIN = TextTransformer(num_classes=8, vocab_size=50, max_len=6, **SIZES)
TOKENS = np.array([[2, 7, 49, 3, 0, 0], [2, 9, 11, 12, 13, 14], [2, 0, 0, 0, 0, 0]], np.int32)


def random_params(model):
    """As `model.init`, but large and without zeros: every parameter leaves its mark."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    flat = flax.traverse_util.flatten_dict(shapes, sep="/")
    return {
        key: rng.normal(key.endswith("scale"), 0.3, leaf.shape).astype(np.float32)
        for key, leaf in flat.items()
    }


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def apply(model, params, tokens):
    tree = flax.traverse_util.unflatten_dict(params, sep="/")
    with jax.default_matmul_precision("highest"):
        embedding, features = compiled(model)({"params": tree}, tokens)
    return np.asarray(embedding), np.asarray(features["pre_logits"])


class Formula:
    """The pieces of a transformer in float64, on the parameters below `prefix`."""

    def __init__(self, params, prefix, epsilon):
        self.params, self.prefix, self.epsilon = params, prefix, epsilon

    def __getitem__(self, name):
        return self.params[f"{self.prefix}/{name}"].astype(np.float64)

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)
        return centred / deviation * self[f"{name}/scale"] + self[f"{name}/bias"]

    def dense(self, name, x):
        kernel = self[f"{name}/kernel"].reshape(x.shape[-1], -1)
        return x @ kernel + self[f"{name}/bias"].reshape(-1)

    def attention(self, name, x, mask):
        n, t, d = x.shape
        query, key, value = (
            self.dense(f"{name}/{part}", x).reshape(n, t, 3, d // 3).transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        weights = query @ key.transpose(0, 1, 3, 2) / np.sqrt(d // 3)
        weights = np.exp(np.where(mask[:, None, None, :], weights, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        return (weights @ value).transpose(0, 2, 1, 3).reshape(n, t, d)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def bert_formula(params, tokens):
    whole = Formula(params, "BertEncoder_0", 1e-12)
    table = {k: whole[f"embedder/embedders_{k}_ids/embedding"] for k in ("token", "position")}
    segment = whole["embedder/embedders_segment_ids/embedding"][0]
    x = table["token"][tokens] + table["position"][: tokens.shape[1]] + segment
    x = whole.norm("layer_norm", x)
    for i in range(SIZES["num_layers"]):
        block = Formula(
            params, f"BertEncoder_0/encoder_block/layer_sequence/layers_{i}", whole.epsilon
        )
        y = block.attention("attention_block/attention_layer", x, tokens != 0)
        y = block.dense("attention_block/dense_layer", y)
        x = block.norm("attention_block/layer_norm", x + y)
        y = gelu(block.dense("mlp_block/mlp/dense_layer", x))
        x = block.norm("mlp_block/layer_norm", x + block.dense("mlp_block/dense_layer", y))
    return x[:, 0]


def transformer_formula(params, tokens):
    x = params["Embed_0/embedding"].astype(np.float64)[tokens] + params["pos_embedding"]
    for i in range(SIZES["num_layers"]):
        block = Formula(params, f"Encoder_0/encoderblock_{i}", 1e-6)
        attention = "MultiHeadDotProductAttention_0"
        y = block.attention(attention, block.norm("LayerNorm_0", x), np.ones_like(tokens, bool))
        x = x + block.dense(f"{attention}/out", y)
        y = gelu(block.dense("MlpBlock_0/Dense_0", block.norm("LayerNorm_1", x)))
        x = x + block.dense("MlpBlock_0/Dense_1", y)
    return Formula(params, "Encoder_0", 1e-6).norm("encoder_norm", x)[:, -1]


@pytest.mark.parametrize(
    ("model", "formula"),
    [(BERT, bert_formula), (PLAIN, transformer_formula)],
    ids=["bert", "plain"],
)
def test_a_tower_computes_its_formula(model, formula):
    params = random_params(model)
    embedding, pre_logits = apply(model, params, TOKENS)
    expected = formula(params, TOKENS)
    np.testing.assert_allclose(pre_logits, expected, atol=1e-5)
    head = expected @ params["head/kernel"] + params["head/bias"]
    np.testing.assert_allclose(embedding, head, atol=2e-5)


def test_layer_norms_of_bert_do_not_drown_small_embeddings():
    params = random_params(BERT)
    small = {k: v * np.float32(1e-3) if "embedders" in k else v for k, v in params.items()}
    _, pre_logits = apply(BERT, small, TOKENS)
    np.testing.assert_allclose(pre_logits, bert_formula(small, TOKENS), atol=1e-4)


def test_bert_does_not_see_padding():
    params = random_params(BERT)
    short, _ = apply(BERT, params, TOKENS[:1, :4])
    padded, _ = apply(BERT, params, TOKENS[:1])
    np.testing.assert_allclose(short, padded, atol=1e-5)


@pytest.mark.parametrize("model", [BERT, PLAIN], ids=["bert", "plain"])
def test_the_order_of_words_matters(model):
    params = random_params(model)
    swapped = TOKENS[1:2, [0, 2, 1, 3, 4, 5]]
    assert (
        np.abs(apply(model, params, TOKENS[1:2])[0] - apply(model, params, swapped)[0]).max() > 0.1
    )


@pytest.mark.parametrize("model", [BERT, PLAIN], ids=["bert", "plain"])
def test_without_a_head_the_embedding_is_its_input(model):
    params = {k: v for k, v in random_params(model).items() if not k.startswith("head/")}
    embedding, pre_logits = apply(model.copy(num_classes=None), params, TOKENS)
    assert embedding.shape == (3, SIZES["hidden_size"])
    np.testing.assert_array_equal(embedding, pre_logits)


@pytest.mark.parametrize("model", [BERT, PLAIN], ids=["bert", "plain"])
def test_bfloat16_computes_nearly_the_same_and_gives_float32(model):
    params = random_params(model)
    exact, _ = apply(model, params, TOKENS)
    rounded, _ = apply(model.copy(dtype=jnp.bfloat16), params, TOKENS)
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert 0 < error.max() < 0.1


@pytest.mark.parametrize("model", [BERT, PLAIN], ids=["bert", "plain"])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 21), np.int32), "have 21 tokens, expected (at most 20|6)"),
        (np.zeros(6, np.int32), r"shape \(6,\) and type int32, expected integers of \(n, tokens\)"),
        (np.zeros((1, 6), np.float32), "type float32, expected integers"),
    ],
    ids=["too long", "one text", "floats"],
)
def test_other_tokens_are_refused_in_one_line(model, tokens, message):
    with pytest.raises(UserError, match=message):
        apply(model, random_params(model), tokens)


def test_the_plain_tower_takes_texts_of_one_length_only():
    with pytest.raises(UserError, match="have 5 tokens, expected 6"):
        apply(PLAIN, random_params(PLAIN), TOKENS[:, :5])
