"""Images to be explained, and maps drawn where on them the network's patches lie."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vit_jax import data
from vit_jax.data.ops import SAME_SIZE
from vit_jax.errors import UserError
from vit_jax.page import elide, new_figure, styled
from vit_jax.pretrained import Pretrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

SIDE = 400  # pixels on the longer side of an image that is drawn
TITLE_CHARS = 36  # that fit above an image

Images = np.ndarray | Sequence[str | os.PathLike | np.ndarray]
TitledMaps = Sequence[tuple[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class ImageView:
    """One image and what the network sees of it.

    Attributes:
      image: uint8 (h, w, c), as it is to be shown.
      pixels: float32 (h', w', c), as the network takes it.
      box: (top, left, height, width) in shares of the image's sides: where the patches lie.
    """

    image: np.ndarray
    pixels: np.ndarray
    box: tuple[float, float, float, float]

    @property
    def aspect(self) -> float:
        """Height by width that the image is given room for."""
        return min(max(self.image.shape[0] / self.image.shape[1], 0.3), 1.6)

    def thumbnail(self) -> "ImageView":
        """The same with the image no larger than it is drawn."""
        from vit_jax.data.images import shrink

        return replace(self, image=shrink(self.image, SIDE))


def views(vit: Pretrained, images: Images) -> Iterator[ImageView]:
    """Opens images one after the other, so that one is in memory at a time.

    Preprocessing may squeeze an image or crop it. It is shown whole and in its own aspect, with the
    grid put over the part that the network saw.

    Args:
      vit: see `vit_jax.load`.
      images: paths or uint8 arrays (h, w, c) of any size; or one float array (n, h, w, c) of
        preprocessed images, which are shown as they are, without the range of values.

    Raises UserError if an image can't be read, or has another shape than the network takes.
    """
    from vit_jax.data.images import visible

    preprocess = data.parse(vit.preprocess)
    if not len(images):
        raise UserError("there are no images to explain: give one at least")
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype.kind == "f":
        for pixels in images:
            image, box = preprocess.undo_range(pixels), _patches_box(vit, (0, 0, 1, 1))
            yield ImageView(image, pixels.astype(np.float32), box)
        return
    if isinstance(images, str | os.PathLike | np.ndarray):
        raise UserError(
            "expected a list of images, e.g. [image], or an array of preprocessed ones, "
            "float (n, h, w, c)"
        )
    for image in images:
        pixels = vit.read(image)
        box = _patches_box(vit, _kept_box(preprocess, pixels.shape))
        yield ImageView(visible(pixels), preprocess(pixels), box)


def _kept_box(preprocess: data.Preprocess, shape: tuple[int, ...]) -> tuple[float, ...]:
    """The box of what is left of an (h, w, c) image after preprocessing.

    The steps that move pixels are applied to an image whose values are the pixels' places.
    """
    places = np.moveaxis(np.mgrid[: shape[0], : shape[1]], 0, -1).astype(np.float32)
    rng = np.random.default_rng(0)
    for step in preprocess.steps:
        if step.size != SAME_SIZE:
            places = step.apply(places, rng)
    top, height = _span(places[:, 0, 0], shape[0])
    left, width = _span(places[0, :, 1], shape[1])
    return top, left, height, width


def _span(line: np.ndarray, full: int) -> tuple[float, float]:
    """(start, length), in shares of a side of `full` pixels, of pixels whose centres stand at
    `line`, which may be bent at its ends."""
    first, last = len(line) // 4, len(line) - 1 - len(line) // 4
    step = (line[last] - line[first]) / (last - first) if last > first else full
    return float(line[first] + 0.5 - (first + 0.5) * step) / full, float(len(line) * step) / full


def _patches_box(vit: Pretrained, box: Sequence[float]) -> tuple[float, float, float, float]:
    """The part of a box that patches cover: border pixels that fill none are cut off."""
    cells = np.array(vit.spec.grid_size) * vit.spec.stride
    # A hybrid's convolutions look beyond the border.
    height, width = np.minimum(box[2:] * np.minimum(cells / vit.image_size, 1), 1)
    return max(box[0], 0.0), max(box[1], 0.0), float(height), float(width)


def overlay(view: ImageView, values: np.ndarray | None = None) -> np.ndarray:
    """The image with a map over the part that the network saw; the rest is darker.

    Args:
      view: the image.
      values: (rows, columns) shown as heat from the minimum to the maximum; or (rows, columns, 3)
        in [0, 1], colours in place of the image; or None for the image alone.

    Returns uint8 (h, w, 3) in the image's own aspect, in a size to be looked at.
    """
    from matplotlib import colormaps

    from vit_jax.data.images import resize

    image = view.thumbnail().image
    image = image if image.shape[2] == 3 else image[..., :1].repeat(3, axis=2)
    times = max(SIDE // 2 // max(image.shape[:2]), 1)  # A tiny one is magnified as it is.
    image = image.repeat(times, axis=0).repeat(times, axis=1)
    if values is None:
        return image
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    result = 0.35 * grey
    (y, x, height, width), (h, w) = view.box, image.shape[:2]
    part = np.s_[round(y * h) : round((y + height) * h), round(x * w) : round((x + width) * w)]
    size = grey[part].shape[:2]
    if values.ndim == 3:
        result[part] = 255 * resize(values.astype(np.float32), size)
    else:
        low, high = values.min(), values.max()
        heat = (values - low) / max(high - low, 1e-3 * high, 1e-12)  # A flat map stays cold.
        heat = resize(heat.astype(np.float32)[..., None], size).clip(0, 1)
        colours = 255 * colormaps["inferno"](heat[..., 0])[..., :3]
        weight = 0.35 + 0.4 * heat
        result[part] = (1 - weight) * grey[part] + weight * colours
    return np.rint(result).clip(0, 255).astype(np.uint8)


def draw_image(ax: "Axes", view: ImageView, title: str, values: np.ndarray | None = None) -> None:
    """Draws `overlay`."""
    ax.imshow(overlay(view, values), interpolation="antialiased")
    ax.set_title(elide(title, TITLE_CHARS), loc="center", fontsize=8)


def empty_axes(part: "FigureBase", heights: Sequence[float], columns: int) -> np.ndarray:
    """(rows, columns) axes without lines and ticks, of such relative heights."""
    axes = part.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for ax in axes.ravel():
        ax.axis("off")
    return axes


@styled
def plot_maps(vit: Pretrained, images: Images, maps: Sequence[TitledMaps]) -> "Figure":
    """A row for each image: itself, then its titled maps over it, wrapped after six."""
    shown = list(zip(views(vit, images), maps, strict=True))
    panels = 1 + len(maps[0])
    columns = min(panels, 6)
    lines = math.ceil(panels / columns)
    ratios = [view.aspect for view, _ in shown]
    figure = new_figure(2.3 * columns, sum(lines * 2.3 * ratio + 0.3 for ratio in ratios))
    parts = figure.subfigures(len(shown), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for part, (view, titled) in zip(parts, shown, strict=True):
        axes = empty_axes(part, [1] * lines, columns).ravel()
        for ax, (title, values) in zip(axes, [("", None), *titled], strict=False):
            draw_image(ax, view, title, values)
    return figure
