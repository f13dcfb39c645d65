"""`vit-jax evaluate WEIGHTS [DATA]`: how good weights are on labelled images."""

import argparse
from collections.abc import Iterator


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, add_heads, positive

    help = "measure accuracy and loss on labelled images"
    example = "vit-jax evaluate runs/digits --csv=predictions.csv"
    parser = add_command(subparsers, "evaluate", run, help, example)
    add = parser.add_argument
    add("weights", help="a file or name of weights, or the workdir of a finished run")
    add(
        "data", nargs="?", help="a folder of images, a table, a TFDS name; by default the run's own"
    )
    add("--split", help='"test", "train[:10%%]", ...; by default the run\'s own, or test')
    add("--batch", type=positive, default=64, help="images at once (default: 64)")
    corrupt = "what to do with unreadable ones"
    add("--corrupt", choices=("error", "skip"), default="error", help=corrupt)
    add("--csv", metavar="FILE", help="write every prediction to this file")
    add_heads(parser)
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints top-1, top-5, loss and the figures of each class or label."""
    import dataclasses
    import sys

    from vit_jax.escape import printable, to_json
    from vit_jax.evaluation.images import evaluate_images, write_predictions
    from vit_jax.evaluation.zero_shot import zero_shot
    from vit_jax.pretrained import load

    vit = load(args.weights, heads=args.heads, window=args.window)
    source, loss = _open_source(args)
    said = [*source.notes, *source.doubts]
    if args.data is not None and not args.split:  # Perhaps a part, held out for testing.
        said.append(
            f"of {source.name} the split test is taken, {len(source):,} images; --split names "
            "another, as --split=train+test for all"
        )
    for text in said:
        print(text, file=sys.stderr)
    options = {"batch_size": args.batch, "corrupt": args.corrupt}
    if vit.classifies_by_text:
        scores = zero_shot(vit, source, **options)
        vit = dataclasses.replace(vit, labels=source.labels)
    else:
        scores = evaluate_images(vit, source, loss=loss, **options)
    labels = [vit.label(i) for i in range(len(scores.per_class))]
    counts = scores.confusion.sum(axis=1).tolist()
    classes = list(zip(labels, scores.per_class.tolist(), counts, strict=True))
    if args.csv:
        write_predictions(args.csv, source, vit, scores)
    if args.json:
        facts = {k: getattr(scores, k) for k in ("count", "skipped", "top1", "top5", "loss")}
        facts["per_class"] = [
            {"label": label, "accuracy": share if count else None, "count": count}
            for label, share, count in classes
        ]
        if scores.by_label:
            facts |= scores.by_label.to_dict(labels)
        print(to_json(facts, indent=1))
        return
    for line in _lines(scores, labels):
        print(line)
    if args.csv:
        print(f"\n{printable(f'predictions in {args.csv}')}")


def _lines(scores, labels: list[str]) -> Iterator[str]:
    """The figures for a person."""
    from vit_jax.evaluation.metrics import THRESHOLD_RULE
    from vit_jax.page import elide

    right = int(scores.confusion.trace())
    yield f"top-1     {scores.top1:7.2%}  {right:,} of {scores.count:,}"
    yield f"top-5     {scores.top5:7.2%}"
    yield f"loss      {scores.loss:7.4f}"
    if scores.skipped:
        yield f"skipped   {scores.skipped:7,}  unreadable images, not counted"
    names = [elide(label, 40) for label in labels]
    width, found = max(map(len, names)), scores.by_label
    if found is None:
        yield "\naccuracy of each class"
        rows = zip(names, scores.per_class, scores.confusion.sum(axis=1), strict=True)
        yield from (
            f"  {n:<{width}} {share:7.1%}  of {count:,}" for n, share, count in rows if count
        )
        return
    there = int((found.count > 0).sum())
    yield f"mAP       {found.mean('average_precision'):7.2%}  mean over the {there:,} labels"
    yield f"F1        {found.mean('f1'):7.2%}  likewise, of probabilities of at least 0.5"
    yield f"best F1   {found.mean('best_f1'):7.2%}  with a threshold a label: {THRESHOLD_RULE}"
    if rest := len(names) - there:
        yield f"left out  {rest:7,}  labels that no image has"
    yield f"\n  {'each label':<{width}}      AP      F1  threshold  best F1"
    columns = (found.average_precision, found.f1, found.threshold, found.best_f1, found.count)
    for name, area, f1, threshold, best, count in zip(names, *columns, strict=True):
        if count:
            figures = f"{area:7.1%} {f1:7.1%} {threshold:10.4f} {best:8.1%}"
            yield f"  {name:<{width}} {figures}  of {count:,}"


def _open_source(args: argparse.Namespace):
    """(images, loss): those that were asked for, or the run's own; the loss is None where only the
    weights may know it."""
    from vit_jax import data
    from vit_jax.errors import UserError
    from vit_jax.training.workdir import check_named, is_workdir, read_config

    if not is_workdir(args.weights):
        if args.data is None:
            raise UserError(
                f"on which images? {args.weights} doesn't tell, only a run does: "
                "add a folder of images or a known name"
            )
        return data.open_source(args.data, args.split or "test"), None
    config = read_config(args.weights)
    places = {"data_dir": config.tfds_data_dir, "manual_dir": config.tfds_manual_dir}
    if args.data is not None:
        return data.open_source(args.data, args.split or "test", **places), config.loss
    check_named(args.weights, config)
    split = args.split or config.splits.test
    return data.open_source(config.dataset, split, seed=config.seed, **places), config.loss
