"""By what a run computes attention: tried before anything is trained."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models.attention import cudnn_attention
from vit_jax.parallel import split


def choose_attention(
    config: ConfigDict, model: Any, image_size: tuple[int, int], mesh: Mesh
) -> tuple[str, str]:
    """What `config.attention` comes to on these devices.

    Args:
      model: the network. image_size: (h, w) of its pictures.

    Returns:
      one of ATTENTION, and a line for the user, empty if there is nothing to tell.

    Raises UserError if the configuration asks for "cudnn", and it doesn't work.
    """
    if config.attention == "xla" or (config.attention == "auto" and jax.default_backend() != "gpu"):
        return "xla", ""
    reason = _why_not_cudnn(model, image_size, mesh)
    if reason and config.attention == "cudnn":
        raise UserError(f"config.attention is cudnn, but {reason}: use auto or xla")
    return ("xla", f"attention by xla: {reason}") if reason else ("cudnn", "attention by cudnn")


def _why_not_cudnn(model: Any, image_size: tuple[int, int], mesh: Mesh) -> str:
    """Empty if it works."""
    if not hasattr(model, "attention"):
        return "this network has no attention"
    if jax.default_backend() != "gpu":
        return f"JAX sees no GPU here, but {jax.devices()[0].device_kind}"
    if model.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16, and config.dtype is {jnp.dtype(model.dtype).name}"
    if model.attention_dropout_rate:
        return f"config.model.attention_dropout_rate is {model.attention_dropout_rate}, not 0"
    rows, columns = model.grid_size(image_size)
    heads, width = model.num_heads, model.hidden_size // model.num_heads
    shape = (mesh.size, heads, rows * columns + model.has_class_token, width)

    def once() -> jax.Array:  # One picture a device, there and back.
        x = jax.lax.with_sharding_constraint(jnp.ones(shape, model.dtype), split(mesh))
        return jax.grad(lambda x: cudnn_attention(x, x, x).astype(jnp.float32).sum())(x)

    try:
        jax.block_until_ready(jax.jit(once, out_shardings=split(mesh))())
    except Exception as e:  # Of many kinds, by version, driver and GPU.
        return f"cuDNN says: {(str(e) or type(e).__name__).splitlines()[0]}"
    return ""
