"""Arrays that stay in their file until they are needed."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """An array of known shape and type, whose values are read when they are asked for.

    Nothing is kept: each `read` reads again. NumPy takes it for an array, `np.asarray(lazy)`.

    Attributes:
      shape, dtype: as of the array that `read` gives.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.read = read

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How much memory its values take."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self) -> str:
        return f"LazyArray({self.shape}, {self.dtype})"

    def reshape(self, shape: tuple[int, ...]) -> "LazyArray":
        """Another shape of as many numbers."""
        return LazyArray(shape, self.dtype, lambda: self.read().reshape(shape))

    def astype(self, dtype: Any) -> "LazyArray":
        """Another type, rounded to the nearest number that it has."""
        return LazyArray(self.shape, dtype, lambda: self.read().astype(dtype, copy=False))


# The values may be NumPy's or still in their file.
Array = np.ndarray | LazyArray


def rows(array: Array) -> list[Array]:
    """The parts of an array along its first axis.

    Those of a lazy array share one read of the whole, which is let go when the last part is read:
    read in order, no more than one such array is in memory.
    """
    if not isinstance(array, LazyArray):
        return list(array)
    stack: list[np.ndarray] = []
    last = array.shape[0] - 1

    def read(i: int) -> np.ndarray:
        if not stack:
            stack.append(array.read())
        row = stack[0][i]
        if i == last:
            stack.clear()
        return row

    row = array.shape[1:]
    return [LazyArray(row, array.dtype, functools.partial(read, i)) for i in range(last + 1)]


def with_zero_token(array: Array) -> Array:
    """(1, n, d) -> (1, n + 1, d), zeros before the others."""
    one, n, d = array.shape
    if isinstance(array, LazyArray):
        return LazyArray((one, n + 1, d), array.dtype, lambda: _with_zero_token(array.read()))
    return _with_zero_token(array)


def _with_zero_token(array: np.ndarray) -> np.ndarray:
    one, _, d = array.shape
    return np.concatenate([np.zeros((one, 1, d), array.dtype), array], axis=1)
