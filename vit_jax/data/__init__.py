"""How images become batches: a pure function of (seed, step).

Names are looked up on first use, so that importing the package loads neither OpenCV nor Grain.
"""

import importlib

_HOMES = {
    "Source": "source",
    "data_fingerprint": "source",
    "remarks": "source",
    "open_source": "splits",
    "open_splits": "splits",
    "prepare_tfds": "splits",
    "is_known": "splits",
    "from_arrays": "arrays",
    "from_huggingface": "arrays",
    "list_images": "listed",
    "unlabelled": "listed",
    "decode": "images",
    "read": "images",
    "Normalize": "ops",
    "Preprocess": "preprocess",
    "parse": "preprocess",
    "OPERATIONS": "preprocess",
    "find_levels": "levels",
    "at_size": "recorded",
    "from_config": "recorded",
    "AUGREG": "augment",
    "Readers": "workers",
    "choose_readers": "workers",
    "own_cores": "workers",
    "LEAST_FOR_PROCESSES": "workers",
    "train_batches": "batches",
    "eval_batches": "batches",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
