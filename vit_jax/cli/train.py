"""`vit-jax train`: trains from a configuration, or fine-tunes on a folder of images."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(
        subparsers,
        "train",
        run,
        "train, or go on with a run that was stopped",
        "vit-jax train --config=digits --workdir=runs/digits --config.total_steps=300\n"
        "  vit-jax train --data=photos --weights=Ti_16.npz --workdir=runs/photos",
    )
    parser.usage = (
        "vit-jax train (--config=FILE[:ARG] | --data=DIR) [--weights=FILE] --workdir=DIR [--json] "
        "[--config.FIELD=VALUE ...]"
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a training run."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a configuration file, or the name of one of the package's")
    what.add_argument("--data", help="a folder of images, a table, a TFDS name: fine-tune")
    parser.add_argument("--weights", help="the weights to start from, a file or a name")
    parser.add_argument(
        "--workdir", required=True, help="the folder of this run, or gs://BUCKET/RUN"
    )
    for name, kind, meaning in (
        ("--coordinator", str, "host:port of process 0, if several processes train together"),
        ("--num-processes", int, "their number"),
        ("--process-id", int, "the number of this one, from 0"),
    ):
        parser.add_argument(name, type=kind, help=meaning)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, takes_fields=True)
    options_help = parser.format_help
    parser.format_help = lambda: options_help() + _fields_help()  # type: ignore[method-assign]


def _fields_help() -> str:
    from vit_jax.training.config import FIELDS

    lines = ["", "fields of the configuration, their defaults, what they mean:"]
    for field in FIELDS.values():
        is_choice = field.values and isinstance(field.default, str)
        choices = f" ({', '.join(field.values)})" if is_choice else ""
        default = "empty" if field.default in ("", ()) else field.default
        lines.append(f"  {field.name:<29} {default!s:<10} {field.help}{choices}")
    return "\n".join([*lines, ""])


def run(args: argparse.Namespace) -> int:
    """Trains and prints how it ended."""
    from vit_jax.allocator import keep_memory

    keep_memory()
    import dataclasses
    import json

    from vit_jax import training
    from vit_jax.cli import EXIT_INTERRUPTED
    from vit_jax.errors import UserError
    from vit_jax.training.options import load_config, override
    from vit_jax.training.processes import connect, is_main_process

    if not args.workdir:
        raise UserError("--workdir is empty: name the folder of this run")
    recipe = args.config if args.data is None else f"finetune_folder:{args.data}"
    weights = [f"--config.model_or_filename={args.weights}"] if args.weights else []
    # Before the others are waited for, whose time-out is one of its fields.
    config = override(load_config(recipe), [*args.fields, *weights])
    connect(args.coordinator, args.num_processes, args.process_id)
    result = training.run(config, args.workdir)
    if is_main_process():
        print(json.dumps(dataclasses.asdict(result)) if args.json else result.summary)
    return 0 if result.finished else EXIT_INTERRUPTED
