"""Preprocessing as a short text: "inception_crop(224)|flip|value_range(-1, 1)".

The text is what a configuration holds, what is recorded beside trained weights, and what makes new
pictures look like the training ones. It is parsed strictly and never evaluated as code.

To add an operation, write a function below with `@_op`: its parameters are the operation's, its
annotations say what they may be, and it returns a `Step`.
"""

import ast
import difflib
import inspect
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vit_jax.data import pictures
from vit_jax.errors import UserError

Size = tuple[int, int]  # (height, width); written 224 or (224, 192)
MAX_PIXELS = 16384  # a longer side is a slip of the keyboard
MAX_LENGTH = 1000  # of a specification, in characters

_KEPT: Size = (-1, -1)


@dataclass(frozen=True)
class Step:
    """One operation, ready to run.

    Attributes:
      apply: (image (h, w, c), rng) -> image, float32 or still uint8.
      size: (h, w) of its result; None if that depends on the picture; by default that of its input.
      random: whether it draws from `rng`.
    """

    apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    size: Size | None = _KEPT
    random: bool = False


@dataclass(frozen=True)
class Preprocess:
    """A parsed specification. Equal if their specifications are; safe to share by threads.

    Attributes:
      spec: the specification in its one canonical spelling.
      steps: its operations.
    """

    spec: str
    steps: tuple[Step, ...] = field(compare=False, repr=False)

    @property
    def random(self) -> bool:
        """Whether two calls may differ; then `rng` is needed."""
        return any(step.random for step in self.steps)

    @property
    def output_size(self) -> Size | None:
        """(h, w) of every result, or None if it depends on the picture."""
        size = None
        for step in self.steps:
            size = size if step.size == _KEPT else step.size
        return size

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Applies the operations from left to right.

        Args:
          image: uint8 (h, w, c), c 1 or 3.
          rng: the only source of randomness.

        Returns:
          float32 array (h', w', c').

        Raises:
          UserError: an operation can't be applied to this picture.
        """
        if rng is None:
            if self.random:
                raise TypeError(f"{self.spec!r} is random: pass a numpy.random.Generator")
            rng = np.random.default_rng(0)
        for step in self.steps:
            image = step.apply(image, rng)
        return np.ascontiguousarray(image, np.float32)


def parse(spec: str, *, train: bool = True) -> Preprocess:
    """Parses a specification: operations joined by "|", applied from left to right.

    Args:
      spec: e.g. "resize_small(256)|central_crop(224)|value_range(-1, 1)".
      train: False refuses random operations, which have no place in an evaluation.

    Raises:
      UserError: says which operation is wrong, at which position, and what was expected.
    """
    if len(spec) > MAX_LENGTH:
        raise UserError(
            f"preprocessing {_short(spec)} has {len(spec)} characters, expected at most "
            f"{MAX_LENGTH}; shorten it"
        )
    steps, texts, position = [], [], 1
    for part in spec.split("|"):
        start = position + len(part) - len(part.lstrip())
        where = f"in {_short(spec)} at position {start}"
        step, text = _parse_op(part.strip(), where)
        if step.random and not train:
            raise UserError(
                f"{text} {where} is random, expected operations that always give the "
                "same result; remove it from the evaluation's preprocessing"
            )
        steps.append(step)
        texts.append(text)
        position += len(part) + 1
    return Preprocess("|".join(texts), tuple(steps))


# The operations.

_OPS: dict[str, Callable[..., Step]] = {}


def _op(function: Callable[..., Step]) -> Callable[..., Step]:
    _OPS[function.__name__] = function
    return function


@_op
def inception_crop(size: Size, area_min: float = 0.05, area_max: float = 1.0) -> Step:
    """A random part of the picture, resized to `size` without keeping its aspect.

    The part covers between `area_min` and `area_max` of the picture and is 0.75 to 1.33 times as
    wide as high. As `tf.image.sample_distorted_bounding_box` does: the aspect is uniform, then the
    height among all that fit; after 100 vain attempts the whole picture is taken.
    Source: Szegedy et al. 2015 (arXiv:1409.4842), section 6.
    """
    if not 0 < area_min <= area_max <= 1:
        raise UserError("expected 0 < area_min <= area_max <= 1")

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, height, width = _random_box(image.shape[:2], rng, area_min, area_max)
        return pictures.resize(image[top : top + height, left : left + width], size)

    return Step(apply, size, random=True)


def _random_box(
    shape: tuple[int, ...], rng: np.random.Generator, area_min: float, area_max: float
) -> tuple[int, int, int, int]:
    full_height, full_width = shape
    smallest, largest = (a * full_height * full_width for a in (area_min, area_max))
    for _ in range(100):
        aspect = rng.uniform(0.75, 1.33)
        # 0.49: widths are rounded, so this much more than the full width still fits.
        highest = min(math.sqrt(largest / aspect), full_height, (full_width + 0.49) / aspect)
        high = round(highest)
        low = min(round(math.sqrt(smallest / aspect)), high)
        height = int(rng.integers(low, high + 1))
        width = round(height * aspect)
        if smallest <= height * width <= largest and height <= full_height and width <= full_width:
            top = int(rng.integers(0, full_height - height + 1))
            left = int(rng.integers(0, full_width - width + 1))
            return top, left, height, width
    return 0, 0, full_height, full_width


@_op
def flip() -> Step:
    """Mirrors left and right, every second time."""
    return Step(lambda image, rng: image[:, ::-1] if rng.random() > 0.5 else image, random=True)


@_op
def resize(size: Size) -> Step:
    """The whole picture resized to `size`; its aspect isn't kept."""
    return Step(lambda image, _: pictures.resize(image, size), size)


@_op
def resize_small(size: int) -> Step:
    """The shorter side resized to `size`; the aspect is kept, to the nearest pixel."""

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        scale = size / min(height, width)
        return pictures.resize(image, (round(height * scale), round(width * scale)))

    return Step(apply, None)


@_op
def central_crop(size: Size) -> Step:
    """The middle of the picture, which must be as large as `size` at least."""

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        top, left = ((have - want) // 2 for have, want in zip(image.shape, size, strict=False))
        if min(top, left) < 0:
            raise UserError(
                f"central_crop: the picture is {image.shape[0]} x {image.shape[1]}, expected "
                f"{size[0]} x {size[1]} or larger; put resize_small({max(size)}) before it"
            )
        return image[top : top + size[0], left : left + size[1]]

    return Step(apply, size)


@_op
def random_shift(pixels: int) -> Step:
    """Moves the picture by up to `pixels` each way; the gap is 0: black, if before value_range."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        padded = np.zeros((height + 2 * pixels, width + 2 * pixels, image.shape[2]), image.dtype)
        padded[pixels : pixels + height, pixels : pixels + width] = image
        top, left = rng.integers(0, 2 * pixels + 1, 2)
        return padded[top : top + height, left : left + width]

    return Step(apply, random=True)


@_op
def uint8() -> Step:
    """Cuts off what is behind the point, as a cast to uint8 does; LiT's towers were trained so."""
    return Step(lambda image, _: image.astype(np.uint8))


@_op
def value_range(lo: float, hi: float) -> Step:
    """Maps 0..255 to lo..hi, neither rounded nor clipped; -1, 1 is exactly (x - 127.5) / 127.5."""
    if not lo < hi:
        raise UserError("expected lo < hi")
    half, middle = np.float32((hi - lo) / 2), np.float32((hi + lo) / 2)
    centre = np.float32(127.5)

    def apply(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
        pixels = image - centre  # then in place: the rest costs no memory
        pixels /= centre
        pixels *= half
        pixels += middle
        return pixels

    return Step(apply)


@_op
def gray() -> Step:
    """Colours become luma (ITU-R BT.601), one channel."""
    weights = np.array([[0.299], [0.587], [0.114]], np.float32)
    return Step(lambda image, _: image if image.shape[2] == 1 else image.astype("f4") @ weights)


@_op
def rgb() -> Step:
    """Grey becomes three equal channels."""
    return Step(lambda image, _: np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image)


# The parser.

_CALL = re.compile(r"([A-Za-z_]\w*)\s*(?:\(([\w\s.,=()+-]*)\))?", re.ASCII)


def _parse_op(text: str, where: str) -> tuple[Step, str]:
    """Returns the step and its canonical spelling."""
    match = _CALL.fullmatch(text)
    if not match:
        raise UserError(
            f"can't read {_short(text)} {where}, expected an operation such as 'resize(224)'; "
            f"there are {', '.join(_OPS)}"
        )
    name, arguments = match[1], match[2] or ""
    if name not in _OPS:
        close = difflib.get_close_matches(name, _OPS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(_OPS)}"
        raise UserError(f"unknown operation {_short(name)} {where}; {hint}")
    signature = inspect.signature(_OPS[name])
    try:
        given, named = _literals(arguments)
        bound = signature.bind(*given, **named)
        values = {
            key: _convert(key, value, signature.parameters[key].annotation)
            for key, value in bound.arguments.items()
        }
        step = _OPS[name](**values)
    except (UserError, TypeError) as error:
        raise UserError(
            f"wrong arguments {_short(text)} {where}: {error}; expected {_expected(name)}"
        ) from None
    return step, _canonical(name, values, signature)


def _literals(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on odd number spellings
            call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        given = [ast.literal_eval(arg) for arg in call.args]
        named = [(str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in call.keywords]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise UserError("not a list of numbers") from None
    return given, dict(named)


def _convert(name: str, value: Any, kind: Any) -> Any:
    if kind is float:
        if type(value) in (int, float) and abs(value) < 1e9:
            return float(value)
        raise UserError(f"{name} is {_short(value)}, expected a number")
    pair = value if kind is Size and isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(type(v) is int and 0 < v <= MAX_PIXELS for v in pair):
        shape = f"1 to {MAX_PIXELS} pixels" + (" or (height, width)" if kind is Size else "")
        raise UserError(f"{name} is {_short(value)}, expected {shape}")
    return pair if kind is Size else value


def _canonical(name: str, values: dict[str, Any], signature: inspect.Signature) -> str:
    """Required arguments by position, others by name and only where they aren't the default."""
    texts = []
    for key, parameter in signature.parameters.items():
        if parameter.default is parameter.empty:
            texts.append(_number(values[key]))
        elif values.get(key, parameter.default) != parameter.default:
            texts.append(f"{key}={_number(values[key])}")
    return f"{name}({', '.join(texts)})" if texts else name


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if value[0] == value[1] else str(value)
    return str(int(value)) if value == int(value) else repr(value)


def _expected(name: str) -> str:
    parameters = inspect.signature(_OPS[name]).parameters.values()
    texts = [p.name if p.default is p.empty else f"{p.name}={p.default:g}" for p in parameters]
    return f"{name}({', '.join(texts)})" if texts else f"{name} without arguments"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
