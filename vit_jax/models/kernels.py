"""Operations whose fastest form depends on the device, and the choice among the forms.

The models are stock Flax: a `Kernels()` of defaults, for which every transform of JAX works and
whose program, lowered for any platform, is that platform's. `choose_kernels` says what is faster on
the devices at hand; a run and `Pretrained` set it as a field of the model. The parameters are the
same for all forms, and the results but for rounding.

Shapes: n images or texts, t query tokens, s key and value tokens, h heads, c channels of a head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# How attention may be computed: products and a softmax that XLA compiles, or cuDNN's one kernel.
ATTENTION = ("xla", "cudnn")

# cuDNN's kernel was measured to be faster with 197 tokens (docs/machines.md); with few it has
# little to save, and has not been measured.
CUDNN_MIN_TOKENS = 128
# How much it may differ from the stock form before it is taken to be wrong, as a share of the
# largest number: some roundings of bfloat16, of 2**-9 each.
TRIAL_TOLERANCE = 0.05
# Its derivative takes even numbers of tokens only; 200 were as fast as 198 would be, 208 slower.
CUDNN_TOKEN_MULTIPLE = 8


# softmax(Q K^T / sqrt(c) + bias) V for each head: query (n, t, h, c), key and value (n, s, h, c); a
# number or None, `length`: only so many keys are attended to, the others are padding; and, but for
# cuDNN, a float32 bias or None, broadcast to (n, h, t, s). With a bias there may be several axes in
# place of n. It gives (n, t, h, c) in the inputs' dtype, finite in every row.
Attention = Callable[..., jax.Array]


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """softmax(Q K^T / sqrt(c) + bias), equation 1 of arXiv:1706.03762; the softmax is in float32.

    (..., t, h, c) and (..., s, h, c) give (..., h, t, s), whose rows sum to 1. `mask`: bool,
    broadcast to that, False for the keys that a query can't attend to.
    """
    weights = nn.dot_product_attention_weights(
        query, key, bias=bias, mask=mask, force_fp32_for_softmax=True
    )
    return weights.astype(query.dtype)


def weighted_sum(weights: jax.Array, value: jax.Array) -> jax.Array:
    """The values by their weights: (..., h, t, s) and (..., s, h, c) give (..., t, h, c)."""
    return jnp.einsum("...hts,...shc->...thc", weights, value)


def key_mask(keys: int, length: int | None) -> jax.Array | None:
    """bool (1, 1, 1, keys), True for the first `length` of them; None if none is padding."""
    return None if length is None else (jnp.arange(keys) < length)[None, None, None]


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    length: int | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """`Attention` in Flax's stock form."""
    mask = key_mask(key.shape[1], length)
    return weighted_sum(attention_weights(query, key, mask, bias), value)


def gelu(x: jax.Array) -> jax.Array:
    """Flax's stock form, in float32: in bfloat16 its derivative would be wrong by up to 0.03."""
    return nn.gelu(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The forms in which a model computes; the defaults are stock Flax and JAX.

    Attributes:
      attention: of the blocks, without dropout and unobserved weights.
      token_multiple: to a multiple of which tokens are padded for `attention`.
      dot_general: of the dense layers of the blocks, as `jax.lax.dot_general`.
      conv_general_dilated: of the patch embedding, as `jax.lax.conv_general_dilated`.
      gelu: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (arXiv:1606.08415, section 2), of any
        shape, in the dtype of x.
      layer_norm: the module, with the fields `epsilon`, `dtype`, `scale_init` and `name` of
        `nn.LayerNorm`.
    """

    attention: Attention = dot_product_attention
    token_multiple: int = 1
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general
    conv_general_dilated: Callable[..., jax.Array] = jax.lax.conv_general_dilated
    gelu: Callable[[jax.Array], jax.Array] = gelu
    layer_norm: type[nn.Module] = nn.LayerNorm


def platform_of(devices: Sequence[jax.Device]) -> str:
    """What kind of devices they are: "cpu", "gpu", "tpu" or another."""
    platform = devices[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


class Choice(NamedTuple):
    """What `choose_kernels` has chosen.

    Attributes:
      attention: by what it is computed, one of ATTENTION; empty where there is no choice.
      why: for a person; may be empty.
    """

    kernels: Kernels
    attention: str = ""
    why: str = ""

    def __str__(self) -> str:
        reason = f" ({self.why})" if self.why else ""
        return f"attention by {self.attention}{reason}" if self.attention else ""


def choose_kernels(
    model: Any, image_size: tuple[int, int], devices: Sequence[jax.Device], attention: str = "auto"
) -> Choice:
    """The kernels that are fastest for a model on the devices that will run it.

    cuDNN's attention is tried on the devices of this process: whether it works depends on the GPU,
    the driver and the versions of cuDNN and JAX.

    Args:
      model: an `ImageModel` with stock kernels.
      image_size: (height, width) of its images.
      devices: of one kind; a batch is spread over them.
      attention: one of ATTENTION, or "auto".
    """
    platform = platform_of(devices)
    if platform == "cpu" and attention != "cudnn":
        return Choice(cpu_kernels(len(devices)))
    size = model.attention_size(image_size)
    if attention == "xla" or (attention == "auto" and (platform != "gpu" or size is None)):
        return Choice(Kernels())
    if reason := _why_not_cudnn(model, size, devices, attention):
        return Choice(Kernels(), "xla", reason)
    tokens = size[0]
    padding = -tokens % CUDNN_TOKEN_MULTIPLE
    return Choice(CUDNN, "cudnn", f"{tokens} tokens padded to {tokens + padding}" * bool(padding))


def _why_not_cudnn(
    model: Any, size: tuple[int, int, int] | None, devices: Sequence[jax.Device], attention: str
) -> str:
    """Empty if cuDNN's attention works and is to be taken."""
    if size is None:
        return "this network has no attention that cuDNN computes"
    if platform_of(devices) != "gpu":
        return f"JAX sees no GPU here, but {devices[0].device_kind}"
    if model.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16, and dtype is {jnp.dtype(model.dtype).name}"
    if model.attention_dropout_rate:
        return f"cuDNN has no dropout, and attention_dropout_rate is {model.attention_dropout_rate}"
    tokens, heads, channels = size
    if attention == "auto" and tokens < CUDNN_MIN_TOKENS:
        return f"{tokens} tokens, and cudnn is chosen from {CUDNN_MIN_TOKENS} on"
    local = [d for d in devices if d.process_index == jax.process_index()]
    padded = tokens + -tokens % CUDNN_TOKEN_MULTIPLE
    shape = (3, 2 * len(local), padded, heads, channels)
    qkv = np.random.default_rng(0).standard_normal(shape, np.float32).astype(model.dtype)
    place = NamedSharding(Mesh(np.array(local), ("batch",)), PartitionSpec(None, "batch"))
    length = tokens if padded > tokens else None
    try:
        qkv = jax.device_put(qkv, place)
        ours, theirs = (
            jax.device_get(jax.jit(functools.partial(_trial, form, length))(qkv))
            for form in (dot_product_attention, cudnn_attention)
        )
    except Exception as e:  # Of many kinds, by version, driver and GPU.
        return f"cuDNN says: {(str(e) or type(e).__name__).splitlines()[0]}"
    for a, b in zip(ours, theirs, strict=True):
        if not np.abs(a - b).max() <= TRIAL_TOLERANCE * np.abs(a).max():  # Nor for NaN.
            return "cuDNN gives other numbers here"
    return ""


def _trial(form: Attention, length: int | None, qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What attention gives, and a derivative by queries, keys and values, those of padding too."""

    def real(qkv: jax.Array) -> jax.Array:
        query, key, value = qkv
        return form(query, key, value, length)[:, :length].astype(jnp.float32)

    derivative = jax.grad(lambda qkv: jnp.sin(real(qkv)).sum())(qkv)
    return real(qkv), derivative.astype(jnp.float32)


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, length: int | None = None
) -> jax.Array:
    """`Attention` by cuDNN, for bfloat16 and float16 on NVIDIA GPUs.

    Queries are not masked: rows of padding get numbers of no meaning, but finite ones.
    """
    # All alike: over several devices JAX gives each of them the lengths of the whole batch, of
    # which cuDNN reads as many as there are images.
    lengths = None if length is None else jnp.full(len(query), length, jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )


CUDNN = Kernels(attention=cudnn_attention, token_multiple=CUDNN_TOKEN_MULTIPLE)


# What follows is for CPUs, where the way an operation is written decides how fast XLA computes it:
# benchmarks/results/train.md has the figures. None of it has a forward-mode derivative (`jax.jvp`).


def cpu_kernels(devices: int) -> Kernels:
    """The forms that are faster on CPUs, for a batch spread over so many devices."""
    return Kernels(
        attention=SlicedAttention(devices),
        dot_general=flat_dot_general,
        gelu=recomputed_gelu,
        layer_norm=LayerNorm,
    )


@dataclasses.dataclass(frozen=True)
class SlicedAttention:
    """`Attention` with slices of the images side by side, and its own derivative.

    On a CPU, XLA computes a batch of small products on one core, and independent ones side by side.
    """

    devices: int

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        length: int | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        if length is not None:
            raise ValueError("attention on CPUs takes no padding")
        heads = [x.swapaxes(-3, -2) for x in (query, key, value)]
        images_each, rest = divmod(query.shape[0], self.devices)
        slices = 1
        if images_each and not rest:
            # Of two images at least: XLA lays out a single one otherwise, which takes longer.
            # (Their number may be a symbol, which can only be asked whether it is equal.)
            fitting = (i for i in range(1, 5) if images_each % i == 0 and images_each != i)
            slices = max(fitting, default=1)
        if slices == 1:
            return _attend(*heads, bias).swapaxes(-3, -2)

        def cut(x: jax.Array) -> tuple[jax.Array, ...]:
            # Of the images on a device, so that none has to be moved: every so many.
            return jnp.unstack(x.reshape(-1, slices, *x.shape[1:]), axis=1)

        parts = [_attend(*part, bias) for part in zip(*map(cut, heads), strict=True)]
        return jnp.stack(parts, axis=1).reshape(heads[0].shape).swapaxes(-3, -2)


@jax.custom_vjp
def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """(..., h, t, c), (..., h, s, c), (..., h, s, c) -> (..., h, t, c)."""
    return _attend_fwd(query, key, value, bias)[0]


def _attend_fwd(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None) -> Any:
    query = query / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    scores = (query @ key.swapaxes(-2, -1)).astype(jnp.float32)
    if bias is not None:
        scores += bias
    exp_scores = jnp.exp(scores - scores.max(axis=-1, keepdims=True)).astype(value.dtype)
    # Of the rounded numbers, so that weights sum to 1. Dividing (t, c) is less than (t, s).
    inv_sum = 1 / exp_scores.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    y = ((exp_scores @ value) * inv_sum).astype(value.dtype)
    return y, (query, key, value, bias, exp_scores, inv_sum)


def _attend_bwd(residuals: Any, grad: jax.Array) -> Any:
    query, key, value, bias, exp_scores, inv_sum = residuals
    weights = exp_scores * inv_sum
    by_weights = grad @ value.swapaxes(-2, -1)
    # The softmax's derivative, in float32: what all scores have in common has to cancel.
    mean = (weights * by_weights).sum(axis=-1, keepdims=True)
    exact = weights * (by_weights - mean)
    scores = exact.astype(query.dtype)
    scale = jnp.sqrt(query.shape[-1]).astype(query.dtype)
    return (
        (scores @ key) / scale,
        scores.swapaxes(-2, -1) @ query,
        weights.astype(grad.dtype).swapaxes(-2, -1) @ grad,
        None if bias is None else _summed_to(exact, bias.shape),
    )


def _summed_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What a gradient is of an array of that shape that was broadcast."""
    x = x.sum(axis=range(x.ndim - len(shape)))
    ones = [axis for axis, size in enumerate(shape) if size < x.shape[axis]]
    return x.sum(axis=ones, keepdims=True)


_attend.defvjp(_attend_fwd, _attend_bwd)


def flat_dot_general(
    lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None
) -> jax.Array:
    """`jax.lax.dot_general` of a dense layer as a product of two matrices, which is faster.

    Where the last axes of `lhs` are multiplied with the first of `rhs`; the rest is left to JAX.
    """
    (lhs_contract, rhs_contract), batch = dimension_numbers
    k = len(lhs_contract)
    last = tuple(range(lhs.ndim - k, lhs.ndim))
    if tuple(lhs_contract) != last or tuple(rhs_contract) != tuple(range(k)) or any(batch):
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision=precision)
    rows_shape, columns_shape = lhs.shape[:-k], rhs.shape[k:]
    d, features = math.prod(rhs.shape[:k]), math.prod(columns_shape)
    rows, kernel = lhs.reshape(math.prod(rows_shape), d), rhs.reshape(d, features)
    narrows = d > features and precision is None
    y = (
        _matmul_custom_grad(rows, kernel)
        if narrows
        else jnp.matmul(rows, kernel, precision=precision)
    )
    return y.reshape(*rows_shape, *columns_shape)


@jax.custom_vjp
def _matmul_custom_grad(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """(n, d) @ (d, f) for d > f: JAX's own derivative by the kernel is slower."""
    return rows @ kernel


def _matmul_custom_grad_fwd(rows: jax.Array, kernel: jax.Array) -> Any:
    return rows @ kernel, (rows, kernel)


def _matmul_custom_grad_bwd(residuals: Any, grad: jax.Array) -> Any:
    rows, kernel = residuals
    # Without the barrier XLA joins transposition and product, and has no fast library for both.
    return grad @ kernel.T, jax.lax.optimization_barrier(rows.T) @ grad


_matmul_custom_grad.defvjp(_matmul_custom_grad_fwd, _matmul_custom_grad_bwd)

_CUBIC = 0.044715
_TWICE = 2 * math.sqrt(2 / math.pi)


@jax.custom_vjp
def recomputed_gelu(x: jax.Array) -> jax.Array:
    """The GELU by tanh in float32, and backwards anew from x: keeping more costs more time."""
    return _gelu_fwd(x)[0]


def _gelu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # (1 + tanh(z)) / 2 is 1 / (1 + exp(-2 z)). XLA computes whatever ends in a division once, and
    # not again in each place that reads it.
    exact = x.astype(jnp.float32)
    return (exact / (1 + _exp_of_minus_twice(exact))).astype(x.dtype), x


def _exp_of_minus_twice(x: jax.Array) -> jax.Array:
    return jnp.exp(-_TWICE * (x + _CUBIC * x * x * x))


def _gelu_bwd(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA keeps the exponential from the way forwards.
    exact = jax.lax.optimization_barrier(x).astype(jnp.float32)
    sigmoid = 1 / (1 + _exp_of_minus_twice(exact))
    derivative = sigmoid
    derivative += exact * sigmoid * (1 - sigmoid) * _TWICE * (1 + 3 * _CUBIC * exact * exact)
    return ((grad * derivative).astype(x.dtype),)


recomputed_gelu.defvjp(_gelu_fwd, _gelu_bwd)


class LayerNorm(nn.Module):
    """`nn.LayerNorm` over the last axis with its derivative written down, in float32.

    (..., d) -> (..., d) of `dtype`. What JAX derives by itself keeps more and computes more.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", self.scale_init, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return _layer_norm(x, scale, bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> jax.Array:
    return _layer_norm_fwd(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_fwd(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> Any:
    y = x.astype(jnp.float32)
    mean = y.mean(axis=-1, keepdims=True)
    # One pass over x. Rounding may give less than zero.
    variance = jnp.maximum(jnp.square(y).mean(axis=-1, keepdims=True) - jnp.square(mean), 0)
    inv_std = jax.lax.rsqrt(variance + epsilon)
    return ((y - mean) * (inv_std * scale) + bias).astype(dtype), (x, scale, mean, inv_std)


def _layer_norm_bwd(epsilon: float, dtype: Any, residuals: Any, grad: jax.Array) -> Any:
    x, scale, mean, inv_std = residuals
    grad = grad.astype(jnp.float32)
    x_hat = (x.astype(jnp.float32) - mean) * inv_std
    # Without the barrier XLA would compute it anew, and slowly, in each sum.
    grad_x_hat = jax.lax.optimization_barrier(grad * x_hat)
    mean_grad, mean_grad_x_hat = _mean(grad, scale), _mean(grad_x_hat, scale)
    change = inv_std * (grad * scale - mean_grad - x_hat * mean_grad_x_hat)
    rows = tuple(range(grad.ndim - 1))
    return change.astype(x.dtype), grad_x_hat.sum(rows), grad.sum(rows)


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The mean of x * weights over the last axis: (..., d) and (d,) give (..., 1)."""
    # A product of matrices is faster than a sum.
    return jnp.matmul(x, weights, precision="highest")[..., None] / x.shape[-1]


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)
