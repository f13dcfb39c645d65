"""The command `vit-jax`. One file a command; each parses, calls the library and prints."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vit_jax import __version__
from vit_jax.errors import UserError, full_disk_explained

COMMANDS = (
    *("models", "info", "convert", "train", "evaluate", "report", "predict", "explain"),
    *("data", "plan", "doctor"),
)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # "Try again": the run was stopped before its end and has saved its state.


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would exit, and knows what a misspelt option may have meant.

    With the default `takes_fields=True` it leaves "--config.FIELD" alone.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        """Looks for unknown options first: they say more than what is missing for their sake."""
        args = sys.argv[1:] if args is None else list(args)
        fields = ("--config.", "--noconfig.") if self.get_default("takes_fields") else ()
        for option in args if self._subparsers is None else ():
            name = option.partition("=")[0]
            if name == "--":
                break
            known = name in self._option_string_actions or name.startswith(fields)
            if name[:2] == "--" and not known:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown option {name}{f' (did you mean {near[0]}?)' if near else ''}")
        return super().parse_known_args(args, namespace)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
      the exit status: 0, 2 after a mistake of the user's, or 75 if a run was stopped before its
      end.
    """
    parser = Parser(prog="vit-jax", description="Vision Transformers in JAX: train, look, predict.")
    parser.add_argument("--version", action="version", version=f"vit-jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"vit_jax.cli.{name}").add_parser(subparsers)
    return run(parser, argv)


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parses, calls `args.run`, and tells mistakes in one line; see `main`."""
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and not getattr(args, "takes_fields", False):
            parser.error(f"unknown argument {rest[0]!r}")
        args.fields = rest
        with full_disk_explained():
            return args.run(args) or 0
    except UserError as e:
        print(f"vit-jax: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("vit-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough; nor must Python's own last flush complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


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
