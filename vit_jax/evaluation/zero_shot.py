"""Zero-shot classification: the class whose name lies nearest to the image.

See LiT (arXiv:2111.07991); the prompts are those of CLIP (arXiv:2103.00020, section 3.1.4).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import data
from vit_jax.checkpoints.labels import ranked
from vit_jax.errors import UserError
from vit_jax.evaluation.images import score
from vit_jax.evaluation.metrics import Scores
from vit_jax.pretrained import Image, Pretrained

TEMPLATES = ("a photo of a {}.",)


def class_embeddings(
    embed_texts: Callable[[Sequence[str]], np.ndarray],
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> np.ndarray:
    """The embedding of each class: the mean over the prompts with its name.

    Args:
      embed_texts: texts -> (n, d).
      labels: names of the classes.
      templates: prompts with {} in place of the name. Each prompt's embedding counts the same,
        whatever its length.

    Returns:
      float32 (classes, d) of length 1.

    Raises UserError if there is no class, no template, or a template without {}.
    """
    if isinstance(labels, str) or not len(labels):
        raise UserError(f"labels are {labels!r}, expected a list of names of classes")
    if isinstance(templates, str) or not len(templates):
        raise UserError(f"templates are {templates!r}, expected a list of texts with {{}} in them")
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"template {template!r} has no place for the class: write {{}} where its name goes"
            )

    def normalized(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    total = np.zeros(1)
    # One template at a time: a thousand classes in eighty prompts needn't be in memory at once.
    for template in templates:
        prompts = [template.replace("{}", label) for label in labels]
        total = total + normalized(np.asarray(embed_texts(prompts), np.float64))
    return normalized(total).astype(np.float32)


def zero_shot(
    vit: Pretrained,
    source: data.Source,
    labels: Sequence[str] | None = None,
    *,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 64,
    corrupt: str = "error",
) -> Scores:
    """Scores of two towers on labelled images that they were never trained to classify.

    Args:
      vit: LiT weights, see `vit_jax.load`.
      source: see `data.open_source`.
      labels: what to call the classes of the source, in its order; None for the source's own
        names, with "_" read as a space.
      templates: see `class_embeddings`.
      batch_size: images at once, over all devices; rounded up to a multiple of their number.
      corrupt: "error" stops at an image that can't be read, "skip" warns and leaves it out.

    Returns:
      Scores; its loss is the cross-entropy of softmax(t * text . image).

    Raises UserError if the names don't fit the source.
    """
    if source.multi_label:
        raise UserError(
            f"images of {source.name} may have several labels, expected one: zero-shot "
            "descriptions are compared with each other"
        )
    if labels is None:
        labels = [label.replace("_", " ") for label in source.labels]
    if len(labels) != len(source.labels):
        raise UserError(
            f"{len(labels)} labels were given for the {len(source.labels)} classes of "
            f"{source.name}: give one for each, in the order {', '.join(source.labels[:10])}"
            + (", ..." if len(source.labels) > 10 else "")
        )
    model, params = text_classifier(vit, labels, templates)
    return score(
        model,
        params,
        source,
        f"rgb|{vit.preprocess}",  # The towers know colours only.
        np.arange(len(labels), dtype=np.int32),
        len(labels),
        batch_size=batch_size,
        corrupt=corrupt,
    )


def text_classifier(
    vit: Pretrained, labels: Sequence[str], templates: Sequence[str]
) -> tuple["TextClassifier", dict[str, Any]]:
    """(model, params) for all devices, whose logits are of the classes; see `class_embeddings`."""
    classes = class_embeddings(vit.embed_texts, labels, templates)
    params = {"img": vit.params["img"], "t": vit.params["t"], "classes": classes}
    return TextClassifier(vit.model_on(jax.devices())), params


class TextClassifier:
    """An image tower whose head is the embeddings of the classes; it is applied as a module is."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def apply(self, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Logits, float32 (n, classes)."""
        params = dict(variables["params"])
        classes = params.pop("classes")
        embedded: Any = self._model.apply({"params": params}, images=images)
        zimg, _, out = embedded
        # Some accelerators round what they multiply to 8 bits, and t magnifies the error.
        return out["t"] * jnp.dot(zimg, classes.T, precision="highest")


def classify(
    vit: Pretrained,
    images: Iterable[Image],
    labels: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    top: int = 5,
) -> list[list[tuple[str, float]]]:
    """Says which of the descriptions fits an image best.

    Args:
      vit: LiT weights, see `vit_jax.load`.
      images: any number of images as `Pretrained.read` takes them, of any size.
      labels: descriptions, e.g. "a cat"; or names of classes, with `templates` to go around them.
      templates: see `class_embeddings`; by default the labels stand for themselves.
      top: how many labels to name.

    Returns:
      for each image the `top` most probable (label, probability), best first.

    Raises UserError if an image can't be read.
    """
    classes = class_embeddings(vit.embed_texts, labels, templates)
    temperature = np.exp(np.asarray(vit.params["t"]))
    answers: list[list[tuple[str, float]]] = []
    for batch in vit.prepared(images):
        logits = temperature * vit.embed_images(batch) @ classes.T
        answers += [ranked(row, labels, top) for row in logits]
    return answers
