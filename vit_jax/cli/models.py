"""`vit-jax models`: the models by name, and the table of the AugReg checkpoints."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.escape import to_json

_ADAPTED = "imagenet2012"  # What "best after fine-tuning" is said of.

# The columns of the AugReg table that a line of text has room for, beside the one it is sorted by.
_SHOWN = ("name", "ds", "final_val", "final_test", "filename")
_SHOWN_ADAPTED = (
    *("name", "ds", "adapt_ds", "adapt_resolution"),
    *("adapt_final_val", "adapt_final_test", "adapt_filename"),
)


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, positive

    parser = add_command(
        subparsers,
        "models",
        run,
        "list the official models, or search the AugReg checkpoints",
        "vit-jax models",
    )
    parser.add_argument(
        "--augreg",
        nargs="?",
        const="",
        metavar="QUERY",
        help="the AugReg checkpoints for which a query over the columns of their table holds, like "
        "\"name=='B/16' and ds=='i21k'\"; pre-trained ones, or fine-tuned ones if the query or "
        "--sort names an adapt_ column",
    )
    parser.add_argument("--sort", metavar="COLUMN", help="with --augreg: highest first")
    parser.add_argument("--top", type=positive, metavar="N", help="with --augreg: only the first N")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints a table."""
    if args.augreg is not None:
        _print_augreg(_search(args.augreg, args.sort, args.top), args)
        return
    if args.sort is not None or args.top is not None:
        raise UserError("--sort and --top are for --augreg: add it")
    rows = list(_models())
    if args.json:
        print(to_json(rows, indent=1))
        return
    print(
        f"{'name':<20} {'parameters':>11} {'GFLOPs':>8} {'width':>5} {'layers':>6} {'heads':>5} "
        f"{'tokens':>6}  weights"
    )
    for row in rows:
        folders = [name.rpartition("/")[0] for name in row["sources"]]
        heads = row["num_heads"] or "-"
        if isinstance(heads, tuple):
            heads = f"{heads[0]}-{heads[-1]}"
        print(
            f"{row['name']:<20} {row['parameters'] / 1e6:>9.1f} M {row['flops'] / 1e9:>8.1f} "
            f"{row['hidden_size']:>5} {row['num_layers']:>6} {heads:>5} "
            f"{row['tokens']:>6}  {', '.join(dict.fromkeys(folders)) or '-'}"
        )
    print(
        "With a head of 1,000 classes, for an image of 224x224 pixels, of Swin Transformers of as "
        "many as they\nwere published for; a multiplication and an addition are two FLOPs.\n"
        "Of LiT: the parameters of both towers, the "
        "rest of the image tower, which has no head.\nLoad weights by FOLDER/NAME; --json lists "
        "those names, --augreg searches the AugReg checkpoints."
    )


def _models() -> Iterator[dict[str, Any]]:
    from vit_jax.checkpoints import hub
    from vit_jax.models import LIT_VARIANTS, Spec, create_lit, create_model, list_models
    from vit_jax.models.cost import flops

    models = {name: create_model(name, num_classes=1000) for name in list_models()}
    for name, model in (models | {name: create_lit(name) for name in LIT_VARIANTS}).items():
        spec = Spec(model, model.image_tower().usual_size, 3)
        image = spec.image_tower().module
        own = image.architecture()
        yield {
            "name": name,
            "parameters": spec.num_parameters,
            "flops": flops(image, spec.image_size),
            "image_size": spec.image_size,
            "tokens": spec.num_tokens,
            "patch_size": getattr(image, "patch_size", image.stride),
            "hidden_size": image.hidden_size,
            "num_layers": image.num_layers,
            "num_heads": own.get("num_heads", own.get("heads")),
            "classifier": image.classifier,
            "sources": hub.sources(name),
        }


def _search(query: str, column: str | None, top: int | None) -> list[dict[str, Any]]:
    from vit_jax.checkpoints import augreg, hub

    rows = augreg.read_index(hub.fetch(hub.AUGREG_INDEX))
    if query:
        rows = augreg.query(rows, query)
    if column:
        rows = augreg.sort(rows, column)
    if "adapt_" not in f"{query} {column}":
        # There is a row for each fine-tuning, and what was asked for is what they started from.
        rows = list({row["filename"]: _pretrained_part(row) for row in reversed(rows)}.values())
        rows.reverse()
    return rows[:top]


def _pretrained_part(row: dict[str, Any]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if not column.startswith("adapt_")}


def _print_augreg(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    if args.json:
        print(to_json(rows, indent=1))
        return
    if not rows:
        print("no AugReg checkpoint fits the query")
        return
    shown = _SHOWN_ADAPTED if "adapt_filename" in rows[0] else _SHOWN
    if args.sort and args.sort not in shown:
        shown = (*shown[:-1], args.sort, shown[-1])
    table = [shown, *([_text(row.get(column)) for column in shown] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
    for line in table:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())
    print(f'{len(rows):,} checkpoints. Load one with vit_jax.load("augreg/FILENAME").')
    _print_choices(sorted({str(row["name"]) for row in rows}))


def _print_choices(models: Sequence[str]) -> None:
    """Of models, by the names in the table, the recommended checkpoint and the best in the end."""
    from vit_jax.checkpoints import augreg, hub

    rows = augreg.read_index(hub.fetch(hub.AUGREG_INDEX))
    for model in (name.replace("/", "_").replace("+", "_") for name in models):
        with contextlib.suppress(UserError):  # Not of every model there is one.
            print(f"augreg/{model}, recommended: {augreg.recommended(rows, model)}")
            best = augreg.best_adapted(rows, model, _ADAPTED)
            print(
                f"augreg/{model}+{_ADAPTED}, best after fine-tuning: {best['adapt_filename']} "
                f"({best['adapt_final_val']:.4g} on its held-out part)"
            )


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
