"""Weights for another task: another head, another size of image."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from vit_jax.checkpoints.architecture import POSITIONS
from vit_jax.checkpoints.positions import resample
from vit_jax.checkpoints.spec import AnySpec, LiTSpec, MixerSpec, Spec
from vit_jax.errors import UserError

Arrays = dict[str, np.ndarray]

_ImageSpec = TypeVar("_ImageSpec", bound=Spec | MixerSpec)


def adapt(
    arrays: Mapping[str, np.ndarray],
    spec: AnySpec,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    pre_logits: bool | None = None,
) -> tuple[Arrays, AnySpec]:
    """Changes weights for another task, as the official fine-tuning does.

    Args:
      arrays, spec: what `load_weights` gave.
      num_classes: None keeps the head; a number puts a new head of zeros in its place.
      image_size: (height, width); None keeps the grid, else the position embeddings are resampled.
      pre_logits: None keeps the tanh layer with a kept head and drops it with a new one; True keeps
        it, False drops it.

    Returns:
      (arrays, spec) of the changed network. Arrays that didn't change are shared with the input.

    Raises UserError if there is no layer to keep, the kept head doesn't fit without it, or the
    network can't change so: a Mixer its number of tokens, a LiT its head.
    """
    arrays = dict(arrays)
    if isinstance(spec, LiTSpec):
        if num_classes is not None or pre_logits is not None:
            raise UserError(
                "these weights are a LiT bundle, which has no classes: leave num_classes and "
                "pre_logits out, and classify by words (zero-shot)"
            )
        if image_size is None:
            return arrays, spec
        arrays, image = _resize(arrays, spec.image, image_size, prefix="img/")
        return arrays, dataclasses.replace(spec, image=image)
    if isinstance(spec, Spec):
        arrays, spec = _without_pre_logits(arrays, spec, num_classes, pre_logits)
    elif pre_logits:
        raise UserError("pre_logits=True, but a Mixer has no pre_logits layer: leave it out")
    if num_classes is not None:
        arrays, spec = _new_head(arrays, spec, num_classes)
    if isinstance(spec, MixerSpec):
        return arrays, _check_mixer_size(spec, image_size)
    return (arrays, spec) if image_size is None else _resize(arrays, spec, image_size)


def _without_pre_logits(
    arrays: Arrays, spec: Spec, num_classes: int | None, pre_logits: bool | None
) -> tuple[Arrays, Spec]:
    keep = (num_classes is None) if pre_logits is None else pre_logits
    if pre_logits and spec.representation_size is None:
        raise UserError("pre_logits=True, but the weights have no pre_logits layer: leave it out")
    if keep or spec.representation_size is None:
        return arrays, spec
    if num_classes is None and spec.num_classes and spec.representation_size != spec.hidden_size:
        raise UserError(
            f"the head takes {spec.representation_size} features and does not fit without "
            f"pre_logits, which leaves {spec.hidden_size}: pass num_classes for a new head"
        )
    del arrays["pre_logits/kernel"], arrays["pre_logits/bias"]
    return arrays, dataclasses.replace(spec, representation_size=None)


def _new_head(arrays: Arrays, spec: _ImageSpec, num_classes: int) -> tuple[Arrays, _ImageSpec]:
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}, expected at least 1")
    features = spec.representation_size or spec.hidden_size
    arrays["head/kernel"] = np.zeros((features, num_classes), np.float32)
    arrays["head/bias"] = np.zeros((num_classes,), np.float32)
    return arrays, dataclasses.replace(spec, num_classes=num_classes)


def _resize(
    arrays: Arrays, spec: Spec, image_size: tuple[int, int], prefix: str = ""
) -> tuple[Arrays, Spec]:
    new = dataclasses.replace(spec, image_size=image_size)
    if spec.position_embedding == "learned":
        key = prefix + POSITIONS
        arrays[key] = resample(
            arrays[key],
            spec.grid_size,
            new.grid_size,
            class_token=spec.model().has_class_token,
        )
    return arrays, new


def _check_mixer_size(spec: MixerSpec, image_size: tuple[int, int] | None) -> MixerSpec:
    if image_size is None:
        return spec
    new = dataclasses.replace(spec, image_size=image_size)
    if new.grid_size != spec.grid_size:
        raise UserError(
            "this Mixer has {} tokens, for images of {}x{} pixels, and can't take {}x{}: the "
            "number of tokens of a Mixer is fixed; keep its size, or choose a ViT".format(
                spec.num_tokens, *spec.image_size, *image_size
            )
        )
    return new
