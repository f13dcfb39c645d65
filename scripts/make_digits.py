"""Makes vit_jax/data/digits.npz from scikit-learn's copy of the UCI handwritten digits.

    pip download --no-deps scikit-learn && unzip scikit_learn-*.whl '*/digits.csv.gz'
    python scripts/make_digits.py sklearn/datasets/data/digits.csv.gz vit_jax/data/digits.npz

Each line of the CSV holds 64 grey levels (0..16, row by row) and the digit. The same input always
gives the same file, byte for byte. See vit_jax/data/digits.md for the source and the licence.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"  # of digits.csv.gz
SEED = 0


def test_mask(labels: np.ndarray, seed: int) -> np.ndarray:
    """Marks every fifth example, counted class by class in shuffled order: 360 of 1,797."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    mask = np.zeros(len(labels), bool)
    mask[by_class[::5]] = True
    return mask


def main() -> None:
    """Reads the CSV file named on the command line and writes the .npz file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, help="scikit-learn's digits.csv.gz")
    parser.add_argument("npz", type=Path, help="file to write")
    args = parser.parse_args()
    digest = hashlib.sha256(args.csv.read_bytes()).hexdigest()
    if digest != SHA256:
        parser.error(f"{args.csv} has sha256 {digest}, expected {SHA256}")
    table = np.loadtxt(args.csv, delimiter=",").astype(np.uint8)
    images, labels = table[:, :64].reshape(-1, 8, 8), table[:, 64]
    test = test_mask(labels, SEED)
    np.savez_compressed(args.npz, images=images, labels=labels, test=test)
    print(f"{args.npz}: {np.sum(~test)} train and {np.sum(test)} test examples")


if __name__ == "__main__":
    main()
