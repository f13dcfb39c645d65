"""Memory that a step on the CPU gives back to the system, and takes anew: kept instead."""

import ctypes
import glob
import os
import sys

# mallopt's parameters, from malloc.h, and values: no block of its own for what is large; nothing
# is given back; one heap for all threads, or what is freed in one could not be used by another.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21


def keep_memory() -> bool:
    """Has glibc's allocator keep what is freed, in huge pages where Linux has them.

    XLA frees a step's temporary memory, often a GB, after each step. The allocator would give it
    back to the system, which clears every 4 KB of it when they are touched in the next step.

    Returns:
      whether it did: not after NumPy has been imported, for its threads have heaps of their own;
      nor beside a GPU or TPU, whose memory is another; nor with the environment's
      VIT_JAX_KEEP_MEMORY=0; nor where there is no glibc.
    """
    if "numpy" in sys.modules or os.environ.get("VIT_JAX_KEEP_MEMORY") == "0":
        return False
    if sys.platform != "linux":
        return False
    accelerators = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/accel*", "/dev/vfio/[0-9]*")
    if any(map(glob.glob, accelerators)):  # dxg: GPUs of Windows, seen from its Linux.
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    for parameter, value in _SETTINGS.items():
        libc.mallopt(parameter, value)
    # Addresses only: half as many as there is memory, which becomes the heap's free end.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype = ctypes.c_void_p
    if start := libc.malloc(ctypes.c_size_t(size)):
        aligned = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        length = (start + size - aligned) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(length), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(start))
    return True
