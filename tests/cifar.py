"""CIFAR-10's own archive, made of a folder of its images."""

import io
import tarfile
from pathlib import Path

import numpy as np

from vit_jax.data import open_source


def write_archive(folder: Path, to: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes cifar-10-binary.tar.gz; gives the training images (n, 32, 32, 3) and labels."""
    files, kept = {}, {}
    for split in ("train", "test"):
        source = open_source(str(folder), split)
        pixels = np.stack([source[i]["image"] for i in range(len(source))])
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        rows = np.concatenate([source.label_ids[:, None].astype(np.uint8), planes], axis=1)
        kept[split] = pixels, source.label_ids
        batches = np.array_split(rows, 5) if split == "train" else [rows]
        names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
        files |= {f"{n}.bin": b.tobytes() for n, b in zip(names, batches, strict=True)}
    files["batches.meta.txt"] = ("\n".join(source.labels) + "\n").encode()
    with tarfile.open(to / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return kept["train"]
