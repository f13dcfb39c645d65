"""Whether training in bfloat16 is training in float32 but for noise: loss curves of both.

    python benchmarks/bfloat16.py DIR WEIGHTS [--config.FIELD=VALUE ...]

Fine-tunes with the recipe of `vit-jax train --data=DIR --weights=WEIGHTS` from three seeds in each
type. Of a seed both see the same images, cut and flipped the same, in the same order: what they
differ by is the rounding. Noise is what the seeds of float32 differ by. The losses are means of a
tenth of the steps each, as the noise of single batches would hide any difference.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SEEDS = (0, 1, 2)
TYPES = ("float32", "bfloat16")


def curve(data: str, weights: str, fields: Sequence[str]) -> tuple[np.ndarray, float]:
    """The loss of each step of a run, and the accuracy at its end."""
    from vit_jax import training
    from vit_jax.training.options import load_config, override
    from vit_jax.training.workdir import read_metrics

    options = [f"--config.model_or_filename={weights}", "--config.progress_every=1", *fields]
    config = override(load_config(f"finetune_folder:{data}"), options)
    with tempfile.TemporaryDirectory() as workdir:
        training.run(config, workdir)
        lines = read_metrics(Path(workdir, "metrics.jsonl"))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return np.array(losses), [line["test/top1"] for line in lines if "test/top1" in line][-1]


def table(losses: np.ndarray, accuracies: np.ndarray) -> str:
    """What is published, from losses (types, seeds, steps) and accuracies (types, seeds)."""
    steps = losses.shape[-1]
    parts = np.array_split(losses, min(10, steps), axis=-1)
    means = np.stack([part.mean(axis=-1) for part in parts], axis=-1)
    rows = ["| steps | float32 | its noise | bfloat16 | bfloat16 - float32, same seed |"]
    rows.append("|---|---|---|---|---|")
    last = 0
    for part, (wide, narrow) in zip(parts, means.transpose(2, 0, 1), strict=True):
        first, last = last + 1, last + part.shape[-1]
        differences = ", ".join(f"{x:+.4f}" for x in narrow - wide)
        rows.append(
            f"| {first} to {last} | {wide.mean():.4f} | {wide.std(ddof=1):.4f} "
            f"| {narrow.mean():.4f} | {differences} |"
        )
    found = [", ".join(f"{x:.1%}" for x in row) for row in accuracies]
    return "\n".join([*rows, "", f"Accuracy: float32 {found[0]}; bfloat16 {found[1]}."])


def main() -> None:
    """Trains and prints the table."""
    data, weights, *fields = sys.argv[1:]
    runs = [
        curve(data, weights, [*fields, f"--config.seed={seed}", f"--config.dtype={dtype}"])
        for dtype in TYPES
        for seed in SEEDS
    ]
    losses, accuracies = map(np.array, zip(*runs, strict=True))
    shape = len(TYPES), len(SEEDS)
    print(table(losses.reshape(*shape, -1), accuracies.reshape(shape)))


if __name__ == "__main__":
    main()
