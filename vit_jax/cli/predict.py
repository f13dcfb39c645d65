"""`vit-jax predict WEIGHTS IMAGE ...`: what is on images."""

import argparse
from collections.abc import Callable


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, add_heads, positive

    example = "vit-jax predict runs/photos photo.jpg"
    parser = add_command(subparsers, "predict", run, "say what is on images", example)
    add = parser.add_argument
    add("weights", help="a file or name of weights, or the workdir of a finished run")
    what = "image files, folders, patterns in quotes, or tables; files may stand last, too"
    images = add("images", nargs="+", metavar="image", help=what)
    images.required = False  # --labels takes all that follows it, see `_split`.
    words = 'of LiT weights: what may be on the images, e.g. "a cat" "a dog"'
    add("--labels", nargs="+", metavar="WORDS", help=words)
    add("--top", type=_top, default=5, help='classes to name, or "all" (default: 5)')
    table = "write a row for each image to this file; stopped and started again, it goes on there"
    add("--csv", metavar="FILE", help=table)
    add("--batch", type=positive, default=64, help="images at once with --csv (default: 64)")
    add("--force", action="store_true", help="replace the file of --csv")
    add_heads(parser)
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the most probable classes of each image that can be read, and names the others."""
    import functools
    import sys

    from vit_jax import data
    from vit_jax.cli import tell_mistakes
    from vit_jax.errors import UserError
    from vit_jax.escape import printable, to_json
    from vit_jax.evaluation.many import check_target
    from vit_jax.evaluation.zero_shot import classify
    from vit_jax.pretrained import load

    labels, wanted = _split(args.labels, args.images)
    images, notes = data.list_images(wanted)
    for note in notes:
        print(note, file=sys.stderr)
    if args.csv:
        check_target(args.csv, [args.weights, *wanted, *images], args.force)
    vit = load(args.weights, heads=args.heads, window=args.window)
    if labels is not None and not vit.classifies_by_text:
        raise UserError(
            "--labels is for LiT weights, these have classes of their own: leave it out"
        )
    if args.csv:
        return _write_csv(args, vit, images, labels)
    top = args.top or sys.maxsize
    look = functools.partial(vit.predict, top=top)
    if labels is not None:
        look = functools.partial(classify, vit, labels=labels, top=top)
    answers, mistakes = _each(look, images)
    # One mistake in all images is none of theirs, but e.g. of weights that give no classes.
    if not answers and len(set(mistakes)) == 1:
        raise UserError(mistakes[0])
    if args.json:
        rows = [
            {"picture": p, "classes": [{"label": n, "probability": q} for n, q in a]}
            for p, a in answers
        ]
        print(to_json(rows, indent=1))
    else:
        for image, answer in answers:
            print(printable(image))
            for label, probability in answer:
                print(f"  {probability:6.1%}  {printable(label)}")
    return tell_mistakes(mistakes)


def _write_csv(args: argparse.Namespace, vit, images: list[str], labels: list[str] | None) -> int:
    from vit_jax.cli import progress_bar, tell_mistakes
    from vit_jax.escape import printable, to_json
    from vit_jax.evaluation.many import write_predictions_csv

    options = {"top": args.top, "labels": labels, "batch_size": args.batch}
    options["overwrite"] = args.force
    with progress_bar("images") as progress:
        before, mistakes = write_predictions_csv(
            vit, images, args.csv, progress=progress, **options
        )
    if args.json:
        print(to_json({"csv": args.csv, "images": len(images), "unreadable": mistakes}))
    else:
        gone_on = f", {before:,} of them from before" if before else ""
        print(printable(f"predictions of {len(images):,} images in {args.csv}{gone_on}"))
    return tell_mistakes(mistakes)


def _top(text: str) -> int | None:
    from vit_jax.cli import positive

    return None if text == "all" else positive(text)


def _split(
    labels: list[str] | None, images: list[str] | None
) -> tuple[list[str] | None, list[str]]:
    """(labels, images): without images before them, the files at the end of the labels."""
    import os

    from vit_jax.errors import UserError

    if images:
        return labels, images
    words = list(labels or ())
    while words and os.path.isfile(words[-1]):
        words.pop()
    if not words or len(words) == len(labels or ()):
        last = f" ({words[-1]!r} is no file)" if words else ""
        raise UserError(
            f"no image was named{last}: write vit-jax predict WEIGHTS IMAGE ..., "
            "and of LiT weights --labels WORDS ... behind that"
        )
    return words, (labels or [])[len(words) :]


def _each(look: Callable[[list[str]], list], images: list[str]) -> tuple[list, list[str]]:
    """((image, answer) of each image, what is wrong with the others); 32 at once, and one by one
    where there is something wrong."""
    from vit_jax.errors import UserError

    answers: list = []
    mistakes: list[str] = []
    for start in range(0, len(images), 32):
        some = images[start : start + 32]
        try:
            answers += zip(some, look(some), strict=True)
        except UserError as e:
            if len(images) == 1:
                return [], [str(e)]
            for image in some:
                found, wrong = _each(look, [image])
                answers += found
                mistakes += wrong
    return answers, mistakes
