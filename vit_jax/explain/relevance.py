"""Which patches speak for a class: gradient-weighted relevance (arXiv:2103.15679)."""

import difflib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoints.labels import find_classes, index_of
from vit_jax.errors import UserError
from vit_jax.explain.figures import Images, plot_maps, views
from vit_jax.explain.network import Tower, observe, on_grid, open_tower
from vit_jax.models import ImageModel
from vit_jax.pretrained import Pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def relevance(
    vit: Pretrained, images: Images, classes: Sequence[int | str] | None = None
) -> np.ndarray:
    """Which patches speak for a class, by the method of Chefer et al. (arXiv:2103.15679).

    In each block attention A is weighed by the gradient of the class's logit y and averaged over
    heads, A' = mean_h max(dy/dA * A, 0), and relevance R, at first I, grows by A' R. What a token
    gathered so, the rows of R - I, is made to sum to 1 and counts as much as the token itself. The
    head then reads: of a class token its row; of attention pooling all rows by its weights, times
    their gradient where that is positive; of the mean of the tokens x, which is attention with
    equal weights, all rows by max(dy/dx . x, 0), the class activation map of arXiv:1512.04150.

    Args:
      vit: see `vit_jax.load`.
      images: see `explain.figures.views`.
      classes: k classes by name or index; of LiT weights k texts, and y is the cosine of the
        angle between image and text. None for the most probable class of each image.

    Returns:
      float32 (n, k, rows, columns), at least 0; the scale has no meaning of its own.

    Raises UserError if the network gives no classes or has not these, or an image can't be used.
    """
    tower = open_tower(vit)
    if classes is None and vit.classifies_by_text:
        raise UserError("LiT weights classify by words: say which texts are to be explained")
    targets = class_targets(vit, classes) if classes is not None else None
    result = []
    for view in views(vit, images):
        best = targets or class_targets(vit, [int(observe(tower, view.pixels).answer.argmax())])
        result.append([relevance_map(vit, tower, view.pixels, target) for _, target in best])
    return np.array(result, np.float32)


def plot_relevance(
    vit: Pretrained, images: Images, classes: Sequence[int | str] | None = None
) -> "Figure":
    """`relevance` over each image, an overlay a class, each with its own scale."""
    maps = relevance(vit, images, classes)
    titles = ["for the most probable class"]
    if classes is not None:
        titles = [f"for {name}" for name, _ in class_targets(vit, classes)]
    return plot_maps(vit, images, [list(zip(titles, m, strict=True)) for m in maps])


def gives_classes(vit: Pretrained) -> bool:
    """Whether the network answers for an image as a whole, and of classes or of texts."""
    return vit.classifies_by_text or vit.spec.gives_classes


def class_targets(vit: Pretrained, classes: Sequence[int | str]) -> list[tuple[str, np.ndarray]]:
    """(name, target) of each class: what it is called in few words, a text itself, and what the
    network's answer is multiplied with to give its y, float32 (width,).

    Raises UserError if the network gives no classes, or not one of these.
    """
    if not gives_classes(vit):
        raise UserError("these weights give no classes to explain: load weights that have a head")
    if isinstance(classes, str) or not len(classes):
        raise UserError(f"classes are {classes!r}, expected a list of names or indices")
    if vit.classifies_by_text:
        texts = [str(text) for text in classes]
        return list(zip(texts, vit.embed_texts(texts), strict=True))
    assert vit.spec.num_classes is not None  # It gives classes.
    indices, places = [class_index(vit, c) for c in classes], np.arange(vit.spec.num_classes)
    return [(first_name(vit.label(i)), (places == i).astype(np.float32)) for i in indices]


def class_index(vit: Pretrained, name: int | str) -> int:
    """The index of a class given as such or by its name, see `find_classes` and `index_of`.

    Raises UserError if there is none, or more than one.
    """
    labels, count = vit.labels or (), vit.spec.num_classes
    assert count is not None  # See `gives_classes`.
    named = () if isinstance(name, int | np.integer) else labels
    found = find_classes(named, [str(name)])[0]
    if not found and (index := index_of(str(name), named, count)) is not None:
        return index
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"several classes are called {name!r}: give one of the indices {found}")
    words = {word for label in labels for word in (label, *label.split(", "))}
    near = difflib.get_close_matches(str(name), sorted(words), n=1)
    or_index = index_of("0", named, count) is not None and f" or an index, 0 to {count - 1}"
    hint = f"did you mean {near[0]!r}?" if near else f"give a name{or_index or ''}"
    raise UserError(f"the weights know no class {name!r}: {hint}")


def first_name(label: str) -> str:
    """The first of a label's names: "tench" of "tench, Tinca tinca"."""
    return label.split(", ")[0]


def relevance_map(
    vit: Pretrained, tower: Tower, pixels: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """float32 (rows, columns): relevance of one image for one of `class_targets`."""
    unit = vit.classifies_by_text
    return on_grid(tower, np.asarray(_relevance(tower.model, unit, tower.params, pixels, target)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _relevance(
    model: ImageModel, unit: bool, params: Any, pixels: jax.Array, target: jax.Array
) -> jax.Array:
    """(t,) relevance of the tokens for y = answer . target, with `unit` the answer of length 1."""
    run = functools.partial(model.apply, return_features=True)
    (_, features), shapes = jax.eval_shape(
        functools.partial(run, mutable=["perturbations"]), {"params": params}, pixels[None]
    )
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (shapes["perturbations"], features[model.final_norm])
    )

    def y(changes: Any) -> tuple[jax.Array, Any]:
        perturbations, shift = changes

        def shifted(call, args, kwargs, context):
            out = call(*args, **kwargs)
            return out + shift if context.module.name == model.final_norm else out

        with nn.intercept_methods(shifted):
            (answer, features), state = run(
                {"params": params, "perturbations": perturbations},
                pixels[None],
                mutable=["intermediates"],
            )
        if unit:
            answer = answer / jnp.linalg.norm(answer)
        weights = model.attention_weights(state["intermediates"])
        return answer[0] @ target, (*weights, features[model.final_norm])

    (perturbed, slope), (attention, pooling, tokens) = jax.grad(y, has_aux=True)(zeros)
    attention_slope, pooling_slope = model.attention_weights(perturbed)
    cam = jnp.maximum(attention_slope * attention, 0).astype(jnp.float32).mean(axis=1)
    relevant = identity = jnp.eye(cam.shape[-1])
    for block in cam:
        relevant = relevant + block @ relevant
    gathered = relevant - identity
    gathered = gathered / jnp.maximum(gathered.sum(axis=-1, keepdims=True), 1e-30)
    if model.has_class_token:
        return gathered[0]
    if pooling is not None:
        read = jnp.maximum(pooling_slope * pooling, 0).astype(jnp.float32).mean(axis=0)
    else:
        read = jnp.maximum((slope * tokens)[0].astype(jnp.float32).sum(axis=-1), 0)
    return read @ (identity + gathered)
