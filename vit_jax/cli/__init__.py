"""The command `vit-jax`. One file a command; each parses, calls the library and prints."""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vit_jax.errors import UserError

COMMANDS = ("models", "info", "convert", "train", "evaluate", "predict", "data")

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # "Try again": the run was stopped before its end and has saved its state.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      the exit status: 0, 2 after a mistake of the user's, or 75 if a run was stopped before its
      end.
    """
    parser = _Parser(
        prog="vit-jax", description="Vision Transformers in JAX: train, look, predict."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"vit_jax.cli.{name}").add_parser(subparsers)
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and not getattr(args, "takes_fields", False):
            parser.error(f"unknown argument {rest[0]}")
        args.fields = rest
        return args.run(args) or 0
    except UserError as e:
        print(f"vit-jax: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("vit-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough. Python's own last flush must not complain
        # either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(
                f"vit-jax: {e.filename or 'a file'} can't be written ({e.strerror}): make room, "
                "then run the same command again",
                file=sys.stderr,
            )
            return EXIT_USER_ERROR
        raise


def add_command(subparsers, name: str, run, help: str, example: str) -> argparse.ArgumentParser:
    """A command's parser, whose help ends with an example."""
    parser = subparsers.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser
