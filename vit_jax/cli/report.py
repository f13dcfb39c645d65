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
    import json

    from vit_jax.errors import UserError
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
        print("\n".join(filter(None, (report.title, report.note, f"see {' and '.join(files)}"))))
        return
    answer: dict[str, Any] = {"title": report.title, "note": report.note, "files": files}
    if scores:
        answer |= {n: getattr(scores, n) for n in ("count", "skipped", "top1", "top5", "loss")}
        answer["calibration_error"] = scores.calibration.error
        counts = scores.confusion.sum(axis=1)
        columns = {"count": counts, "recall": scores.per_class, "precision": scores.precision}
        values = zip(report.labels, *(column.tolist() for column in columns.values()), strict=True)
        answer["per_class"] = [
            _finite(dict(zip(("label", *columns), row, strict=True))) for row in values
        ]
    print(json.dumps(_finite(answer), indent=1))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With None for NaN, which JSON doesn't know."""
    return {k: None if v != v else v for k, v in values.items()}
