"""`vit-jax evaluate WEIGHTS [DATA]`: how good weights are on labelled images."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, positive

    parser = add_command(
        subparsers,
        "evaluate",
        run,
        "measure accuracy and loss on labelled images",
        "vit-jax evaluate runs/digits --csv=predictions.csv",
    )
    parser.add_argument(
        "weights", help="a file or name of weights, or the workdir of a finished run"
    )
    parser.add_argument(
        "data",
        nargs="?",
        help="a folder of images, a table, a TFDS name; by default the run's own",
    )
    parser.add_argument(
        "--split", help='"test", "train[:10%%]", ...; by default the run\'s own, or test'
    )
    parser.add_argument("--batch", type=positive, default=64, help="images at once (default: 64)")
    parser.add_argument(
        "--corrupt",
        choices=("error", "skip"),
        default="error",
        help="what to do with unreadable ones",
    )
    parser.add_argument("--csv", metavar="FILE", help="write every prediction to this file")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints top-1, top-5, loss and the accuracy of each class."""
    import dataclasses
    import json

    import numpy as np

    from vit_jax import data
    from vit_jax.errors import UserError
    from vit_jax.evaluation.images import evaluate_images, write_predictions
    from vit_jax.evaluation.zero_shot import zero_shot
    from vit_jax.pretrained import PretrainedLiT, load
    from vit_jax.training.workdir import check_named, is_workdir, read_config

    vit = load(args.weights)
    dataset, split, seed, loss, places = args.data, "test", 0, "softmax", {}
    if is_workdir(args.weights):
        config = read_config(args.weights)
        places = {"data_dir": config.tfds_data_dir, "manual_dir": config.tfds_manual_dir}
        if dataset is None:
            check_named(args.weights, config)
            dataset, split = config.dataset, config.splits.test
            seed, loss = config.seed, config.loss
    elif dataset is None:
        raise UserError(
            f"on which images? {args.weights} doesn't tell, only a run does: "
            "add a folder of images or a known name"
        )
    source = data.open_source(dataset, args.split or split, seed=seed, **places)
    if isinstance(vit, PretrainedLiT):
        scores = zero_shot(vit, source, batch_size=args.batch, corrupt=args.corrupt)
        vit = dataclasses.replace(vit, labels=source.labels)
    else:
        scores = evaluate_images(
            vit, source, batch_size=args.batch, corrupt=args.corrupt, loss=loss
        )
    labels = [vit.label(i) for i in range(len(scores.per_class))]
    counts = scores.confusion.sum(axis=1)
    if args.csv:
        write_predictions(args.csv, source, vit, scores)
    if args.json:
        per_class = [
            {"label": label, "accuracy": None if np.isnan(share) else share, "count": count}
            for label, share, count in zip(
                labels, scores.per_class.tolist(), counts.tolist(), strict=True
            )
        ]
        names = ("count", "skipped", "top1", "top5", "loss")
        print(
            json.dumps({n: getattr(scores, n) for n in names} | {"per_class": per_class}, indent=1)
        )
        return
    right = int(np.trace(scores.confusion))
    print(f"top-1     {scores.top1:7.2%}  {right:,} of {scores.count:,}")
    print(f"top-5     {scores.top5:7.2%}")
    print(f"loss      {scores.loss:7.4f}")
    if scores.skipped:
        print(f"skipped   {scores.skipped:7,}  unreadable images, not counted")
    print("\naccuracy of each class")
    width = min(max(map(len, labels)), 40)
    for label, share, count in zip(labels, scores.per_class, counts, strict=True):
        if count:
            print(f"  {label[:40]:<{width}} {share:7.1%}  of {count:,}")
    if args.csv:
        print(f"\npredictions in {args.csv}")
