"""Trains as a configuration says: the original's command line.

python -m vit_jax.main --config=configs/vit.py:b16,cifar10 --workdir=DIR --config.base_lr=0.01
"""

import argparse
import sys
from collections.abc import Sequence

from vit_jax import cli
from vit_jax.cli import train

# What absl takes, about a log that isn't there: accepted, so that old scripts work.
_OF_ABSL = ("--alsologtostderr", "--logtostderr", "--noalsologtostderr", "--nologtostderr")
_OF_ABSL_WITH_VALUE = ("-v", "--v", "--verbosity", "--stderrthreshold", "--log_dir")


def main(argv: Sequence[str] | None = None) -> int:
    """`vit-jax train`, with options that may also be written with one dash, as absl allows."""
    parser = cli.Parser(
        prog="python -m vit_jax.main",
        usage="%(prog)s --workdir=DIR --config=FILE[:ARG] [--config.FIELD=VALUE ...]",
        description="Trains, or goes on with a run that was stopped; the same as vit-jax train.",
        epilog="absl's options about logging are accepted and have no effect",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_arguments(parser)
    parser.add_argument(*_OF_ABSL, action="store_true", dest="absl", help=argparse.SUPPRESS)
    parser.add_argument(*_OF_ABSL_WITH_VALUE, dest="absl", help=argparse.SUPPRESS)
    options = sys.argv[1:] if argv is None else argv
    double = (f"-{o}" if o[:1] == "-" and o[1:2].isalpha() and len(o) > 2 else o for o in options)
    return cli.run(parser, list(double))


if __name__ == "__main__":
    sys.exit(main())
