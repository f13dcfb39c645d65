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
    images = add("images", nargs="+", metavar="image", help="image files; they may stand last, too")
    images.required = False  # --labels takes all that follows it, see `_split`.
    words = 'of LiT weights: what may be on the images, e.g. "a cat" "a dog"'
    add("--labels", nargs="+", metavar="WORDS", help=words)
    add("--top", type=positive, default=5, help="classes to name (default: 5)")
    add_heads(parser)
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the most probable classes of each image that can be read, and names the others."""
    import functools
    import sys

    from vit_jax.cli import EXIT_USER_ERROR
    from vit_jax.errors import UserError
    from vit_jax.escape import printable, to_json
    from vit_jax.evaluation.zero_shot import classify
    from vit_jax.pretrained import load

    labels, images = _split(args.labels, args.images)
    vit = load(args.weights, heads=args.heads)
    if labels is None:
        look = functools.partial(vit.predict, top=args.top)
    elif vit.classifies_by_text:
        look = functools.partial(classify, vit, labels=labels, top=args.top)
    else:
        raise UserError(
            "--labels is for LiT weights, these have classes of their own: leave it out"
        )
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
    for mistake in mistakes:
        print(f"vit-jax: {mistake}", file=sys.stderr)
    return EXIT_USER_ERROR if mistakes else 0


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
