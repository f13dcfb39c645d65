"""`vit-jax predict WEIGHTS PICTURE ...`: what is on pictures."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, positive

    parser = add_command(
        subparsers,
        "predict",
        run,
        "say what is on pictures",
        "vit-jax predict runs/photos photo.jpg",
    )
    parser.add_argument(
        "weights", help="a file or name of weights, or the workdir of a finished run"
    )
    parser.add_argument("pictures", nargs="+", metavar="picture", help="picture files")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="WORDS",
        help='of LiT weights: what may be on the pictures, e.g. "a cat" "a dog"',
    )
    parser.add_argument("--top", type=positive, default=5, help="classes to name (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the most probable classes of each picture."""
    import json

    from vit_jax.errors import UserError
    from vit_jax.evaluation.zero_shot import classify
    from vit_jax.pretrained import PretrainedLiT, load

    vit = load(args.weights)
    if args.labels is None:
        answers = vit.predict(args.pictures, top=args.top)
    elif isinstance(vit, PretrainedLiT):
        answers = classify(vit, args.pictures, args.labels, top=args.top)
    else:
        raise UserError(
            "--labels is for LiT weights, these have classes of their own: leave it out"
        )
    if args.json:
        rows = [
            {"picture": p, "classes": [{"label": n, "probability": q} for n, q in a]}
            for p, a in zip(args.pictures, answers, strict=True)
        ]
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for picture, answer in zip(args.pictures, answers, strict=True):
        print(picture)
        for label, probability in answer:
            print(f"  {probability:6.1%}  {label}")
