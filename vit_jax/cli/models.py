"""`vit-jax models`: the official models."""

import argparse
import json


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(subparsers, "models", run, "list the official models", "vit-jax models")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Prints a table."""
    import dataclasses

    from vit_jax.checkpoints import Spec
    from vit_jax.models import VARIANTS

    if not args.json:
        print(
            f"{'name':<20} {'parameters':>10} {'patch':>6} {'width':>6} {'layers':>6} {'heads':>6} "
            f"{'MLP':>5} {'tokens':>6}  classifier"
        )
    rows = []
    for name, fields in VARIANTS.items():
        shape = {k: v for k, v in fields.items() if k != "dropout_rate"}
        spec = Spec(
            **shape, representation_size=None, num_classes=1000, channels=3, image_size=(224, 224)
        )
        count, tokens = spec.num_parameters, spec.num_tokens
        rows.append(
            {"name": name, "parameters": count, "tokens": tokens} | dataclasses.asdict(spec)
        )
        if not args.json:
            print(
                f"{name:<20} {count / 1e6:>8.1f} M {'{}x{}'.format(*spec.patch_size):>6} "
                f"{spec.hidden_size:>6} {spec.num_layers:>6} {spec.num_heads:>6} "
                f"{spec.mlp_dim:>5} {tokens:>6}  {spec.classifier}"
            )
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("Parameters with a head of 1,000 classes, tokens at 224x224 pixels.")
