"""Preprocessing as a short text: "inception_crop(224)|flip|value_range(-1, 1)".

The text is what a configuration holds, what is recorded beside trained weights, and what makes new
images look like the training ones. It is parsed strictly and never evaluated as code. The
operations stand in `ops` and `augment`.
"""

import ast
import difflib
import functools
import inspect
import re
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin

import numpy as np

from vit_jax.data import augment  # noqa: F401 (it has operations, too)
from vit_jax.data.headers import MAX_CHANNELS
from vit_jax.data.images import Box, cut, to_uint8, visible
from vit_jax.data.ops import (
    MAX_AREA,
    OPS,
    SAME_SIZE,
    Normalize,
    PerChannel,
    Size,
    Step,
    spelled,
    whole_range,
)
from vit_jax.errors import UserError

MAX_PIXELS = 16384  # A longer one is a slip of the keyboard.
MAX_LENGTH = 4000  # Of a specification, in characters.
OPERATIONS = tuple(OPS)  # Their names.


@dataclass(frozen=True)
class Preprocess:
    """A parsed specification. Equal if their specifications are; safe to share by threads.

    Attributes:
      spec: the specification in its one canonical spelling.
      steps: its operations.
      dtype: of results: "float32", or "uint8" if they are rounded.
    """

    spec: str
    steps: tuple[Step, ...] = field(compare=False, repr=False)
    dtype: str = "float32"

    @property
    def random(self) -> bool:
        """Whether two calls may differ; then `rng` is needed."""
        return any(step.random for step in self.steps)

    @property
    def output_size(self) -> Size | None:
        """(h, w) of every result, or None if it depends on the image."""
        size = None
        for step in self.steps:
            size = size if step.size == SAME_SIZE else step.size
        return size

    @property
    def normalize(self) -> Normalize | None:
        """The last operation if it normalises, and no other does: what a device can do instead."""
        found = [step.normalize for step in self.steps if step.normalize]
        return found[0] if len(found) == 1 and self.steps[-1].normalize else None

    @property
    def range(self) -> Normalize:
        """What becomes of 0 to 255, wherever in the text that is said; compare it, or print it."""
        found = [step.normalize for step in self.steps if step.normalize]
        return found[-1] if found else Normalize((127.5,), (127.5,))

    @property
    def levels(self) -> tuple[PerChannel, PerChannel] | None:
        """The values that become 0 and 255, if that is said; see `ops.levels`."""
        return next((step.levels for step in self.steps if step.levels), None)

    @property
    def works_on_uint8(self) -> tuple[str, ...]:
        """The operations that round to whole grey levels, if they are given others."""
        names = (text.partition("(")[0] for text in self.spec.split("|"))
        return tuple(n for n, step in zip(names, self.steps, strict=True) if step.on_uint8)

    def without_normalize(self, *, as_uint8: bool = False) -> "Preprocess":
        """What comes before `normalize`, which has to be there.

        Args:
          as_uint8: for results rounded to uint8, in place of float32; unless there are `levels`,
            for images of more than 8 bits.
        """
        as_uint8 = as_uint8 and not self.levels
        if not self.normalize:
            raise ValueError(f"{self.spec!r} doesn't end with its only normalisation")
        steps, spec = list(self.steps[:-1]), self.spec.rpartition("|")[0]
        if not as_uint8:
            return Preprocess(spec, tuple(steps))
        for i, step in reversed(list(enumerate(steps))):
            if step.can_round:  # What follows moves pixels or would round them: round here.
                steps[i] = replace(step, apply=functools.partial(step.apply, rounded=True))
            if not (step.is_geometric or step.on_uint8):
                break
        return Preprocess(spec, tuple(steps), "uint8")

    def split(self, *, as_uint8: bool = False) -> tuple["Preprocess", Normalize | None]:
        """What the host does, and `normalize` for the device; all of it and None where there is
        nothing to leave to the device. See `without_normalize`."""
        normalize = self.normalize
        return (self.without_normalize(as_uint8=as_uint8) if normalize else self), normalize

    def undo_range(self, image: np.ndarray) -> np.ndarray:
        """The uint8 image that a normalised result was made of, to be looked at."""
        return visible(self.range.undo(image))

    def blank(self, channels: int) -> np.ndarray:
        """Zeros (h, w, channels), an image that all operations can be applied to."""
        # Not smaller than a crop wants it, nor of a worse aspect.
        size = np.max([step.size or (1, 1) for step in self.steps], axis=0).clip(1)
        return np.zeros((*size, channels), np.float32 if self.levels else np.uint8)

    def crop_box(self, size: tuple[int, int], rng: np.random.Generator) -> Box | None:
        """The box that the first operation takes of an (h, w) image, drawn from `rng`, if any."""
        crop = self.steps[0].crop if self.steps else None
        return crop(size, rng) if crop else None

    def __call__(
        self, image: np.ndarray, rng: np.random.Generator | None = None, *, cropped: bool = False
    ) -> np.ndarray:
        """Applies the operations from left to right.

        Args:
          image: (h, w, c), uint8, or of another type if there are `levels`; of uint16 without them,
            the whole range counts.
          rng: the only source of randomness.
          cropped: whether `image` is just the `crop_box`, drawn from the same `rng`.

        Returns:
          array (h', w', c') of `dtype`.

        Raises:
          UserError: an operation can't be applied to this image.
        """
        if rng is None:
            if self.random:
                raise TypeError(f"{self.spec!r} is random: pass a numpy.random.Generator")
            rng = np.random.default_rng(0)
        if image.dtype != np.uint8 and not self.levels:
            image = whole_range(image)
        for step in self.steps:
            if step.crop and not cropped:
                image = cut(image, step.crop(image.shape[:2], rng))
            cropped = False  # Only the first operation's.
            image = step.apply(image, rng)
        return to_uint8(image) if self.dtype == "uint8" else np.ascontiguousarray(image, np.float32)


def parse(spec: str, *, train: bool = True, max_pixels: int = MAX_PIXELS) -> Preprocess:
    """Parses a specification: operations joined by "|", applied from left to right.

    Args:
      spec: e.g. "resize_small(256)|central_crop(224)|value_range(-1, 1)".
      train: False refuses random operations, which have no place in an evaluation.
      max_pixels: the longest side that an operation may ask for.

    Raises:
      UserError: says which operation is wrong, at which position, and what was expected.
    """
    if len(spec) > MAX_LENGTH:
        raise UserError(
            f"preprocessing {_short(spec)} has {len(spec)} characters, expected at most "
            f"{MAX_LENGTH}; shorten it"
        )
    steps: list[Step] = []
    texts: list[str] = []
    position = 1
    for part in spec.split("|"):
        start = position + len(part) - len(part.lstrip())
        where = f"in {_short(spec)} at position {start}"
        step, text = _parse_op(part.strip(), where, max_pixels)
        if step.random and not train:
            raise UserError(
                f"{text} {where} is random, expected operations that always give the "
                "same result; remove it from the evaluation's preprocessing"
            )
        normalized = [name for name, earlier in zip(texts, steps, strict=True) if earlier.normalize]
        if step.on_uint8 and normalized:
            name = normalized[0].partition("(")[0]
            raise UserError(f"{text} {where} works on values of 0 to 255: put it before {name}")
        if step.levels and not {"decode", "gray", "rgb"}.issuperset(texts):
            raise UserError(f"{text} {where}: put it first, only gray and rgb may come before")
        if text == "decode" and texts:
            raise UserError(f"decode {where}: images arrive decoded, it can only stand first")
        steps.append(step)
        texts.append(text)
        position += len(part) + 1
    if texts[0] == "decode" and len(texts) > 1:
        del steps[0], texts[0]
    return Preprocess("|".join(texts), tuple(steps))


_CALL = re.compile(r"([A-Za-z_]\w*)\s*(?:\(([\w\s.,=()+'\"-]*)\))?", re.ASCII)


def _parse_op(text: str, where: str, max_pixels: int) -> tuple[Step, str]:
    """Returns the step and its canonical spelling."""
    match = _CALL.fullmatch(text)
    if not match:
        raise UserError(
            f"can't read {_short(text)} {where}, expected an operation such as 'resize(224)'; "
            f"there are {', '.join(OPS)}"
        )
    name, arguments = match[1], match[2] or ""
    if name not in OPS:
        close = difflib.get_close_matches(name, OPS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(OPS)}"
        raise UserError(f"unknown operation {_short(name)} {where}; {hint}")
    parameters = inspect.signature(OPS[name]).parameters
    try:
        given, named = _literals(arguments)
        bound = inspect.signature(OPS[name]).bind(*given, **named)
        values = {
            key: _convert(key, value, parameters[key].annotation, max_pixels)
            for key, value in bound.arguments.items()
        }
        step = OPS[name](**values)
    except (UserError, TypeError) as error:
        expected = [
            p.name if p.default is p.empty else f"{p.name}={spelled(p.default)}"
            for p in parameters.values()
        ]
        form = f"{name}({', '.join(expected)})" if expected else f"{name} without arguments"
        raise UserError(
            f"wrong arguments {_short(text)} {where}: {error}; expected {form}"
        ) from None
    # Required arguments by position, others by name and only where they aren't the default.
    texts = [
        spelled(values[key]) if p.default is p.empty else f"{key}={spelled(values[key])}"
        for key, p in parameters.items()
        if values.get(key, p.default) != p.default
    ]
    return step, f"{name}({', '.join(texts)})" if texts else name


def _literals(arguments: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's advice on odd number spellings.
            call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        given = [ast.literal_eval(arg) for arg in call.args]
        named = [(str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in call.keywords]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise UserError("not a list of numbers and names in quotes") from None
    return given, dict(named)


def _convert(name: str, value: Any, kind: Any, max_pixels: int) -> Any:
    if get_origin(kind) is Literal:
        if type(value) is str and value in get_args(kind):
            return value
        names = ", ".join(map(repr, get_args(kind)))
        raise UserError(f"{name} is {_short(value)}, expected one of {names}")
    if kind is bool:
        if type(value) is bool:
            return value
        raise UserError(f"{name} is {_short(value)}, expected True or False")
    if kind in (int, float):
        if type(value) in (int, kind) and abs(value) < 1e9:
            return kind(value)
        raise UserError(
            f"{name} is {_short(value)}, expected a {'whole ' if kind is int else ''}number"
        )
    if kind is PerChannel:
        values = value if isinstance(value, tuple) else (value,)
        if not 1 <= len(values) <= MAX_CHANNELS or not all(
            type(v) in (int, float) and abs(v) < 1e9 for v in values
        ):
            raise UserError(f"{name} is {_short(value)}, expected a number, or one a channel")
        return tuple(map(float, values[:1] if len(set(values)) == 1 else values))
    pair = value if kind is Size and isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or not all(type(v) is int and 0 < v <= max_pixels for v in pair):
        shape = f"1 to {max_pixels} pixels" + (" or (height, width)" if kind is Size else "")
        raise UserError(f"{name} is {_short(value)}, expected {shape}")
    if pair[0] * pair[1] > MAX_AREA:
        raise UserError(
            f"{name} is {_short(value)}, which is {pair[0] * pair[1]:,} pixels, expected "
            f"{MAX_AREA:,} at most"
        )
    return pair if kind is Size else value


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits.
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
