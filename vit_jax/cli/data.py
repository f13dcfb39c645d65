"""`vit-jax data`: a look at pictures before training on them."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command and those below it."""
    from vit_jax.cli import add_command

    group = add_command(
        subparsers,
        "data",
        None,
        "look at pictures before training on them",
        "vit-jax data show photos --augment medium1 --out page.png",
    )
    commands = group.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_show(commands)


def _add_show(commands) -> None:
    from vit_jax.cli import add_command, positive

    parser = add_command(
        commands,
        "show",
        show,
        "draw what training makes of some pictures",
        "vit-jax data show photos --augment medium1 --out page.png",
    )
    parser.add_argument("source", help="a folder of pictures or a known name")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--augment", default="none", help="none, light1, ... strong2 (default: none)")
    what.add_argument("--pp", help='the operations, e.g. "resize(224)|flip"')
    parser.add_argument("--crop", type=positive, default=224, help="pixels (default: 224)")
    parser.add_argument("--split", default="train", help="which part (default: train)")
    parser.add_argument("--count", type=positive, default=6, help="pictures (default: 6)")
    parser.add_argument("--seed", type=int, default=0, help="chooses them and what is done to them")
    parser.add_argument("--out", required=True, metavar="FILE", help="the PNG file to write")


def show(args: argparse.Namespace) -> None:
    """Draws a page of pictures as a training run would see them."""
    from functools import partial

    from vit_jax import data
    from vit_jax.data.show import draw_page
    from vit_jax.errors import UserError
    from vit_jax.training.config import check_config, default_config
    from vit_jax.training.mixing import mix_pictures
    from vit_jax.training.task import mixup, train_spec

    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}, expected 0 to {2**32 - 1}")
    config = default_config()
    config.augment, config.pp.crop = args.augment, args.crop
    config = check_config(config)
    parameter = mixup(config)
    draw_page(
        args.out,
        data.open_source(args.source, args.split, seed=args.seed),
        data.parse(train_spec(config) if args.pp is None else args.pp),
        count=args.count,
        seed=args.seed,
        mix=partial(mix_pictures, seed=args.seed, mixup=parameter) if parameter else None,
    )
    print(args.out)
