"""CRC-32C (Castagnoli, RFC 3720), the checksum that Google Cloud Storage has for every object.

A CRC register is linear over GF(2). So a block is cut into many lanes whose registers NumPy
advances together, two bytes a step, and the lanes are joined afterwards: the register of A
followed by B is that of A moved on by len(B) zero bytes, XOR that of B. This makes some hundred
MB/s without a compiled dependency.
"""

import functools
from typing import Any, BinaryIO

import numpy as np

_POLYNOMIAL = 0x82F63B78  # With the bits reversed, as the checksum is defined.
_LANES = 1 << 14
_BLOCK = 1 << 24  # bytes read at once


def crc32c(file: BinaryIO) -> int:
    """The CRC-32C of what is left to read in a file opened for bytes."""
    register = 0xFFFFFFFF
    while block := file.read(_BLOCK):
        register = _after_zeros(register, len(block)) ^ _register(block)
    return register ^ 0xFFFFFFFF


def _register(block: bytes) -> int:
    """The register after a block, from a register of zero."""
    steps = -(-len(block) // (2 * _LANES))
    # Zeros in front leave a register of zero as it is, so that any length can be filled up.
    words = np.zeros(_LANES * steps, "<u2")
    words.view(np.uint8)[2 * len(words) - len(block) :] = np.frombuffer(block, np.uint8)
    table = _two_byte_table()
    registers = np.zeros(_LANES, np.uint32)
    for column in np.ascontiguousarray(words.reshape(_LANES, steps).T):
        low = registers.astype(np.uint16) ^ column
        registers = table[low] ^ (registers >> 16)
    move = _zeros(2 * steps)
    while len(registers) > 1:
        registers = _apply(move, registers[0::2]) ^ registers[1::2]
        move = _apply(move, move)
    return int(registers[0])


@functools.cache
def _two_byte_table() -> np.ndarray:
    """Where the 16 low bits of a register lead in two bytes."""
    values: Any = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return values


# A linear map of registers is held as the images of its 32 bits, uint32 (32,).


def _apply(linear_map: np.ndarray, registers: np.ndarray) -> np.ndarray:
    images = np.zeros_like(registers)
    for bit, image in enumerate(linear_map):
        images ^= np.where((registers >> bit) & 1, image, np.uint32(0))
    return images


@functools.lru_cache(64)
def _zeros(count: int) -> np.ndarray:
    """The map that moves a register on by `count` zero bytes."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    moved = bits
    power = (_two_byte_table()[(bits & 0xFF) << 8]) ^ (bits >> 8)  # one byte
    while count:
        if count & 1:
            moved = _apply(power, moved)
        power = _apply(power, power)
        count >>= 1
    return moved


def _after_zeros(register: int, count: int) -> int:
    return int(_apply(_zeros(count), np.array([register], np.uint32))[0])
