"""All that one page says of an image, computed at once."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from vit_jax.explain.attention import head_maps, rollout_map
from vit_jax.explain.images import View, small, views
from vit_jax.explain.network import observe, on_grid, open_tower
from vit_jax.explain.relevance import class_name, class_vectors, gives_classes, relevance_map
from vit_jax.explain.viewer import MAX_BYTES, Levels, levels
from vit_jax.pretrained import Pretrained

TitledMaps = list[tuple[str, np.ndarray]]  # Maps are float32 (rows, columns).


class Explanation(NamedTuple):
    """Why the network said what it said of an image, in no more bytes than a page needs.

    Attributes:
      name: the file's.
      view: the image, no larger than it is drawn.
      attention: of as many blocks and heads as a page of all the images has room for.
      classes: (label, probability), the most probable first; empty if the network gives none.
      rollout: see `explain.rollout`, (rows, columns).
      relevance: see `explain.relevance`, of the two most probable classes or those asked for.
      heads: what the token that the head reads attends to in each head of the last block, then
        where those of attention pooling look.
    """

    name: str
    view: View
    attention: Levels
    classes: list[tuple[str, float]]
    rollout: np.ndarray
    relevance: TitledMaps
    heads: TitledMaps


def explanations(
    vit: Pretrained,
    images: Sequence[str | os.PathLike],
    classes: Sequence[int | str] | None = None,
    *,
    top: int = 5,
) -> Iterator[Explanation]:
    """Explains image files one after the other.

    Args:
      vit: see `vit_jax.load`.
      images: paths.
      classes: whose relevance is wanted, see `explain.relevance`; by default the two most probable
        ones. LiT weights know no classes but these texts.
      top: how many classes to name.

    Raises UserError if the network has no attention or not these classes, or an image can't be
    read.
    """
    tower = open_tower(vit)
    last = tower.spec.num_layers
    for name, view in zip(images, views(vit, images), strict=True):
        seen = observe(tower, view.pixels)
        ranked = _ranked(vit, seen.answer, classes)
        shown = classes or [c for c, _ in ranked[:2]]
        targets = class_vectors(vit, shown) if shown else ()
        heads = [(f"block {last}, head {i + 1}", m) for i, m in enumerate(head_maps(tower, seen))]
        if seen.pooling is not None:
            pooled = on_grid(tower, seen.pooling)
            heads += [(f"pooling, head {i + 1}", m) for i, m in enumerate(pooled)]
        yield Explanation(
            os.fsencode(name).decode(errors="backslashreplace"),  # It need not be text.
            small(view),
            levels(seen.attention, MAX_BYTES // len(images)),
            [(vit.label(c) if isinstance(c, int) else c, p) for c, p in ranked[:top]],
            rollout_map(tower, seen),
            [
                (class_name(vit, c), relevance_map(vit, tower, view.pixels, target))
                for c, target in zip(shown, targets, strict=True)
            ],
            heads,
        )


def _ranked(
    vit: Pretrained, answer: np.ndarray, texts: Sequence[int | str] | None
) -> list[tuple[int | str, float]]:
    """(class, probability), best first: indices, or of LiT weights the texts."""
    names: Sequence[int | str] = range(len(answer))
    if vit.classifies_by_text:
        if not texts:
            return []
        names = [str(text) for text in texts]
        cosine = class_vectors(vit, names) @ (answer / np.linalg.norm(answer))
        answer = np.exp(np.asarray(vit.params["t"])) * cosine
    elif not gives_classes(vit):
        return []
    probability = scipy.special.softmax(answer)
    return [(names[i], float(probability[i])) for i in np.argsort(-probability, kind="stable")]
