"""What a run starts from: a network and its first weights, from scratch or from a file."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models import POOLED, Spec, create_model, family_of, variant
from vit_jax.models.family import weightless_fields
from vit_jax.models.stack import BlockLoop, stack_blocks
from vit_jax.pretrained import Pretrained, load
from vit_jax.training.config import given_heads, weights_source


def make_network(
    config: ConfigDict,
    *,
    image_shape: tuple[int, int, int],
    labels: tuple[str, ...],
    preprocess: str,
) -> Pretrained:
    """The network that a configuration trains, with its first weights.

    Args:
      config: see `default_config`.
      image_shape: (h, w, channels) of a preprocessed image.
      labels: names of the classes.
      preprocess: how evaluation makes images ready, to be noted with the weights.

    Raises UserError if there is no such model or file, it doesn't fit the images, or what the run
    leaves at its end couldn't be loaded.
    """
    height, width, channels = image_shape
    name, fields = _name_and_fields(config)
    path = weights_source(config)
    if path is None:
        if not name:
            raise UserError(
                "nothing to start from: give --weights (config.model_or_filename) a file or a "
                "name such as augreg/Ti_16, or, to train from scratch, config.model.name a model"
            )
        model = named_model(config, len(labels))
        # One device may have no room for the whole of a network.
        with jax.default_device(_cpu()):
            images = jnp.zeros((1, *image_shape))
            params = jax.jit(model.init)(jax.random.key(config.seed), images)["params"]
            params = jax.tree.map(np.asarray, jax.device_get(params))
        architecture = type(model)(**model.architecture())
        spec = Spec(architecture, (height, width), channels)
        vit = Pretrained(model, params, spec, labels, preprocess, loss=config.loss)
        vit.to_notes()
        return vit
    weightless = weightless_fields()
    vit = load(
        path,
        num_classes=len(labels),
        image_size=(height, width),
        channels=channels,
        heads=given_heads(config),
        window=fields.get("window"),
        **{k: v for k, v in fields.items() if k in weightless and v},
    )
    stored = vit.spec.architecture()
    for field, value in ((variant(name) if name else {}) | fields).items():
        found = stored.get(field, "no such field")  # A Mixer has no heads.
        if field in weightless or found == value:
            continue
        if field in fields:
            wish = f"config.model.{field} is {value}, but the weights in {path} have {found}"
        else:
            wish = (
                f"config.model.name is {name}, but the weights in {path} are "
                f"{vit.spec.description} ({field} {found}, not {value})"
            )
        raise UserError(f"{wish}: leave it out, or start from other weights")
    vit = dataclasses.replace(vit, labels=labels, preprocess=preprocess, loss=config.loss)
    vit.to_notes()
    return vit


def named_model(config: ConfigDict, num_classes: int) -> Any:
    """The network of the name that a configuration gives, whatever weights it starts from.

    Raises UserError if it isn't one for classes.
    """
    name, fields = _name_and_fields(config)
    known = family_of(name).weightless
    # A rate of zero is no wish: a Mixer has no dropout, and needs none.
    fields = {k: v for k, v in fields.items() if v or k in known or k not in weightless_fields()}
    model = create_model(name, num_classes=num_classes, **fields)
    if not model.gives_classes:
        raise UserError(
            f"config.model.classifier {model.classifier!r} gives no classes: use "
            f"{', '.join(POOLED)}"
        )
    return model


def as_trained(config: ConfigDict, model: Any, params: Any) -> tuple[Any, Any]:
    """A network and its weights in the form in which they are trained.

    `unstack_blocks` gives the weights their official names back.
    """
    loop = BlockLoop(config.scan_layers, config.remat)
    return model.clone(loop=loop), stack_blocks(params) if loop.scan else params


def _name_and_fields(config: ConfigDict) -> tuple[str, dict[str, Any]]:
    """A model's name, and its fields that are to differ."""
    fields = dict(config.model) | {"dtype": jnp.dtype(config.dtype)}
    return fields.pop("name"), fields


def _cpu() -> jax.Device | None:
    """The processor; None if it is hidden from JAX."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
