"""The class names of the published heads: 1,000 classes are ImageNet's, 21,843 ImageNet-21k's."""

import logging
from importlib import resources

from vit_jax.checkpoints import hub
from vit_jax.errors import UserError

# The names that the original prints, one a line. Downloaded, for they are many.
IMAGENET21K = f"{hub.STORE}/bit_models/imagenet21k_wordnet_lemmas.txt"

_log = logging.getLogger(__name__)


def class_names(num_classes: int | None) -> tuple[str, ...] | None:
    """The names of a published head's classes, in the order of its outputs.

    Those of ImageNet come with the package. Those of ImageNet-21k are downloaded once; where that
    fails the log says so, and there are no names, which is no reason not to use the weights.

    Args:
      num_classes: the width of the head, or None.

    Returns:
      one name a class, all words of its WordNet synset: "tench, Tinca tinca"; or None for other
      heads.
    """
    if num_classes == 1_000:
        file = resources.files("vit_jax.checkpoints") / "imagenet_labels.txt"
        return _lines(file.read_text("utf-8"))
    if num_classes != 21_843:
        return None
    try:
        # One quick try: whoever loads a local file may not even have a network.
        path = hub.fetch(IMAGENET21K, attempts=1, timeout=5)
        names = _lines(path.read_text("utf-8"))
    except (UserError, OSError, UnicodeDecodeError) as e:
        _log.warning("the classes of ImageNet-21k go without names: %s", e)
        return None
    if len(names) != num_classes:
        _log.warning(
            "the classes of ImageNet-21k go without names: %s has %d lines, expected %d; "
            "remove it, and it is fetched again",
            *(path, len(names), num_classes),
        )
        return None
    return names


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip().replace("_", " ") for line in text.splitlines())
