"""Every form of an operation against its formula and against Flax, and the choice of forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests import reference
from tests.families import OTHERS, SPECS
from vit_jax import checkpoints, create_model
from vit_jax.models import kernels
from vit_jax.models.kernels import (
    CUDNN,
    Kernels,
    LayerNorm,
    SlicedAttention,
    attention_weights,
    choose_kernels,
    cpu_kernels,
    dot_product_attention,
    flat_dot_general,
    key_mask,
    recomputed_gelu,
)

FORMS = {"stock": dot_product_attention, "sliced": SlicedAttention(1), "of two": SlicedAttention(2)}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def mostly_slow(names, *fast) -> list:
    """All of them; those that are not `fast` take seconds each to compile."""
    marks = [pytest.mark.slow, pytest.mark.ci]
    return [name if name in fast else pytest.param(name, marks=marks) for name in names]


# Attention.


def test_the_weights_are_the_papers():
    query, key = normal(2, 5, 3, 4), 3 * normal(2, 7, 3, 4, seed=1)

    found = attention_weights(query, key)

    scores = np.einsum("nthc,nshc->nhts", np.float64(query), np.float64(key)) / 4**0.5
    np.testing.assert_allclose(found, scipy.special.softmax(scores, axis=3), atol=1e-6)


def test_nobody_attends_to_what_is_masked():
    mask = np.array([True, False, True])

    found = attention_weights(normal(1, 3, 2, 4), normal(1, 3, 2, 4, seed=1), mask)

    assert np.all((np.asarray(found) > 0) == mask)
    np.testing.assert_allclose(np.sum(found, axis=-1), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("images", [1, 3, 4, 8])
def test_attention_and_its_derivative_are_those_of_the_formula(form, images):
    """Against float64 NumPy, with scores of up to some hundreds, which exp alone can't take."""
    rng = np.random.default_rng(images)
    q, k, v, g = (rng.normal(size=(images, t, 2, 4)) for t in (5, 3, 3, 5))
    q[0] *= 200
    weights = scipy.special.softmax(np.einsum("nthc,nshc->nhts", q, k) / 2, axis=-1)
    by_weights = np.einsum("nthc,nshc->nhts", g, v)
    by_scores = weights * (by_weights - (weights * by_weights).sum(axis=-1, keepdims=True)) / 2
    expected = (
        np.einsum("nhts,nshc->nthc", by_scores, k),
        np.einsum("nhts,nthc->nshc", by_scores, q),
        np.einsum("nhts,nthc->nshc", weights, g),
    )

    y, derivative = jax.vjp(FORMS[form], *(x.astype(np.float32) for x in (q, k, v)))

    np.testing.assert_allclose(y, np.einsum("nhts,nshc->nthc", weights, v), atol=1e-5)
    for found, wanted in zip(derivative(g.astype(np.float32)), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 8])
def test_the_derivative_in_bfloat16_is_near_that_in_float32(form, offset):
    """Also if keys and values have much in common, which has no effect on queries and keys."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(2, 50, 4, 16)) + shift, jnp.bfloat16)
        for shift in (0, offset, offset, 0)
    )

    def derivative(*arrays):
        *inputs, grad = arrays
        return jax.jit(lambda *x: jax.vjp(FORMS[form], *x)[1](grad))(*inputs)

    # The common part of the values is rounded with them; the stock form keeps less of the rest.
    tolerance = 0.15 if form == "stock" and offset else 0.03
    expected = derivative(*(x.astype(jnp.float32) for x in (q, k, v, g)))
    for found, wanted in zip(derivative(q, k, v, g), expected, strict=True):
        error = np.linalg.norm(np.float32(found) - wanted) / np.linalg.norm(wanted)
        assert found.dtype == jnp.bfloat16
        assert error < tolerance


def test_padding_changes_nothing_in_the_stock_form():
    q, k, v = (normal(2, 5, 3, 4, seed=i) for i in range(3))
    q5, k5, v5 = (np.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=9) for x in (q, k, v))

    found = dot_product_attention(q5, k5, v5, 5)

    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, :5], dot_product_attention(q, k, v), atol=1e-6)
    assert key_mask(5, None) is None


def test_the_form_for_cpus_refuses_padding():
    x = normal(1, 4, 1, 4)
    with pytest.raises(ValueError, match="attention on CPUs takes no padding"):
        SlicedAttention(1)(x, x, x, 3)


@pytest.mark.parametrize("images", [2, 8])
@pytest.mark.parametrize("shape", [(3, 1, 5, 5), (2, 5, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_a_bias_is_added_to_the_scores_and_has_a_gradient(form, shape, images):
    """Of each window, head, query and key, or the same for all windows or heads."""
    query, key, value = (normal(images, 3, 5, 2, 4, seed=i) for i in range(3))
    bias, weights = normal(*shape, seed=3), normal(images, 3, 5, 2, 4, seed=4)

    def attend(query, key, value, bias):
        return FORMS[form](query, key, value, None, bias)

    def exact(query, key, value, bias):  # In NumPy's float64.
        scores = np.einsum("nwthc,nwshc->nwhts", query, key) / 4**0.5 + bias
        return np.einsum("nwhts,nwshc->nwthc", scipy.special.softmax(scores, axis=-1), value)

    inputs = [x.astype(np.float64) for x in (query, key, value, bias)]
    np.testing.assert_allclose(attend(query, key, value, bias), exact(*inputs), atol=1e-5)
    found = jax.jit(jax.grad(lambda *x: (attend(*x) * weights).sum(), range(4)))(
        query, key, value, bias
    )
    for i, gradient in enumerate(found):
        step = normal(*inputs[i].shape, seed=5) * 1e-6
        ends = [
            (exact(*inputs[:i], inputs[i] + sign * step, *inputs[i + 1 :]) * weights).sum()
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / 2
        scale = np.linalg.norm(gradient) * np.linalg.norm(step)
        assert abs((gradient * step).sum() - slope) < 1e-4 * scale


# Dense layers.


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (0, 3, 6)])
@pytest.mark.parametrize("features", [3, 6, 12, (3, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_derivatives_of_dense_layers_are_those_of_flax(shape, features, dtype):
    x = normal(*shape)
    theirs = nn.DenseGeneral(features, dtype=dtype, bias_init=nn.initializers.normal())
    variables = theirs.init(jax.random.key(0), x)

    def value_and_grad(module):
        def value(variables, x):
            y = module.apply(variables, x)
            return jnp.square(y.astype(jnp.float32)).sum(), y

        return jax.jit(jax.grad(value, (0, 1), has_aux=True))(variables, x)

    tolerance = 1e-5 if dtype == jnp.float32 else 0.03

    def compare(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), tolerance, tolerance)

    ours = theirs.clone(dot_general=flat_dot_general)
    jax.tree.map(compare, value_and_grad(ours), value_and_grad(theirs))


def test_two_axes_are_multiplied_and_what_is_no_dense_layer_is_left_to_jax():
    x, kernel = normal(2, 3, 4, 5), normal(4, 5, 6, seed=1)
    last = (((2, 3), (0, 1)), ((), ()))
    first = (((0,), (0,)), ((), ()))

    np.testing.assert_allclose(
        flat_dot_general(x, kernel, last), jax.lax.dot_general(x, kernel, last), rtol=1e-5
    )
    np.testing.assert_array_equal(
        flat_dot_general(kernel, kernel, first), jax.lax.dot_general(kernel, kernel, first)
    )


# GELU.


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_derivative(x: np.ndarray) -> np.ndarray:
    z = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return (1 + np.tanh(z)) / 2 + x / 2 * (1 - np.tanh(z) ** 2) * slope


@pytest.mark.parametrize(
    ("form", "dtype", "tolerance"),
    [
        (recomputed_gelu, jnp.float32, 1e-6),
        (recomputed_gelu, jnp.bfloat16, 0.004),
        (Kernels().gelu, jnp.float32, 5e-6),
        (Kernels().gelu, jnp.bfloat16, 0.004),
    ],
)
def test_values_and_derivatives_of_the_gelu_are_those_of_the_formula(form, dtype, tolerance):
    near = np.linspace(-8, 8, 4001)
    x = jnp.asarray(np.concatenate([near, [-1e4, -50, 0, 50, 1e4]]), dtype)
    exact = np.float64(x)

    y, pull = jax.jit(lambda x: jax.vjp(form, x))(x)
    (slope,) = pull(jnp.full_like(x, 3))

    assert y.dtype == slope.dtype == dtype
    np.testing.assert_allclose(np.float64(y), gelu(exact), tolerance, tolerance)
    np.testing.assert_allclose(np.float64(slope) / 3, gelu_derivative(exact), tolerance, tolerance)


def test_second_derivatives_of_the_gelu():
    x = jnp.linspace(-3, 3, 7)

    found = jax.vmap(jax.hessian(recomputed_gelu))(x)

    step = 1e-4
    around = (gelu_derivative(np.float64(x) + side) for side in (step, -step))
    np.testing.assert_allclose(found, np.subtract(*around) / (2 * step), atol=1e-5)


# LayerNorm.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_derivatives_of_the_layer_norm_are_those_of_flax(dtype):
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal((2, 3, 8)).astype(np.float32) for _ in range(2))
    params = {
        "params": {
            "scale": rng.uniform(0.5, 2, 8).astype(np.float32),
            "bias": rng.standard_normal(8).astype(np.float32),
        }
    }
    x = jnp.asarray(x, dtype)

    def value_and_grad(module):
        def value(params, x):
            y = module.apply(params, x)
            assert y.dtype == dtype
            return (y * weights).sum()

        return jax.value_and_grad(value, (0, 1))(params, x)

    tolerance = 1e-5 if dtype == jnp.float32 else 0.05

    def compare(a, b):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype("f4"), b.astype("f4"), tolerance, tolerance)

    theirs = value_and_grad(nn.LayerNorm(1e-6, dtype=dtype))
    jax.tree.map(compare, value_and_grad(LayerNorm(1e-6, dtype)), theirs)


@pytest.mark.parametrize("form", [LayerNorm, nn.LayerNorm])
def test_the_derivative_of_the_layer_norm_is_the_limit_of_differences(form):
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((2, 8)), rng.standard_normal((2, 8))
    scale, bias = rng.standard_normal(8), rng.standard_normal(8)

    def value(x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return ((y * scale + bias) * weights).sum()

    step = 1e-5 * np.eye(16).reshape(16, 2, 8)
    expected = [(value(x + dx) - value(x - dx)) / 2e-5 for dx in step]

    params = {"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}
    module = form(epsilon=1e-6)
    found = jax.grad(lambda x: (module.apply(params, x) * weights).sum())(jnp.float32(x))

    np.testing.assert_allclose(found.reshape(-1), expected, atol=1e-5)


# Whole networks.


def smaller(spec):
    """With one block in each tower."""
    if "depths" in spec.architecture():
        return spec.replace(depths=(1, 2))
    if not spec.classifies_by_text:
        return spec.replace(num_layers=1)
    one = dict(num_layers=1)
    return spec.replace(image=dict(spec.image) | one, text=dict(spec.text) | one)


SMALLER = {name: smaller(spec) for name, spec in SPECS.items()}


def network(family: str):
    """(a function of params and images, the params, images): with one output of everything."""
    spec = SMALLER[family]
    model = spec.model()
    params = checkpoints.to_tree(reference.make_params(spec.shapes(), seed=2))
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, *spec.image_size, 3)).astype(np.float32)
    tokens = np.array([[2, 3, 4, 5, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]] * 2)

    def value(params, images=images, model=model):
        if family.startswith("LiT"):
            zimg, ztxt, out = model.apply({"params": params}, images, tokens)
            return out["t"][0] * (zimg * ztxt[:, ::-1]).sum()
        return jnp.sin(model.apply({"params": params}, images)).sum()

    return value, params, images


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("family", mostly_slow(SPECS, "Mixer", "sincos2d token"))
def test_every_network_has_derivatives_of_every_kind(family):
    """Along a random direction of params and images: once by forward mode as by reverse mode, and
    twice, forward over reverse as in `jax.hessian`, as by reverse mode alone."""
    value, params, images = network(family)
    leaves, tree = jax.tree.flatten((params, images))
    rng = np.random.default_rng(3)
    direction = jax.tree.unflatten(
        tree, [0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    )

    def along(step):
        return value(*jax.tree.map(lambda x, d: x + step * d, (params, images), direction))

    @jax.jit
    def derivatives(here):
        _, forward = jax.jvp(along, (here,), (1.0,))
        _, linear = jax.linearize(along, here)
        reverse = jax.grad(along)
        return (
            forward,
            linear(1.0),
            reverse(here),
            jax.hessian(along)(here),
            jax.grad(reverse)(here),
        )

    with jax.default_matmul_precision("highest"):
        forward, linear, reverse, hessian, twice_reverse = map(float, derivatives(0.0))

    assert forward == pytest.approx(reverse, rel=1e-3)
    assert linear == pytest.approx(reverse, rel=1e-3)
    assert hessian == pytest.approx(twice_reverse, rel=1e-3, abs=1e-3 * abs(reverse))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("family", mostly_slow(OTHERS, "Mixer", "MAP"))
def test_a_network_of_each_image_is_the_network_of_the_batch(family):
    _, params, images = network(family)
    model = SMALLER[family].model()

    def one(image, brightness):
        return model.apply({"params": params}, image[None] * brightness)[0]

    @jax.jit
    def each(images):
        by_brightness = jax.jacfwd(one, 1)
        return jax.vmap(lambda image: (one(image, 1.0), by_brightness(image, 1.0)))(images)

    found, slopes = each(images)
    whole, expected = jax.jit(
        lambda x: jax.jvp(lambda s: model.apply({"params": params}, x * s), (1.0,), (1.0,))
    )(images)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    np.testing.assert_allclose(slopes, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("family", mostly_slow(SPECS, "Mixer", "MAP"))
def test_the_forms_for_cpus_give_the_numbers_and_gradients_of_the_stock_ones(family):
    value, params, images = network(family)
    model = SMALLER[family].model(kernels=cpu_kernels(1))

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.value_and_grad(value))(params)
        found = jax.jit(jax.value_and_grad(lambda p: value(p, images, model)))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )


# Padding of the tokens.


def random_like(variables):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f4") / 4, variables)


@dataclasses.dataclass(frozen=True)
class FusedKernel:
    """Stands for cuDNN's: checks what it is given, and raises for odd lengths as JAX does."""

    real: int

    def __call__(self, query, key, value, length=None):
        assert query.shape == key.shape == value.shape
        if query.shape[1] % 2:
            raise NotImplementedError(f"Unsupported sequence length Q {query.shape[1]}")
        assert query.shape[1] == self.real + -self.real % 8
        assert length == (None if query.shape[1] == self.real else self.real)
        return dot_product_attention(query, key, value, length)


VITS = {
    "token": dict(classifier="token"),
    "gap": dict(classifier="gap"),
    "map": dict(classifier="map"),
    "all tokens": dict(classifier="token_unpooled"),
    "patches": dict(classifier="unpooled"),
    "no positions to learn": dict(position_embedding="sincos2d"),
    "hybrid": dict(resnet=(1,), patch_size=(1, 1)),
}


@pytest.mark.parametrize("scan", mostly_slow([False, True], False))
@pytest.mark.parametrize("name", mostly_slow(VITS, "token"))
def test_padded_tokens_leave_no_trace(name, scan):
    """In logits, features, gradients, observed weights, forwards and backwards."""
    fields = dict(hidden_size=16, num_layers=2, num_heads=2, mlp_dim=16, patch_size=(4, 4))
    model = create_model("ViT-Ti_16", 5, **(fields | VITS[name]))
    model = model.clone(loop=dataclasses.replace(model.loop, scan=scan))
    images = normal(2, 12, 20, 3)
    tokens = model.num_tokens((12, 20))
    padded = model.clone(kernels=Kernels(attention=FusedKernel(tokens), token_multiple=8))
    stock, found = (jax.eval_shape(m.init, jax.random.key(0), images) for m in (model, padded))
    assert found == stock
    variables = random_like(stock)

    def outputs(model):
        def value(variables):
            logits, features = model.apply(variables, images, return_features=True)
            return jnp.sin(logits).sum(), (logits, features)

        return jax.jit(jax.value_and_grad(value, has_aux=True))(variables)

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

    with jax.default_matmul_precision("highest"):
        jax.tree.map(compare, outputs(padded), outputs(model))
        if not scan:
            seen = [
                m.apply(variables, images, mutable=["intermediates"])[1] for m in (model, padded)
            ]
            jax.tree.map(compare, *seen)


def test_what_is_padded_is_what_the_kernel_takes():
    """The stand-in would say so, as JAX does of cuDNN's, if tokens came as they are."""
    fields = dict(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    model = create_model("ViT-Ti_16", 5, patch_size=(4, 4), **fields)
    images = normal(1, 16, 16, 3)
    for_seventeen = model.clone(kernels=Kernels(attention=FusedKernel(17)))

    with pytest.raises(NotImplementedError, match="Unsupported sequence length Q 17"):
        jax.eval_shape(for_seventeen.init, jax.random.key(0), images)


@pytest.mark.slow
@pytest.mark.ci
def test_dropout_of_attention_sees_no_padding():
    model = create_model("ViT-Ti_16", 5, patch_size=(4, 4), hidden_size=16, num_layers=1,
                         num_heads=2, mlp_dim=16, attention_dropout_rate=0.5)  # fmt: skip
    images = normal(1, 16, 16, 3)
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), images))
    padded = model.clone(kernels=Kernels(attention=FusedKernel(17), token_multiple=8))

    _, sown = padded.apply(
        variables, images, train=True, rngs={"dropout": jax.random.key(1)},
        mutable=["intermediates"],
    )  # fmt: skip
    (weights,) = jax.tree.leaves(sown)

    assert weights.shape == (1, 2, 17, 17)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


# The choice.

SMALL = dict(hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16, patch_size=(4, 4))


def choose(name="ViT-Ti_16", attention="auto", size=(48, 48), dtype=jnp.bfloat16, **fields):
    fields = (SMALL if name == "ViT-Ti_16" else {}) | fields
    model = create_model(name, num_classes=10, dtype=dtype, **fields)
    return choose_kernels(model, size, jax.devices(), attention)


@pytest.fixture
def gpu(monkeypatch):
    """The devices are GPUs by name; that they are none shows in what they can't run."""
    monkeypatch.setattr(kernels, "platform_of", lambda devices: "gpu")


@pytest.fixture
def cudnn(gpu, monkeypatch):
    """What asks for cuDNN gets the same of XLA's; the shapes that were asked for."""
    real, shapes = jax.nn.dot_product_attention, []

    def attention(*rows, implementation, key_value_seq_lengths):
        assert implementation == "cudnn"
        shapes.append((rows[0].shape, key_value_seq_lengths is not None))
        return real(*rows, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return shapes


def test_cpus_get_their_forms_and_nothing_is_tried_or_told():
    assert choose() == (cpu_kernels(jax.device_count()), "", "")
    assert str(choose()) == ""


@pytest.mark.parametrize("platform", ["tpu", "METAL"])
def test_other_accelerators_get_the_stock_forms(monkeypatch, platform):
    monkeypatch.setattr(kernels, "platform_of", lambda devices: platform)

    assert choose() == (Kernels(), "", "")
    chosen = choose(attention="cudnn")
    assert chosen.attention == "xla"
    assert chosen.why.startswith("JAX sees no GPU here, but ")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"dtype": jnp.float32}, "cuDNN takes bfloat16, and dtype is float32"),
        (
            {"attention_dropout_rate": 0.1},
            "cuDNN has no dropout, and attention_dropout_rate is 0.1",
        ),
        ({"size": (40, 40)}, "101 tokens, and cudnn is chosen from 128 on"),
        ({}, "cuDNN says: .+"),
    ],
)
def test_on_a_gpu_the_reason_for_the_stock_form_is_told(gpu, fields, reason):
    chosen = choose(**fields)

    assert chosen[:2] == (Kernels(), "xla")
    assert "\n" not in chosen.why
    assert chosen.why.startswith(reason.rstrip(".+"))
    assert str(chosen) == f"attention by xla ({chosen.why})"


def test_a_network_without_attention_has_no_choice(gpu):
    assert choose(name="Mixer-B_16") == (Kernels(), "", "")
    assert (
        choose(name="Mixer-B_16", attention="cudnn").why
        == "this network has no attention that cuDNN computes"
    )


def test_cudnn_is_tried_with_padded_tokens_there_and_back(cudnn):
    assert choose() == (CUDNN, "cudnn", "145 tokens padded to 152")
    # Two images a device, 12 x 12 patches and the class token, 2 heads.
    images = 2 * jax.device_count()
    assert {*cudnn} == {((images, 152, 2, 8), True)}
    assert str(choose(classifier="gap")) == "attention by cudnn"
    assert cudnn[-1] == ((images, 144, 2, 8), False)
    assert choose(attention="cudnn", size=(8, 8))[0] == CUDNN  # Few tokens, but asked for.
    assert choose(attention="xla") == (Kernels(), "", "")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y, query: 1.2 * y,  # Other weights.
        lambda y, query: y.at[:, -1].set(jnp.nan * query[:, -1]),  # Padding that isn't finite.
    ],
)
def test_cudnn_is_not_taken_where_its_numbers_are_wrong(gpu, monkeypatch, wrong):
    real = jax.nn.dot_product_attention

    def attention(query, *rows, implementation, **lengths):
        return wrong(real(query, *rows, implementation="xla", **lengths), query)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)

    assert choose() == (Kernels(), "xla", "cuDNN gives other numbers here")


@pytest.mark.slow
@pytest.mark.ci
def test_a_network_gives_the_same_by_cudnn_and_shows_the_same_weights(cudnn):
    images = normal(2, 8, 8, 3)
    model = create_model("ViT-Ti_16", 10, dtype=jnp.bfloat16, head_bias_init=1.0, **SMALL)
    other = model.clone(kernels=CUDNN)
    variables = random_like(jax.eval_shape(model.init, jax.random.key(0), images))

    np.testing.assert_allclose(
        other.apply(variables, images, return_features=True)[1]["encoder_norm"].astype("f4"),
        model.apply(variables, images, return_features=True)[1]["encoder_norm"].astype("f4"),
        atol=0.05,
    )
    assert cudnn == [((2, 8, 2, 8), True)]
    shown = [m.apply(variables, images, mutable=["intermediates"])[1] for m in (model, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.01), *shown)
