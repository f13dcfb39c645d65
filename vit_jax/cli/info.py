"""`vit-jax info FILE`: what a file of weights is."""

import argparse
import json


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(
        subparsers, "info", run, "say what a file of weights is", "vit-jax info runs/digits"
    )
    parser.add_argument("weights", help="an .npz file, or the workdir of a finished run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints what the arrays and the notes beside them tell."""
    import dataclasses

    from vit_jax.checkpoints import key_style, read_npz
    from vit_jax.pretrained import find_weights, load

    path = find_weights(args.weights)
    vit = load(path)
    spec = vit.spec
    raw = read_npz(path)
    stored_types = sorted({str(a.dtype) for a in raw.values()})
    if args.json:
        facts = {
            "file": str(path),
            "architecture": spec.name,
            **dataclasses.asdict(spec),
            "grid_size": spec.grid_size,
            "tokens": spec.num_tokens,
            "parameters": spec.num_parameters,
            "arrays": len(raw),
            "stored_types": stored_types,
            "key_style": key_style(raw),
            "bytes": path.stat().st_size,
            "labels": vit.labels,
            "preprocess": vit.preprocess,
        }
        print(json.dumps(facts, indent=1))
        return
    (ph, pw), (h, w), (rows, columns) = spec.patch_size, spec.image_size, spec.grid_size
    head = "none" if spec.num_classes is None else f"{spec.num_classes:,} classes"
    if vit.labels:
        head += f": {', '.join(vit.labels[:5])}{', ...' if len(vit.labels) > 5 else ''}"
    lines = {
        "file": path,
        "architecture": spec.name or "no official one",
        "parameters": f"{spec.num_parameters:,}",
        "blocks": f"{spec.num_layers}, {spec.hidden_size} wide, {spec.num_heads} heads, "
        f"MLP {spec.mlp_dim} wide",
        "patches": f"{ph}x{pw} pixels, {rows}x{columns} of them, {spec.num_tokens} tokens in all",
        "pictures": f"{h}x{w} pixels, {spec.channels} channels",
        "preprocessing": vit.preprocess,
        "classifier": spec.classifier,
        "pre_logits": f"tanh, {spec.representation_size} wide"
        if spec.representation_size
        else "none",
        "head": head,
        "stored as": f"{', '.join(stored_types)}; {len(raw)} arrays, {key_style(raw)} keys",
        "size": f"{path.stat().st_size / 2**20:,.1f} MiB",
    }
    for title, text in lines.items():
        print(f"{title:<14} {text}")
