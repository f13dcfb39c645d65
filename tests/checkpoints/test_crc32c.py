import io

import hypothesis.strategies as st
import pytest
from hypothesis import given

from vit_jax.checkpoints.crc32c import crc32c


def by_definition(data: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


# RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(data, expected):
    assert crc32c(io.BytesIO(data)) == expected


@given(st.binary(max_size=200))
def test_short_data_as_by_definition(data):
    assert crc32c(io.BytesIO(data)) == by_definition(data)


@pytest.mark.parametrize("size", [1 << 15, (1 << 15) + 1, 100_003])
def test_longer_data_as_by_definition(size):
    data = bytes(i * i % 251 for i in range(size))
    assert crc32c(io.BytesIO(data)) == by_definition(data)


def test_blocks_are_joined(monkeypatch):
    data = bytes(i * 7 % 256 for i in range(10_000))
    whole = crc32c(io.BytesIO(data))
    monkeypatch.setattr("vit_jax.checkpoints.crc32c._BLOCK", 999)
    assert crc32c(io.BytesIO(data)) == whole
