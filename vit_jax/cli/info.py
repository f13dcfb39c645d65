"""`vit-jax info FILE`: what a file of weights is."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, add_heads

    parser = add_command(
        subparsers, "info", run, "say what a file of weights is", "vit-jax info runs/digits"
    )
    parser.add_argument(
        "weights", help="a file or name of weights, or the workdir of a finished run"
    )
    add_heads(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints what the arrays and the notes beside them tell."""
    from vit_jax.checkpoints import (
        NONFINITE,
        container,
        hub,
        huggingface,
        nonfinite,
        open_arrays,
        read_layout,
    )
    from vit_jax.escape import printable, to_json
    from vit_jax.models.shapes import listing
    from vit_jax.pretrained import class_labels, find_weights, preprocess_for, read_weights

    path, asked = find_weights(args.weights)
    told = {"heads": args.heads, "window": args.window}
    _, spec, notes = read_weights(path, asked, values=False, **told)
    labels, preprocess = class_labels(path, notes, spec), preprocess_for(notes, spec, spec)
    with open_arrays(path) as stored:
        layout = read_layout(stored, path, tower=asked, **told)
        count = len(stored) - len(layout.left_out)
        types = sorted({str(a.dtype) for a in layout.arrays.values()})
        bad = nonfinite(layout.arrays)
    kind, place, names = container(path), hub.origin(path), hub.other_names(path)
    licence = huggingface.licence(path)
    size = sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file())
    if args.json:
        facts = {
            "file": str(path),
            "kind": kind,
            "origin": place,
            "names": names,
            "licence": licence,
            "architecture": spec.name,
            **spec.facts(),
            "parameters": spec.num_parameters,
            "grid_size": spec.grid_size,
            "tokens": spec.num_tokens,
            "arrays": count,
            "stored_types": types,
            "key_style": layout.style,
            "left_out": layout.left_out,
            "known_from": layout.about.get("known_from", {}),
            "bytes": size,
            "nonfinite": bad,
            "labels": labels,
            "loss": notes.loss if notes else None,
            "preprocess": preprocess,
        }
        print(to_json(facts, indent=1))
        return
    head = "none" if spec.num_classes is None else f"{spec.num_classes:,} classes"
    if labels:
        head += f": {'; '.join(labels[:5])}{'; ...' if len(labels) > 5 else ''}"
    if notes and notes.loss == "sigmoid":
        head += " (each for itself, by a sigmoid)"
    lines = {
        "file": path,
        "from": place,
        "also named": ", ".join(names),
        "licence": licence,
        **spec.summary(),
        "head": head,
        "preprocessing": preprocess,
        "stored as": f"{kind}, {', '.join(types)}; {count} arrays, {layout.style} keys",
        **_told(layout),
        "values": f"no weights to use: {listing(NONFINITE, bad)}" if bad else "all finite",
        "size": f"{size / 2**20:,.1f} MiB",
    }
    for title, text in lines.items():
        if text:
            print(f"{title:<14} {printable(str(text))}")


def _told(layout) -> dict[str, str]:
    """Of a file of PyTorch's: what isn't in it and where it was known from; what is left out."""
    from vit_jax.models.shapes import listing

    places = [
        f"{field} from {place}" for field, place in layout.about.get("known_from", {}).items()
    ]
    return {
        "not in the file": "; ".join(places),
        "left out": listing("arrays", [*layout.left_out]),
    }
