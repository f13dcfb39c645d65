"""A few images on disk, for tests of what reads them."""

from pathlib import Path

import cv2
import numpy as np


def write_photos(root: Path, size: int | None = None, **counts: int) -> Path:
    """JPEG files root/SPLIT/CLASS/NUMBER.jpg, `counts` of each class of a split.

    Of one size, or of various ones.
    """
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for shade, name in enumerate(("bee", "cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                low = 60 * shade
                image = rng.integers(low, low + 100, (size or 12 + i % 3, size or 14, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f"{i:03}.jpg"), image)
    return root


def listed(root: Path, split: str) -> list[Path]:
    """The files of a split in the order of their names."""
    return sorted((root / split).rglob("*.jpg"))
