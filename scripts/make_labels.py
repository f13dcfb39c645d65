"""Makes imagenet_labels.txt, the names of ImageNet's 1,000 classes, from timm's tables.

    pip download --no-deps timm && unzip timm-*.whl 'timm/data/_info/*'
    python scripts/make_labels.py timm/data/_info vit_jax/checkpoints/imagenet_labels.txt

imagenet_synsets.txt gives the order, which is that of the official weights' heads, and
imagenet_synset_to_lemma.txt the names. See imagenet_labels.md for source and licence.
"""

import argparse
import hashlib
from pathlib import Path

TABLES = ("imagenet_synsets.txt", "imagenet_synset_to_lemma.txt")
SHA256 = (
    "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15",
    "1b8babda187421a4bde0c9c5a197c36f6bdda962f7ca11ffb2813806cbb2178f",
)


def main() -> None:
    """Reads the two tables in a folder and writes one name a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="timm's data/_info")
    parser.add_argument("labels", type=Path, help="file to write")
    args = parser.parse_args()
    texts = []
    for name, expected in zip(TABLES, SHA256, strict=True):
        content = (args.folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected:
            parser.error(f"{name} has sha256 {digest}, expected {expected}")
        texts.append(content.decode())
    order, lemmas = texts[0].split(), dict(line.split("\t") for line in texts[1].splitlines())
    args.labels.write_text("".join(f"{lemmas[synset]}\n" for synset in order))
    print(f"{args.labels}: {len(order):,} names")


if __name__ == "__main__":
    main()
