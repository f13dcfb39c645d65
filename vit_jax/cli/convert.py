"""`vit-jax convert A B`: the same weights as another kind of file."""

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(
        subparsers,
        "convert",
        run,
        "write weights as another kind of file, or in another layout",
        "vit-jax convert Ti_16.npz Ti_16.safetensors\n"
        "  vit-jax convert webli_en_b16.npz:img image_tower.npz --style=prelinen\n"
        "  vit-jax convert mine.npz FOLDER --to hf",
    )
    parser.add_argument(
        "source",
        help="an .npz or .safetensors file, or an Orbax folder; FILE:img for its tower img",
    )
    parser.add_argument(
        "target",
        help="a name that ends in .npz, .safetensors or .orbax, which is a folder; with --to a "
        "folder",
    )
    parser.add_argument(
        "--style",
        choices=("linen", "prelinen", "2020"),
        default="linen",
        help="names as today (default), as published in 2020 and 2021, or as in the first hybrids",
    )
    parser.add_argument(
        "--to",
        choices=("timm", "hf"),
        help="write a folder that timm or Hugging Face's transformers load",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="store numbers so; by default as they are"
    )
    parser.add_argument(
        "--heads", type=int, help="attention heads, if a file of PyTorch's doesn't tell them"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the target, and the .json beside it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Converts and says what was written."""
    from vit_jax.checkpoints.convert import convert
    from vit_jax.escape import printable, to_json

    if args.to:
        _export(args)
        return
    wishes = dict(style=args.style, dtype=args.dtype, heads=args.heads, force=args.force)
    done = convert(args.source, args.target, **wishes)
    if args.json:
        facts = {
            "architecture": done.spec.name,
            "parameters": done.spec.num_parameters,
            "arrays": done.arrays,
            "files": [str(path) for path in done.files],
        }
        print(to_json(facts, indent=1))
        return
    name = done.spec.name or "a network without an official name"
    print(f"{name}, {done.spec.num_parameters:,} parameters in {done.arrays} arrays")
    for path in done.files:
        print(printable(f"wrote {path}"))


def _export(args: argparse.Namespace) -> None:
    from flax.traverse_util import flatten_dict

    from vit_jax.checkpoints.export import export
    from vit_jax.errors import UserError
    from vit_jax.escape import printable, to_json
    from vit_jax.pretrained import load

    if args.dtype == "bfloat16" or args.style != "linen":
        raise UserError(
            "--to writes float32 under the library's names: leave --dtype and --style out"
        )
    vit = load(args.source, heads=args.heads)
    arrays = flatten_dict(vit.params, sep="/")
    about = dict(labels=vit.labels, preprocess=vit.preprocess, loss=vit.loss, force=args.force)
    files = export(args.target, args.to, arrays, vit.spec, **about)
    if args.json:
        facts = {"architecture": vit.spec.name, "parameters": vit.spec.num_parameters}
        print(to_json(facts | {"files": [str(path) for path in files]}, indent=1))
        return
    print(f"{vit.spec.description}, {vit.spec.num_parameters:,} parameters")
    for path in files:
        print(printable(f"wrote {path}"))
