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
from typing import Any

import numpy as np

from vit_jax.data import augment  # noqa: F401 (it has operations, too)
from vit_jax.data.images import Part, whole_levels
from vit_jax.data.ops import KEPT, OPS, Size, Step
from vit_jax.errors import UserError

MAX_PIXELS = 16384  # a longer side is a slip of the keyboard
OPERATIONS = tuple(OPS)  # their names
MAX_LENGTH = 1000  # of a specification, in characters


@dataclass(frozen=True)
class Preprocess:
    """A parsed specification. Equal if their specifications are; safe to share by threads.

    Attributes:
      spec: the specification in its one canonical spelling.
      steps: its operations.
      dtype: "float32", or "uint8" for results rounded to whole grey levels, see `to_levels`.
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
            size = size if step.size == KEPT else step.size
        return size

    @property
    def value_range(self) -> tuple[float, float]:
        """What 0 and 255 become."""
        ranges = [step.value_range for step in self.steps if step.value_range]
        return ranges[-1] if ranges else (0.0, 255.0)

    def to_levels(self) -> tuple["Preprocess", tuple[float, float]] | None:
        """What leaves the last value_range to others: (uint8 preprocessing, (lo, hi)).

        None if there is something after it, or none.
        """
        value_range = self.steps[-1].value_range
        if value_range is None or any(step.value_range for step in self.steps[:-1]):
            return None
        steps = list(self.steps[:-1])
        for i, step in reversed(list(enumerate(steps))):
            if step.rounds:  # What follows moves pixels or would round them: round here.
                steps[i] = replace(step, apply=functools.partial(step.apply, rounded=True))
            if not (step.moves or step.levels):
                break
        spec = self.spec.rpartition("|")[0]
        return Preprocess(spec, tuple(steps), "uint8"), value_range

    def undo_range(self, image: np.ndarray) -> np.ndarray:
        """The uint8 image that value_range made a result of, to be looked at."""
        low, high = self.value_range
        return np.clip(np.rint((image - low) * (255 / (high - low))), 0, 255).astype(np.uint8)

    def part(self, shape: tuple[int, int], rng: np.random.Generator | None) -> Part:
        """The part of an (h, w) image that the first operation takes, drawn from `rng`."""
        first = self.steps[0].part if self.steps else None  # `to_levels` may leave none.
        return first(shape, rng) if first and rng else (0, 0, *shape)

    def __call__(
        self, image: np.ndarray, rng: np.random.Generator | None = None, *, cut: bool = False
    ) -> np.ndarray:
        """Applies the operations from left to right.

        Args:
          image: uint8 (h, w, c), c 1 or 3.
          rng: the only source of randomness.
          cut: whether `image` is just the `part`, drawn from the same `rng`.

        Returns:
          array (h', w', c') of `dtype`.

        Raises:
          UserError: an operation can't be applied to this image.
        """
        if rng is None:
            if self.random:
                raise TypeError(f"{self.spec!r} is random: pass a numpy.random.Generator")
            rng = np.random.default_rng(0)
        for i, step in enumerate(self.steps):
            if step.part and not (cut and i == 0):
                top, left, height, width = step.part(image.shape[:2], rng)
                image = image[top : top + height, left : left + width]
            image = step.apply(image, rng)
        if self.dtype == "uint8":
            return whole_levels(image)
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
    steps: list[Step] = []
    texts: list[str] = []
    position = 1
    for part in spec.split("|"):
        start = position + len(part) - len(part.lstrip())
        where = f"in {_short(spec)} at position {start}"
        step, text = _parse_op(part.strip(), where)
        if step.random and not train:
            raise UserError(
                f"{text} {where} is random, expected operations that always give the "
                "same result; remove it from the evaluation's preprocessing"
            )
        if step.levels and any(earlier.startswith("value_range") for earlier in texts):
            raise UserError(
                f"{text} {where} works on values of 0 to 255: put it before value_range"
            )
        if text == "decode" and texts:
            raise UserError(f"decode {where}: images arrive decoded, it can only stand first")
        steps.append(step)
        texts.append(text)
        position += len(part) + 1
    if texts[0] == "decode" and len(texts) > 1:
        del steps[0], texts[0]
    return Preprocess("|".join(texts), tuple(steps))


_CALL = re.compile(r"([A-Za-z_]\w*)\s*(?:\(([\w\s.,=()+-]*)\))?", re.ASCII)


def _parse_op(text: str, where: str) -> tuple[Step, str]:
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
    signature = inspect.signature(OPS[name])
    try:
        given, named = _literals(arguments)
        bound = signature.bind(*given, **named)
        values = {
            key: _convert(key, value, signature.parameters[key].annotation)
            for key, value in bound.arguments.items()
        }
        step = OPS[name](**values)
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
    if isinstance(value, bool) or value != int(value):
        return repr(value)
    return str(int(value))


def _expected(name: str) -> str:
    texts = [
        p.name if p.default is p.empty else f"{p.name}={_number(p.default)}"
        for p in inspect.signature(OPS[name]).parameters.values()
    ]
    return f"{name}({', '.join(texts)})" if texts else f"{name} without arguments"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a huge number"
    return text if len(text) <= 80 else f"{text[:77]}..."
