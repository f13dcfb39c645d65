"""What a model costs, counted from the model itself without running or compiling it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Cost(NamedTuple):
    """Numbers in the weights, and floating-point operations of one example's way through them.

    A multiplication and an addition are two operations. (Papers often count them as one.)
    """

    parameters: int
    flops: float


def flops(model: Any, image_size: tuple[int, int], *, channels: int = 3) -> float:
    """The operations that a picture of image_size (height, width) takes; see `cost`."""
    return cost(model, jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)).flops


def training_flops(model: Any, image_size: tuple[int, int], *, channels: int = 3) -> float:
    """The operations of a training step for each picture, see `flops`.

    Three times those of the way forwards: each product of matrices has two more backwards, one for
    either factor's gradient. What is computed a second time to save memory is not counted.
    """
    return 3 * flops(model, image_size, channels=channels)


def cost(model: Any, inputs: jax.ShapeDtypeStruct) -> Cost:
    """What a model costs.

    The operations are counted in the lowered program. All blocks cost the same, so that only none
    and one of them are lowered.

    Args:
      model: a Linen module with `num_layers` equal blocks, e.g. of `create_model`.
      inputs: shape and type of one example: a picture (1, h, w, c), or the tokens (1, t) of a text.
    """
    none, one = (_whole_cost(model.clone(num_layers=n), inputs) for n in (0, 1))
    return Cost(
        none.parameters + (one.parameters - none.parameters) * model.num_layers,
        none.flops + (one.flops - none.flops) * model.num_layers,
    )


@functools.lru_cache(100)  # Of families with a common tower.
def _whole_cost(model: Any, inputs: jax.ShapeDtypeStruct) -> Cost:
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    program: Any = jax.jit(model.apply).lower(variables, inputs)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return Cost(parameters, program.cost_analysis()["flops"])
