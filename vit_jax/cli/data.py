"""`vit-jax data`: images before training on them."""

import argparse
import os
import sys
from typing import Any


def add_parser(subparsers) -> None:
    """Adds the command and those below it."""
    from vit_jax.cli import add_command

    group = add_command(
        subparsers,
        "data",
        None,
        "look at images before training on them",
        "vit-jax data check photos --out report\n  vit-jax data prepare photos photos.tfds",
    )
    commands = group.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_prepare(commands)
    _add_check(commands)
    _add_show(commands)


def _add_prepare(commands) -> None:
    from vit_jax.cli import add_command

    parser = add_command(
        commands,
        "prepare",
        prepare,
        "write images as a TFDS data set, a few large files that any host reads by their path",
        "vit-jax data prepare photos/labels.csv photos.tfds",
    )
    parser.add_argument("source", help="a folder, table, .npz, TFDS name, ...: see docs/data.md")
    parser.add_argument("destination", help="the folder to make")
    _add_seed_and_places(parser)
    parser.add_argument(
        "--corrupt",
        choices=("error", "skip"),
        default="error",
        help="what to do with unreadable images",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_check(commands) -> None:
    from vit_jax.cli import add_command

    parser = add_command(
        commands,
        "check",
        check,
        "read every image and tell what training would suffer from; exit status 1 if something",
        "vit-jax data check photos --out report",
    )
    parser.add_argument("source", help="a folder, table, .npz, TFDS name, ...: see docs/data.md")
    parser.add_argument(
        "--split",
        action="append",
        help='"train", "test[:10%%]", ...; may be given several times; by default all there are',
    )
    _add_seed_and_places(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write check.txt and check.png, if anywhere; and groups.csv, a table that "
        "keeps copies of an image together, if a fifth is held out",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_show(commands) -> None:
    from vit_jax.cli import add_command, positive

    parser = add_command(
        commands,
        "show",
        show,
        "draw what training makes of some images",
        "vit-jax data show photos --augment medium1 --out page.png",
    )
    parser.add_argument("source", help="a folder, table, .npz, TFDS name, ...: see docs/data.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--augment", default="none", help="none, light1, ... strong2 (default: none)")
    what.add_argument("--pp", help='the operations, e.g. "resize(224)|flip"')
    parser.add_argument(
        "--levels", default="", help="black and white, if not 8-bit, as config.levels of a run"
    )
    parser.add_argument("--crop", type=positive, default=224, help="pixels (default: 224)")
    parser.add_argument("--split", default="train", help="which part (default: train)")
    parser.add_argument("--count", type=positive, default=6, help="images (default: 6)")
    _add_seed_and_places(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the PNG file to write")


def _add_seed_and_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="chooses the test images, if need be")
    parser.add_argument(
        "--tfds-data-dir", default="", metavar="DIR", help="where TFDS keeps its data sets"
    )
    parser.add_argument(
        "--tfds-manual-dir", default="", metavar="DIR", help="where downloaded archives lie"
    )


def _seed_and_places(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "seed": args.seed,
        "data_dir": args.tfds_data_dir,
        "manual_dir": args.tfds_manual_dir,
    }


def prepare(args: argparse.Namespace) -> None:
    """Prints what was written."""
    from vit_jax import data
    from vit_jax.escape import to_json

    counts = data.prepare_tfds(
        args.source, args.destination, corrupt=args.corrupt, **_seed_and_places(args)
    )
    if args.json:
        print(to_json({"destination": args.destination, "splits": counts}, indent=1))
        return
    parts = ", ".join(f"{count:,} in {split}" for split, count in counts.items())
    print(f"{args.destination} holds {parts}: train with --config.dataset={args.destination}")


def check(args: argparse.Namespace) -> int:
    """Prints a summary; 1 if there is something that training would suffer from."""
    from vit_jax.cli import progress_bar
    from vit_jax.data import check as checking
    from vit_jax.data.splits import open_all, open_source
    from vit_jax.escape import to_json

    options = _seed_and_places(args)
    if args.split:
        sources = {name: open_source(args.source, name, **options) for name in args.split}
    else:
        opened = open_all(args.source, **options)
        sources = {name: source for name, source in opened.items() if len(source)}
    with progress_bar("images read") as progress:
        result = checking.check(sources, progress=progress)
    written = checking.write_report(result, args.out, args.source) if args.out else []
    if args.json:
        print(to_json(checking.as_dict(result), indent=1))
    else:
        print(checking.summary(result))
        if listed := checking.details(result, limit=5):
            print(f"\n{listed}")
    if args.out and not args.split and os.path.isdir(os.path.expanduser(args.source)):
        written += checking.write_groups(sources, result, args.out)
    if written and not args.json:
        print(f"\nWritten: {', '.join(written)}")
    return 1 if result.problems else 0


def show(args: argparse.Namespace) -> None:
    """Draws a page of images as a training run would see them."""
    from functools import partial

    from vit_jax import data
    from vit_jax.data.check import draw_page
    from vit_jax.errors import UserError
    from vit_jax.training.config import check_config, default_config, mixup
    from vit_jax.training.inputs import preprocessing
    from vit_jax.training.mixing import mix_images

    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}, expected 0 to {2**32 - 1}")
    config = default_config()
    config.augment, config.pp.crop, config.levels = args.augment, args.crop, args.levels
    config = check_config(config)
    config.pp.train = args.pp or ""
    parameter = mixup(config)
    source = data.open_source(args.source, args.split, **_seed_and_places(args))
    operations, _, notes = preprocessing(config, source)
    for note in notes:
        print(note, file=sys.stderr)
    draw_page(
        args.out,
        source,
        operations,
        count=args.count,
        seed=args.seed,
        mix=partial(mix_images, seed=args.seed, mixup=parameter) if parameter else None,
    )
    print(args.out)
