"""`vit-jax data`: pictures before training on them."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command and those below it."""
    from vit_jax.cli import add_command

    group = add_command(
        subparsers,
        "data",
        None,
        "look at pictures before training on them",
        "vit-jax data prepare photos photos.tfds",
    )
    commands = group.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_prepare(commands)


def _add_prepare(commands) -> None:
    from vit_jax.cli import add_command

    parser = add_command(
        commands,
        "prepare",
        prepare,
        "write pictures as a TFDS data set, a few large files that any host reads by their path",
        "vit-jax data prepare photos/labels.csv photos.tfds",
    )
    parser.add_argument("source", help="a folder, table, .npz, TFDS name, ...: see docs/data.md")
    parser.add_argument("destination", help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="chooses the test pictures, if need be")
    parser.add_argument(
        "--tfds-data-dir", default="", metavar="DIR", help="where TFDS keeps its data sets"
    )
    parser.add_argument(
        "--tfds-manual-dir", default="", metavar="DIR", help="where downloaded archives lie"
    )
    parser.add_argument(
        "--corrupt",
        choices=("error", "skip"),
        default="error",
        help="what to do with unreadable pictures",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def prepare(args: argparse.Namespace) -> None:
    """Prints what was written."""
    import json

    from vit_jax import data

    counts = data.prepare_tfds(
        args.source,
        args.destination,
        seed=args.seed,
        data_dir=args.tfds_data_dir,
        manual_dir=args.tfds_manual_dir,
        corrupt=args.corrupt,
    )
    if args.json:
        print(json.dumps({"destination": args.destination, "splits": counts}, indent=1))
        return
    parts = ", ".join(f"{count:,} in {split}" for split, count in counts.items())
    print(f"{args.destination} holds {parts}: train with --config.dataset={args.destination}")
