"""Memory of batches: filled by threads or processes, read by the consumer without a copy."""

import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vit_jax.data.reading import Batch

_ALIGNED = 64  # Bytes: what lies so, JAX on a CPU can use in place.


@dataclass(frozen=True)
class Layout:
    """What a buffer holds: shape and dtype of each array by its name."""

    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]

    @property
    def size(self) -> int:
        """Bytes of a buffer, whole pages."""
        used = sum(-(-n // _ALIGNED) * _ALIGNED for n in self._bytes())
        return -(-used // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

    def view(self, memory: np.ndarray) -> Batch:
        """The arrays in a buffer, uint8 (size,)."""
        batch, start = {}, 0
        for (name, (shape, dtype)), size in zip(self.arrays.items(), self._bytes(), strict=True):
            batch[name] = memory[start : start + size].view(dtype).reshape(shape)
            start += -(-size // _ALIGNED) * _ALIGNED
        return batch

    def _bytes(self) -> list[int]:
        return [math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays.values()]


class Buffers:
    """As many buffers as are in use at a time, each used again when nothing refers to it any more.

    All that was made of a batch's arrays without a copy keeps them alive, and so the buffer: views,
    and the arrays of JAX on a CPU, which take aligned memory as it is. There is always another
    buffer, so that nobody waits for the garbage collector.

    Args:
      layout: what each holds.
      file: of `anonymous_file`, where other processes find buffer i as `map_buffer` maps it; None
        for memory of this process.
    """

    def __init__(self, layout: Layout, file: int | None = None):
        self._layout = layout
        self._file = file
        self._maps: list[mmap.mmap] = []
        self._free: deque[int] = deque()

    def take(self) -> tuple[int, Batch]:
        """The number of a buffer that is free, and its arrays; what they hold is left over."""
        try:
            number = self._free.pop()
        except IndexError:
            number, size = len(self._maps), self._layout.size
            if self._file is None:
                self._maps.append(mmap.mmap(-1, size))
            else:
                os.ftruncate(self._file, (number + 1) * size)
                self._maps.append(map_buffer(self._file, number, size))
        # Every view has this one as its base: NumPy passes over those between.
        memory = np.frombuffer(self._maps[number], np.uint8)
        weakref.finalize(memory, self._free.append, number).atexit = False
        return number, self._layout.view(memory)


def map_buffer(file: int, number: int, size: int) -> mmap.mmap:
    """Buffer `number` of a file that holds one after the other."""
    return mmap.mmap(file, size, offset=number * size)


def anonymous_file() -> int:
    """A descriptor of memory without a name: nothing of it is left when all that have it are gone,
    however they end, and a container's small /dev/shm is no limit."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vit_jax.data", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
