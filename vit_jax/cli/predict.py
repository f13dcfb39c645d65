"""`vit-jax predict WEIGHTS PICTURE ...`: what is on pictures."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(
        subparsers,
        "predict",
        run,
        "say what is on pictures",
        "vit-jax predict runs/photos photo.jpg",
    )
    parser.add_argument("weights", help="an .npz file, or the workdir of a finished run")
    parser.add_argument("pictures", nargs="+", metavar="picture", help="picture files")
    parser.add_argument("--top", type=int, default=5, help="classes to name (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints the most probable classes of each picture."""
    import json

    from vit_jax.pretrained import load

    vit = load(args.weights)
    answers = vit.predict(args.pictures, top=args.top)
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
