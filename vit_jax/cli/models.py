"""`vit-jax models`: the models by name, and the table of the AugReg checkpoints."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from vit_jax.errors import UserError

_IMAGE = (224, 224)  # What every published model was pre-trained at.

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
    if args.json:
        print(json.dumps(list(_models()), indent=1))
        return
    print(
        f"{'name':<20} {'parameters':>11} {'GFLOPs':>8} {'width':>5} {'layers':>6} {'heads':>5} "
        f"{'tokens':>6}  weights"
    )
    for row in _models():
        folders = [name.rpartition("/")[0] for name in row["sources"]]
        print(
            f"{row['name']:<20} {row['parameters'] / 1e6:>9.1f} M {row['flops'] / 1e9:>8.1f} "
            f"{row['hidden_size']:>5} {row['num_layers']:>6} {row['num_heads'] or '-':>5} "
            f"{row['tokens']:>6}  {', '.join(dict.fromkeys(folders)) or '-'}"
        )
    print(
        f"With a head of 1,000 classes, for an image of {_IMAGE[0]}x{_IMAGE[1]} pixels; a "
        "multiplication and an addition are two FLOPs.\nOf LiT: the parameters of both towers, the "
        "rest of the image tower, which has no head.\nLoad weights by FOLDER/NAME; --json lists "
        "those names, --augreg searches the AugReg checkpoints."
    )


def _models() -> Iterator[dict[str, Any]]:
    from vit_jax.models import create_model, list_models
    from vit_jax.models.lit import LIT_VARIANTS

    for name in list_models():
        yield _row(name, create_model(name, num_classes=1000))
    for name, fields in LIT_VARIANTS.items():
        image = create_model(fields["image"], num_classes=fields["out_dim"][0])
        yield _row(name, image, _text_parameters(fields) + 1)  # And the temperature.


def _row(name: str, model: Any, further_parameters: int = 0) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from vit_jax.checkpoints import hub
    from vit_jax.models.cost import cost

    image = cost(model, jax.ShapeDtypeStruct((1, *_IMAGE, 3), jnp.float32))
    rows, columns = model.grid_size(_IMAGE)
    return {
        "name": name,
        "parameters": image.parameters + further_parameters,
        "flops": image.flops,
        "image_size": _IMAGE,
        "tokens": rows * columns + getattr(model, "has_class_token", False),
        "patch_size": model.patch_size,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_layers,
        "num_heads": getattr(model, "num_heads", None),
        "classifier": getattr(model, "classifier", "gap"),
        "sources": hub.sources(name),
    }


def _text_parameters(fields: dict[str, Any]) -> int:
    import jax
    import jax.numpy as jnp

    from vit_jax.models.cost import cost
    from vit_jax.models.lit import TEXT_MODELS

    tower = TEXT_MODELS[fields["text_model"]](num_classes=fields["out_dim"][1], **fields["text"])
    return cost(tower, jax.ShapeDtypeStruct((1, 16), jnp.int32)).parameters


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
        print(json.dumps(rows, indent=1))
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


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
