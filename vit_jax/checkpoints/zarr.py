"""Reading the arrays of an Orbax folder, which are Zarr's, piece by piece."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoints.npz import fill

_PIECE = 1 << 20  # Bytes that may be in memory three times; to look up each takes time.
_INDEX = struct.Struct("<qqI")  # Of a shard's only chunk: offset, length; the checksum of these.


class ZarrFolder:
    """The arrays of a folder, read one at a time and with little more memory than that one's.

    Orbax itself keeps copies of large ones and is slow with small ones. If the folder is damaged,
    errors of many kinds are raised.
    """

    def __init__(self, folder: Path):
        import tensorstore

        self._folder = folder
        self._open = tensorstore.open
        notes = json.loads((folder / "_METADATA").read_bytes())
        self._driver = "zarr3" if notes.get("use_zarr3") else "zarr"
        # One chunk at a time, for each is in memory as it is stored and as it is read.
        self._context = tensorstore.Context({"data_copy_concurrency": {"limit": 1}})

    def read(self, name: str) -> np.ndarray:
        """An array by its name in the folder."""
        files: dict[str, Any] = {"driver": "file", "path": f"{self._folder}/{name}/"}
        if (self._folder / "manifest.ocdbt").is_file():
            base = {"driver": "file", "path": f"{self._folder}/"}
            files = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": self._driver, "kvstore": files, "fill_missing_data_reads": False}
        store = self._open(spec, context=self._context).result()
        if (values := _one_chunk(store)) is None:
            return store.read().result()
        array = np.empty(store.shape, store.dtype.numpy_dtype)
        fill(array.reshape(-1).view(np.uint8).data, values, _PIECE)
        if values.read(1):
            raise ValueError(f"{name!r} has more bytes than its shape")
        return array


def _one_chunk(store: Any) -> Any:
    """The bytes of a large array as a file, if it is stored as Orbax does: as a single chunk.

    TensorStore would have them in memory as they are stored, as a chunk and as the array. None for
    what is left to it.
    """
    layout, about = store.chunk_layout, store.spec().to_json()["metadata"]
    if store.size * store.dtype.numpy_dtype.itemsize <= _PIECE:
        return None
    if not tuple(store.shape) == layout.write_chunk.shape == layout.read_chunk.shape:
        return None
    end = math.inf
    if about["zarr_format"] == 2:
        if about["filters"] or about["order"] != "C" or about["dtype"].startswith(">"):
            return None
        key = about.get("dimension_separator", ".").join("0" * store.rank)
        packing = [about["compressor"]["id"]] if about["compressor"] else []
    else:
        shard = about["codecs"][0].get("configuration", {})
        if shard.get("index_location") != "end" or about["chunk_key_encoding"]["name"] != "default":
            return None
        plain, *packing = [codec["name"] for codec in shard["codecs"]]
        if plain != "bytes" or shard["codecs"][0].get("configuration", {}).get("endian") == "big":
            return None
        key = "c" + "/0" * store.rank
        last = store.kvstore.read(key, byte_range=slice(-_INDEX.size, None)).result().value
        start, end, _ = _INDEX.unpack(last)
        # TensorStore is to judge an index that isn't what comes behind the chunk.
        if start != 0 or end < 0:
            return None
        if store.kvstore.read(key, byte_range=slice(end, None)).result().value != last:
            return None
    if packing not in ([], ["zstd"]):
        return None
    value = _Value(store.kvstore, key, end)
    if not packing:
        return value
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(value)  # type: ignore[arg-type]


class _Value:
    """A value of a key-value store, or its beginning, as a file."""

    def __init__(self, store: Any, key: str, end: float):
        self._store, self._key, self._position, self._end = store, key, 0, end

    def read(self, size: int) -> bytes:
        try:
            piece = self._part(min(self._position + size, self._end))
        except ValueError:  # It ends before.
            piece = self._part(None)
        self._position += len(piece)
        return piece

    def _part(self, stop: float | None) -> bytes:
        part = slice(self._position, stop)
        return self._store.read(self._key, byte_range=part).result().value
