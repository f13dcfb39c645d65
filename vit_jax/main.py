"""Trains as a configuration says: the original's command line.

python -m vit_jax.main --config=configs/vit.py:b16,cifar10 --workdir=DIR --config.base_lr=0.01
"""

import sys
from collections.abc import Sequence

from vit_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
    """`vit-jax train`, with options that may also be written with one dash, as absl allows."""
    options = sys.argv[1:] if argv is None else argv
    return cli.main(
        [
            "train",
            *(f"-{o}" if o[:1] == "-" and o[1:2].isalpha() and len(o) > 2 else o for o in options),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
