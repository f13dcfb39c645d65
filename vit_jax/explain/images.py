"""Images to be explained, and where on them the network's patches lie."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vit_jax import data
from vit_jax.data.ops import SAME_SIZE
from vit_jax.errors import UserError
from vit_jax.pretrained import Pretrained

SIDE = 400  # pixels on the longer side of an image that is drawn

Images = np.ndarray | Sequence[str | os.PathLike | np.ndarray]


@dataclass(frozen=True, eq=False)
class View:
    """One image and what the network sees of it.

    Attributes:
      image: uint8 (h, w, c), as it is to be shown.
      pixels: float32 (h', w', c), as the network takes it.
      box: (top, left, height, width) in pixels of `image`: where the grid of patches lies.
    """

    image: np.ndarray
    pixels: np.ndarray
    box: tuple[float, float, float, float]


def views(vit: Pretrained, images: Images) -> Iterator[View]:
    """Opens images one after the other, so that one is in memory at a time.

    Preprocessing may squeeze an image or cut it. It is shown whole and in its own aspect, with the
    grid put over the part that the network saw.

    Args:
      vit: see `vit_jax.load`.
      images: paths or uint8 arrays (h, w, c) of any size; or one float array (n, h, w, c) of
        preprocessed images, which are shown as they are, without the range of values.

    Raises UserError if an image can't be read, or has another shape than the network takes.
    """
    preprocess = data.parse(vit.preprocess)
    if not len(images):
        raise UserError("there are no images to explain: give one at least")
    if isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype.kind == "f":
        for pixels in images:
            image = preprocess.undo_range(pixels)
            yield View(image, pixels.astype(np.float32), _grid_box(vit, (0, 0, *image.shape[:2])))
        return
    if isinstance(images, str | os.PathLike | np.ndarray):
        raise UserError(
            "expected a list of images, e.g. [image], or an array of preprocessed ones, "
            "float (n, h, w, c)"
        )
    for image in images:
        pixels = vit.read(image)
        yield View(pixels, preprocess(pixels), _grid_box(vit, _kept(preprocess, pixels.shape)))


def small(view: View) -> View:
    """The same with the image no larger than it is drawn."""
    from vit_jax.data.images import shrink

    image = shrink(view.image, SIDE)
    scale = np.tile(np.divide(image.shape[:2], view.image.shape[:2]), 2)
    return replace(view, image=image, box=tuple((scale * view.box).tolist()))


def _kept(preprocess: data.Preprocess, shape: tuple[int, ...]) -> tuple[float, ...]:
    """(top, left, height, width) of the part of an (h, w, c) image that is in the result.

    The steps that move pixels are let loose on an image whose values are the pixels' places.
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
    """(start, length) of pixels whose centres stand at `line`, which may be bent at its ends."""
    first, last = len(line) // 4, len(line) - 1 - len(line) // 4
    step = (line[last] - line[first]) / (last - first) if last > first else full
    return float(line[first] + 0.5 - (first + 0.5) * step), float(len(line) * step)


def _grid_box(vit: Pretrained, box: Sequence[float]) -> tuple[float, float, float, float]:
    """The part of the box that patches cover: border pixels that fill none are cut off."""
    spec = getattr(vit.spec, "image", vit.spec)
    model = spec.model()
    cells = np.array(model.grid_size(spec.image_size)) * model.stride
    # A hybrid's convolutions look beyond the border.
    height, width = box[2:] * np.minimum(cells / spec.image_size, 1)
    return box[0], box[1], float(height), float(width)
