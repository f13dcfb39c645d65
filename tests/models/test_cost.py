"""Operations counted from the jaxpr, against formulas and what XLA counts on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.models import create_lit, create_model
from vit_jax.models.cost import count_flops, flops, flops_by_part, training_flops
from vit_jax.models.kernels import CUDNN, cpu_kernels
from vit_jax.models.stack import BlockLoop

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def counted(function, *shapes) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "name", ["ViT-Ti_16", "ViT-S_32", "ViT-S_16-gap-norep", "R+ViT-Ti_16", "Mixer-B_32"]
)
def test_the_operations_are_nearly_those_that_xla_counts_on_a_cpu(name):
    model = create_model(name, num_classes=1000)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    program = jax.jit(model.apply).lower(variables, IMAGE)

    found = flops(model, (224, 224))

    assert 0.97 < found / program.cost_analysis()["flops"] <= 1


def test_the_operations_are_those_of_the_matrix_products():
    # A block's: qkv and output projections, the two products of attention, the MLP.
    tokens, width, blocks = 197, 768, 12
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    products = 2 * (196 * 768 * width + blocks * block + width * 1000)
    model = create_model("ViT-B_16", num_classes=1000)
    assert flops(model, (224, 224)) == products
    assert training_flops(model, (224, 224)) == 3 * products


@pytest.mark.parametrize(
    "changes",
    [
        dict(kernels=cpu_kernels(2)),
        dict(kernels=CUDNN),
        dict(dtype=jnp.bfloat16),
        dict(loop=BlockLoop(scan=True, remat="full")),
    ],
)
def test_nothing_that_runs_faster_or_smaller_changes_them(changes):
    model = create_model("ViT-Ti_16", num_classes=10)
    assert flops(model.clone(**changes), (64, 64)) == flops(model, (64, 64))


def test_a_bundles_towers_are_counted():
    lit = create_lit("LiT-B16B")
    image = create_model("ViT-B_16", num_classes=768)
    assert flops(lit, (224, 224)) == flops(image, (224, 224))


def test_loops_count_as_often_as_they_run_and_the_dearest_branch():
    def product(x):
        return x @ x

    def loop(x):
        return jax.lax.scan(lambda x, _: (product(x), None), x, length=5)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, loop, product, x)

    once = 2 * 4**3
    assert counted(jax.jit(product), (4, 4)) == once
    assert counted(jax.checkpoint(loop), (4, 4)) == 5 * once
    assert counted(branch, (4, 4)) == 5 * once
    assert counted(jax.vmap(product), (3, 4, 4)) == 3 * once
    assert counted(lambda x: jnp.sin(x).sum(), (4, 4)) == 0


def test_grouped_convolutions_count_what_they_multiply():
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )  # fmt: skip

    assert counted(convolution, (1, 5, 5, 6), (3, 3, 3, 8)) == 2 * 3 * 3 * 8 * (3 * 3 * 3)


def test_a_loop_of_unknown_length_is_refused():
    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="a loop of unknown length"):
        counted(until, (4, 4))


def test_the_operations_of_a_swin_transformer_are_those_of_its_stages():
    """As counted by hand, of products alone; 4.5 billion multiplications in the paper's table."""
    parts = flops_by_part(create_model("Swin-T_4-w7", 1000), (224, 224))
    expected = {"embedding": 2 * 56 * 56 * 96 * 48, "head": 2 * 768 * 1000}
    for i, depth in enumerate((2, 2, 6, 2)):
        tokens, width = 56**2 // 4**i, 96 * 2**i
        block = 12 * tokens * width**2 + 2 * tokens * 49 * width
        merging = tokens // 4 * 4 * width * 2 * width if i < 3 else 0
        expected[f"stage_{i}"] = 2 * (depth * block + merging)
    assert parts == expected
    assert sum(parts.values()) / 2e9 == pytest.approx(4.5, abs=0.03)
