"""`vit-jax report WORKDIR`: how a training run went, as a page and an image."""

import argparse
from typing import Any


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, positive

    help = "show how a run went: curves, confusion matrix, calibration, mistakes"
    example = "vit-jax report runs/digits --out=page.html"
    add = add_command(subparsers, "report", run, help, example).add_argument
    add("workdir", help="of a run, also of one that has not finished")
    out = "page.html or page.png; by default report.html and report.png in the workdir"
    add("--out", metavar="FILE", help=out)
    add("--batch", type=positive, default=64, help="images at once (default: 64)")
    add("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Writes the report, and prints what it says in short."""
    from vit_jax.errors import UserError
    from vit_jax.escape import printable, to_json
    from vit_jax.evaluation.report import write_report
    from vit_jax.files import as_path, is_bucket
    from vit_jax.page import kind_of
    from vit_jax.training.outputs import evaluate_workdir
    from vit_jax.training.workdir import PAGE, REPORT

    folder = as_path(args.workdir)
    paths = [as_path(args.out)] if args.out else [folder / PAGE, folder / REPORT]
    kind_of(paths[0])  # What can't be written is told before the work.
    if args.out and not is_bucket(args.out) and not paths[0].parent.is_dir():
        raise UserError(f"{args.out}: there is no folder {paths[0].parent}: make it first")
    report = evaluate_workdir(folder, batch_size=args.batch)
    for path in paths:
        write_report(report, path)
    scores, files = report.scores, [str(path) for path in paths]
    if not args.json:
        for line in filter(None, (report.title, report.note, f"see {' and '.join(files)}")):
            print(printable(line))
        return
    answer: dict[str, Any] = {"title": report.title, "note": report.note, "files": files}
    if scores:
        answer |= {n: getattr(scores, n) for n in ("count", "skipped", "top1", "top5", "loss")}
        answer["calibration_error"] = scores.calibration.error
        counts = scores.confusion.sum(axis=1)
        columns = {"count": counts, "recall": scores.per_class, "precision": scores.precision}
        values = zip(report.labels, *(column.tolist() for column in columns.values()), strict=True)
        answer["per_class"] = [dict(zip(("label", *columns), row, strict=True)) for row in values]
        if scores.by_label:
            answer |= scores.by_label.to_dict(report.labels)
    print(to_json(answer, indent=1))
