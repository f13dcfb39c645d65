"""A page of images: what the preprocessing makes of them."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.data.preprocess import Preprocess
from vit_jax.data.sources import Source
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mix = Callable[[np.ndarray, int], tuple[np.ndarray, float]]

TITLE_CHARS = 24  # what fits above an image
TINY = 96  # images of fewer pixels a side are magnified as they are, without smoothing


def draw_page(
    path: str | os.PathLike,
    source: Source,
    preprocess: Preprocess,
    *,
    count: int = 6,
    draws: int = 5,
    seed: int = 0,
    mix: Mix | None = None,
) -> None:
    """Draws a PNG with a row for each of some images: as it is, then preprocessed again and
    again.

    Args:
      path: the file to write; its folder is made if it isn't there.
      source: of which `count` images are chosen at random.
      preprocess: what is done to them; the range of values is undone.
      draws: how often each is preprocessed; once, if nothing is random.
      seed: decides the choice and everything random.
      mix: (float32 (count, h, w, c), draw) -> those images mixed, each with the one before, and
        the share in [0, 1] that is its own.

    Raises:
      UserError: an image can't be read or preprocessed, or the file not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(count, len(source))
    draws = draws if preprocess.random or mix else 1
    chosen = np.sort(np.random.default_rng(seed).choice(len(source), count, replace=False))
    examples = [source[int(i)] for i in chosen]
    labels = [
        ", ".join(source.labels[i] for i in np.flatnonzero(e["label"])) or "no label"
        if source.multi_label
        else source.labels[e["label"]]
        for e in examples
    ]

    figure = Figure(figsize=(2.3 * (1 + draws), 2.5 * count + 0.6), dpi=100, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, 1 + draws, squeeze=False)
    for row, example, label in zip(axes, examples, labels, strict=True):
        height, width, _ = example["image"].shape
        _draw(row[0], example["image"], f"{_short(label)}\n{height} x {width}")
    for draw in range(draws):
        rngs = [np.random.default_rng((seed, draw, row)) for row in range(count)]
        images = [preprocess(e["image"], rng) for e, rng in zip(examples, rngs, strict=True)]
        titles = [""] * count
        if mix:
            mixed, share = mix(np.stack(images), draw)
            images = list(mixed)
            if share < 0.995:
                titles = [
                    f"{share:.2f} {_short(own)}\n+ {1 - share:.2f} {_short(labels[row - 1])}"
                    for row, own in enumerate(labels)
                ]
        for ax, image, title in zip(axes[:, 1 + draw], images, titles, strict=True):
            _draw(ax, preprocess.undo_range(image), title)
    figure.suptitle(f"{preprocess.spec}{', mixed' if mix else ''}", fontsize=10, parse_math=False)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Names in scripts that the font lacks are drawn as boxes: a warning says no more.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): choose another place"
        ) from None


def _draw(ax: "Axes", image: np.ndarray, title: str) -> None:
    from vit_jax.data.images import shrink

    pixels = shrink(image, 512)  # matplotlib makes floats of all that it gets
    pixels = pixels[..., 0] if image.shape[2] == 1 else pixels
    smooth = "nearest" if max(image.shape[:2]) < TINY else "antialiased"
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=smooth)
    ax.set_title(title, fontsize=8, parse_math=False)
    ax.set(xticks=[], yticks=[])


def _short(label: str) -> str:
    label = " ".join(label.split())
    return label if len(label) <= TITLE_CHARS else f"{label[: TITLE_CHARS - 1]}…"
