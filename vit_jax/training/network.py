"""What a run starts from: a network and its first weights, from scratch or from a file."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vit_jax.checkpoints import ENDINGS, read_spec
from vit_jax.errors import UserError
from vit_jax.models import POOLED, create_model, model_class, variant
from vit_jax.pretrained import WEIGHTLESS, Pretrained, load


def make_network(
    config: ConfigDict,
    *,
    picture_shape: tuple[int, int, int],
    labels: tuple[str, ...],
    preprocess: str,
) -> Pretrained:
    """The network that a configuration trains, with its first weights.

    Args:
      config: see `default_config`.
      picture_shape: (h, w, channels) of a preprocessed picture.
      labels: names of the classes.
      preprocess: how evaluation makes pictures ready, to be noted with the weights.

    Raises UserError if there is no such model or file, or it doesn't fit the pictures.
    """
    height, width, channels = picture_shape
    fields = dict(config.model) | {"dtype": jnp.dtype(config.dtype)}
    name = fields.pop("name")
    path = weights_path(config)
    if path is None:
        return _from_scratch(name, fields, config.seed, picture_shape, labels, preprocess)
    vit = load(
        path,
        num_classes=len(labels),
        image_size=(height, width),
        **{k: v for k, v in fields.items() if k in WEIGHTLESS and v},
    )
    for field in fields.keys() - set(WEIGHTLESS):
        stored = getattr(vit.model, field, "no such field")  # A Mixer has no heads.
        if stored != fields[field]:
            raise UserError(
                f"config.model.{field} is {fields[field]}, but the weights in {path} have "
                f"{stored}: leave it out"
            )
    if vit.spec.channels != channels:
        operation = "rgb" if vit.spec.channels == 3 else "gray"
        raise UserError(
            f"the weights in {path} take pictures of {vit.spec.channels} channels, these have "
            f"{channels}: add {operation} to config.pp.train_ops and config.pp.eval_ops"
        )
    return dataclasses.replace(vit, labels=labels, preprocess=preprocess)


def _from_scratch(
    name: str,
    fields: dict[str, Any],
    seed: int,
    picture_shape: tuple[int, int, int],
    labels: tuple[str, ...],
    preprocess: str,
) -> Pretrained:
    known = {f.name for f in dataclasses.fields(model_class(variant(name)))}
    # A rate of zero is no wish: a Mixer has no dropout, and needs none.
    fields = {k: v for k, v in fields.items() if v or k in known or k not in WEIGHTLESS}
    model = create_model(name, num_classes=len(labels), **fields)
    classifier = getattr(model, "classifier", None)
    if classifier is not None and classifier not in POOLED:
        raise UserError(
            f"config.model.classifier {classifier!r} gives no classes: use {', '.join(POOLED)}"
        )
    images = jnp.zeros((1, *picture_shape))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed), images)["params"])
    spec = read_spec(
        flatten_dict(params, sep="/"), classifier=classifier, image_size=picture_shape[:2]
    )
    params = jax.tree.map(np.asarray, params)
    return Pretrained(model=model, params=params, spec=spec, labels=labels, preprocess=preprocess)


def weights_path(config: ConfigDict) -> str | Path | None:
    """The weights that a configuration starts from, for `load`; None to start from scratch.

    Raises UserError if there are none.
    """
    folder = Path(config.pretrained_dir or ".")
    if not config.model_or_filename:
        if not config.pretrained_dir:
            return None
        candidates = [folder / f"{config.model.name}.npz"]
    else:
        name = config.model_or_filename
        candidates = [Path(name), folder / name, folder / f"{name}.npz"]
    for path in candidates:
        if path.exists():
            return path
    name = config.model_or_filename
    if name and ("/" in name or not name.endswith(ENDINGS)):
        return name  # Published, perhaps: `load` knows.
    raise UserError(
        f"no weights at {' or '.join(dict.fromkeys(map(str, candidates)))}: give "
        "config.model_or_filename the path of a file, or the name of published weights"
    )
