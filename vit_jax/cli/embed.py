"""`vit-jax embed WEIGHTS IMAGE ... --out FILE`: the features of images, for models of one's own."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, add_heads, positive

    help = "write what a network makes of images, for models of your own"
    example = "vit-jax embed facebook/dinov2-small photos --out features.npz"
    parser = add_command(subparsers, "embed", run, help, example)
    add = parser.add_argument
    add("weights", help="a file or name of weights, or the workdir of a finished run")
    what = "image files, folders, patterns in quotes, or tables"
    add("images", nargs="+", metavar="image", help=what)
    add("--out", required=True, metavar="FILE", help="the .npz or .parquet to write")
    kinds = "what the head would read (default), the class token, those of the patches, or all"
    add("--what", choices=("pooled", "class", "patches", "tokens"), default="pooled", help=kinds)
    layer = 'whose tokens: a block as "encoderblock_3"; by default the end'
    add("--layer", metavar="NAME", help=layer)
    add("--batch", type=positive, default=64, help="images at once (default: 64)")
    add("--force", action="store_true", help="replace a file of this name")
    add_heads(parser)
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the features, and names the images that can't be read."""
    import sys

    from vit_jax import data
    from vit_jax.cli import progress_bar, tell_mistakes
    from vit_jax.escape import printable, to_json
    from vit_jax.evaluation.many import check_target, write_features
    from vit_jax.pretrained import load

    images, notes = data.list_images(args.images)
    for note in notes:
        print(note, file=sys.stderr)
    check_target(args.out, [args.weights, *args.images, *images], args.force)
    vit = load(args.weights, heads=args.heads, window=args.window)
    options = {"what": args.what, "layer": args.layer, "batch_size": args.batch}
    options["overwrite"] = args.force
    with progress_bar("images") as progress:
        mistakes = write_features(vit, images, args.out, progress=progress, **options)
    if args.json:
        print(to_json({"out": args.out, "images": len(images), "unreadable": mistakes}))
    else:
        print(printable(f"{args.what} features of {len(images):,} images in {args.out}"))
    return tell_mistakes(mistakes)
