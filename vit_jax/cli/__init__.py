"""The command `vit-jax`. One file a command; each parses, calls the library and prints."""

import argparse
import difflib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from vit_jax import __version__
from vit_jax.errors import UserError, first_line, full_disk_explained
from vit_jax.signals import EXIT_INTERRUPTED, Answered, tell

COMMANDS = (
    *("models", "info", "convert", "train", "evaluate", "report", "predict", "embed"),
    *("explain", "data", "plan", "doctor"),
)

EXIT_USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would exit, and knows what a misspelt word may have meant.

    With the default `takes_fields=True` it leaves "--config.FIELD" alone. A program of commands
    that is given none shows its help.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as e:
            if near := _did_you_mean(str(value), map(str, action.choices or ())):
                e.message = f"invalid choice: {value!r}{near}"
            raise

    def parse_known_args(self, args=None, namespace=None):
        """Looks for unknown options first: they say more than what is missing for their sake."""
        args = sys.argv[1:] if args is None else list(args)
        if self._subparsers is not None and not args:
            self.print_help()
            self.exit(EXIT_USER_ERROR)
        fields = ("--config.", "--noconfig.") if self.get_default("takes_fields") else ()
        # Behind the name of a command stand the options of its own parser.
        own = itertools.takewhile(lambda arg: self._subparsers is None or arg[:1] == "-", args)
        for option in itertools.takewhile(lambda arg: arg != "--", own):
            name = option.partition("=")[0]
            known = name in self._option_string_actions or name.startswith(fields)
            if name[:2] == "--" and not known:
                near = _did_you_mean(name, self._option_string_actions)
                self.error(f"unknown option {name}{near}")
        return super().parse_known_args(args, namespace)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


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
    _open_streams()
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and not getattr(args, "takes_fields", False):
            parser.error(f"unknown argument {rest[0]!r}")
        args.fields = rest
        if hasattr(args, "first"):  # Before there is a second thread.
            args.first()
        with Answered(), full_disk_explained("what is printed"):
            status = args.run(args) or 0
            sys.stdout.flush()  # Else Python does so later, and its complaint is no line.
            return status
    except UserError as e:
        tell(f"vit-jax: {e}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        tell("vit-jax: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough; nor must Python's own last flush complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as e:
        if isinstance(e, OSError) or not (reason := _why_jax_does_not_start()):
            raise
        prefixes = ("JAX_", "XLA_", "CUDA_VISIBLE")
        settings = " ".join(f"{k}={v}" for k, v in os.environ.items() if k.startswith(prefixes))
        tell(
            f"vit-jax: JAX does not start{f' with {settings}' if settings else ''} ({reason}): "
            "correct or unset that, or see what vit-jax doctor says"
        )
        return EXIT_USER_ERROR


def _open_streams() -> None:
    """Has everything printed: what the console's encoding lacks as \\xe9 or \\u72d7, and where a
    stream is closed nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Closed by whoever started this.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _why_jax_does_not_start() -> str:
    """Asked again, JAX says again that it finds none of the devices it was told to use, or does not
    understand a setting; "" if it starts."""
    try:
        import jax

        jax.devices()
    except Exception as e:
        return first_line(e)
    return ""


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def tell_mistakes(mistakes: Sequence[str], limit: int = 20) -> int:
    """The exit status, after telling what is wrong with some images, of many the first."""
    for mistake in mistakes[:limit]:
        print(f"vit-jax: {mistake}", file=sys.stderr)
    if len(mistakes) > limit:
        print(f"vit-jax: and {len(mistakes) - limit:,} more that can't be read", file=sys.stderr)
    return EXIT_USER_ERROR if mistakes else 0


def add_heads(parser: argparse.ArgumentParser) -> None:
    """The options of all that load weights, for what files don't tell."""
    help = "attention heads, if neither a file of PyTorch's nor one beside it tells them"
    parser.add_argument("--heads", type=positive, metavar="N", help=help)
    help = "tokens that a Swin's windows are wide, if nothing tells them; else other windows"
    parser.add_argument("--window", type=positive, metavar="N", help=help)


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


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is called with the numbers of things done and of all: a bar on a terminal, a line
    for each tenth anywhere else."""
    if not sys.stderr.isatty():
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            if (tenths := 10 * done // max(total, 1)) > told:
                told = tenths
                print(f"{done:,} of {total:,} {what}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
