import functools
import math

import jax
import jax.numpy as jnp
import pytest

from vit_jax.models import create_model
from vit_jax.models.cost import cost, flops


def of_the_whole(model, image_size, channels=3):
    """Counted in the whole model, every block lowered."""
    images = jnp.zeros((1, *image_size, channels))
    variables = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), images
    )
    program = jax.jit(model.apply).lower(variables, images)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    return parameters, program.cost_analysis()["flops"]


@pytest.mark.parametrize("name", ["ViT-Ti_16", "ViT-S_32", "ViT-S_16-gap-norep", "Mixer-B_32"])
def test_none_and_one_block_tell_the_cost_of_all(name):
    model = create_model(name, num_classes=1000)
    parameters, operations = of_the_whole(model, (224, 224))
    found = cost(model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert found.parameters == parameters
    assert found.flops == pytest.approx(operations, rel=1e-4)


def test_one_block_and_other_pictures_count_too():
    model = create_model("ViT-Ti_16", num_classes=None, num_layers=1)
    found = cost(model, jax.ShapeDtypeStruct((1, 32, 64, 1), jnp.float32))
    assert found.flops == flops(model, (32, 64), channels=1)
    parameters, operations = of_the_whole(model, (32, 64), channels=1)
    assert found == (parameters, pytest.approx(operations, rel=1e-6))


def test_the_operations_are_those_of_the_matrix_products_and_little_else():
    # A block's: qkv and output projections, the two products of attention, the MLP.
    tokens, width, blocks = 197, 768, 12
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * tokens * width**2
    products = 2 * (196 * 768 * width + blocks * block + width * 1000)
    found = flops(create_model("ViT-B_16", num_classes=1000), (224, 224))
    assert products < found < 1.02 * products
