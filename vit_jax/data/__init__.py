"""How images become batches: a pure function of (seed, step).

Names are looked up on first use, so that importing the package loads neither OpenCV nor Grain.
"""

import importlib

_HOMES = {
    "Source": "sources",
    "open_source": "sources",
    "open_splits": "sources",
    "from_arrays": "arrays",
    "from_huggingface": "huggingface",
    "prepare_tfds": "prepare",
    "is_known": "sources",
    "data_fingerprint": "sources",
    "decode": "images",
    "read": "images",
    "Preprocess": "preprocess",
    "parse": "preprocess",
    "OPERATIONS": "preprocess",
    "AUGREG": "augment",
    "Readers": "workers",
    "choose_readers": "workers",
    "own_cores": "cores",
    "LEAST_FOR_PROCESSES": "workers",
    "train_batches": "pipeline",
    "eval_batches": "pipeline",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
