"""Checksums of arrays that are kept beside them, so that damage is told and never loaded."""

from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np


def crc32c(array: np.ndarray) -> str:
    """The CRC32C of an array's type, shape and values (little-endian, rows first), in hex."""
    dtype = array.dtype.newbyteorder("<")
    start = google_crc32c.value(f"{dtype.name} {array.shape}".encode())
    values = array.astype(dtype, order="C", copy=False).reshape(-1).view(np.uint8)
    return f"{google_crc32c.extend(start, values):08x}"


@jax.jit
def digest(state: Any) -> jax.Array:
    """A sum over the bits and places of the values of each array, the same on any devices.

    Args:
      state: a tree of arrays of 8 to 32 bits.

    Returns:
      uint32 (arrays,). Any damage changes it, but for one in 2^32.
    """

    def of(x: jax.Array) -> jax.Array:
        word = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
        for axis in range(x.ndim):  # Mixed in the manner of MurmurHash3.
            place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            bits = bits ^ (place * jnp.uint32(0x9E3779B1))
            bits = bits * jnp.uint32(0x85EBCA6B)
            bits = bits ^ (bits >> 15)
        bits = bits * jnp.uint32(0xC2B2AE35)
        return (bits ^ (bits >> 13)).sum(dtype=jnp.uint32)

    return jnp.stack([of(x) for x in jax.tree.leaves(state)])
