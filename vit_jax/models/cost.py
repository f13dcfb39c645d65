"""What a network costs, counted from itself without running, lowering or compiling it."""

import math
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from vit_jax.models.family import ImageModel
from vit_jax.models.kernels import Kernels
from vit_jax.models.stack import BlockLoop


def flops(model: ImageModel, image_size: tuple[int, int], *, channels: int = 3) -> float:
    """Floating-point operations that one image of image_size (height, width) takes.

    Those of products of matrices and convolutions, which are 99 % and more of all, on whatever
    platform and with whatever kernels; a multiplication and an addition are two. (Papers often
    count them as one.)
    """
    return float(sum(flops_by_part(model, image_size, channels=channels).values()))


def flops_by_part(
    model: ImageModel, image_size: tuple[int, int], *, channels: int = 3
) -> dict[str, float]:
    """The same of each part of the network, {its name in the tree of weights: operations}."""
    model = model.clone(kernels=Kernels(), loop=BlockLoop(scan=True))  # One block is traced.
    images = jax.ShapeDtypeStruct((1, *image_size, channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    parts: defaultdict[str, float] = defaultdict(float)
    for eqn in jax.make_jaxpr(model.apply)(variables, images).jaxpr.eqns:
        _, part, *_ = *str(eqn.source_info.name_stack).split("/"), "", ""
        parts[part] += _flops_of(eqn)
    return {part: count for part, count in parts.items() if count}


def training_flops(model: ImageModel, image_size: tuple[int, int], *, channels: int = 3) -> float:
    """The operations of a training step for each image, see `flops`.

    Three times those of the way forwards: each product of matrices has two more backwards, one for
    either factor's gradient. What is computed a second time to save memory is not counted.
    """
    return 3 * flops(model, image_size, channels=channels)


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """The operations of the products of matrices and convolutions of a function.

    A loop counts as often as it runs, of branches the dearest one.

    Args:
      jaxpr: what `jax.make_jaxpr` gives.

    Raises ValueError for a loop of unknown length that holds products.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return float(sum(map(_flops_of, jaxpr.eqns)))


def _flops_of(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, (features, *_) = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec
        return 2 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[features]
    inner = [
        count_flops(x)
        for value in params.values()
        for x in (value if isinstance(value, tuple | list) else [value])
        if isinstance(x, ClosedJaxpr | Jaxpr)
    ]
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise ValueError("the operations of a loop of unknown length can't be counted")
    return sum(inner) * params.get("length", 1) if name == "scan" else sum(inner)
