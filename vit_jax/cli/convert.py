"""`vit-jax convert A B`: the same weights as another kind of file."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax.pretrained import Pretrained

_RANDOM = 16  # Images of which it is said how much an approximation changes.


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command, add_heads

    parser = add_command(
        subparsers,
        "convert",
        run,
        "write weights as another kind of file, or in another layout",
        "vit-jax convert Ti_16.npz Ti_16.safetensors\n"
        "  vit-jax convert webli_en_b16.npz:img image_tower.npz --style=prelinen\n"
        "  vit-jax convert Ti_16.npz FOLDER --to hf\n"
        "  vit-jax convert Ti_16.npz plain.npz --fold --approximate",
    )
    parser.add_argument(
        "source",
        help="a file or name of weights, a workdir, a folder of timm or transformers; FILE:img for "
        "its tower img",
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
        "--fold",
        action="store_true",
        help="multiply LayerScale, the images' mean and deviation and such into the other weights, "
        "for the original's code",
    )
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="with --fold or --to: of what can't be computed there (activation, epsilon) take the "
        "nearest, and say how much that changes",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="store numbers so; by default as they are"
    )
    add_heads(parser)
    parser.add_argument(
        "--force", action="store_true", help="replace the target, and the .json beside it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Converts and says what was written."""
    from vit_jax.checkpoints.convert import convert
    from vit_jax.errors import UserError
    from vit_jax.escape import printable, to_json
    from vit_jax.pretrained import find_weights

    if args.approximate and not (args.to or args.fold):
        raise UserError("--approximate goes with --to or --fold: add one, or leave it out")
    if args.to or args.fold:
        facts, lines = _rewritten(args)
    else:
        path, tower = find_weights(args.source)
        wishes = dict(style=args.style, dtype=args.dtype, heads=args.heads, force=args.force)
        wishes["window"] = args.window
        done = convert(f"{path}:{tower}" if tower else path, args.target, **wishes)
        facts = {
            "architecture": done.spec.name,
            "parameters": done.spec.num_parameters,
            "arrays": done.arrays,
            "files": [str(path) for path in done.files],
        }
        name = done.spec.name or "a network without an official name"
        lines = [f"{name}, {done.spec.num_parameters:,} parameters in {done.arrays} arrays"]
    if args.json:
        print(to_json(facts, indent=1))
        return
    for line in (*lines, *(f"wrote {path}" for path in facts["files"])):
        print(printable(line))


def _rewritten(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Folds, approximates and exports, as asked for: (facts in JSON, lines for a person)."""
    from pathlib import Path

    from flax.traverse_util import flatten_dict

    from vit_jax.checkpoints import check_ending, to_tree
    from vit_jax.checkpoints.convert import check_free, check_notes
    from vit_jax.checkpoints.export import check_folder, export
    from vit_jax.checkpoints.fold import approximated, check_original, fold
    from vit_jax.errors import UserError
    from vit_jax.files import expand_user
    from vit_jax.pretrained import find_weights, load

    if args.dtype == "bfloat16" or (args.to and args.style != "linen"):
        raise UserError(
            "--to writes float32 under the library's names: leave --dtype and --style out"
            if args.to
            else "--fold writes float32: leave --dtype out"
        )
    target = Path(expand_user(args.target))
    if args.to:
        check_folder(target, args.to, args.force)
    else:
        check_ending(target)
        source, notes = find_weights(args.source)[0].resolve(), target.with_suffix(".json")
        check_notes(target, source)
        if notes.resolve() == source.with_suffix(".json") and target.resolve() != source:
            raise UserError(
                f"{target} would share {notes} with {source}, which takes other images: choose a "
                "name with another beginning"
            )
        check_free([target, target.with_suffix(".json")], args.force)
    vit = load(args.source, heads=args.heads, window=args.window)
    facts: dict[str, Any] = {}
    lines = [f"{vit.spec.description}, {vit.spec.num_parameters:,} parameters"]
    if args.fold:
        arrays, spec, preprocess, done = fold(
            flatten_dict(vit.params, sep="/"), vit.spec, vit.preprocess
        )
        new = dict(model=spec.model(), params=to_tree(arrays), spec=spec, preprocess=preprocess)
        vit = dataclasses.replace(vit, **new)
        facts["folded"] = done
        lines.append(f"folded: {'; '.join(done) or 'nothing, it is plain already'}")
    exact, replaced = vit, dict[str, Any]()
    if args.approximate:
        spec, replaced = approximated(vit.spec, args.to)
        vit = dataclasses.replace(vit, model=spec.model(), spec=spec)
    if args.to:
        about = dict(labels=vit.labels, preprocess=vit.preprocess, loss=vit.loss, force=args.force)
        files = export(target, args.to, flatten_dict(vit.params, sep="/"), vit.spec, **about)
    else:
        check_original(vit.spec)
        vit.save(target, style=args.style)
        files = [target, target.with_suffix(".json")]
    if args.approximate:
        facts["replaced"] = {k: [v, getattr(vit.spec, k)] for k, v in replaced.items()}
        words = [f"{k} {v!r} by {getattr(vit.spec, k)!r}" for k, v in replaced.items()]
        lines.append(f"replaced: {', '.join(words) or 'nothing, it is exact without'}")
    if replaced:
        facts["difference"], text = _difference(exact, vit)
        lines.append(text)
    facts |= {"architecture": vit.spec.name, "parameters": vit.spec.num_parameters}
    return facts | {"files": [str(path) for path in files]}, lines


def _difference(exact: "Pretrained", other: "Pretrained") -> tuple[dict[str, Any], str]:
    """How far the answers of two networks to the same random images lie apart: (facts, a line)."""
    import numpy as np

    from vit_jax.data import parse

    rng, (height, width) = np.random.default_rng(0), exact.image_size
    # Blocks of colour: noise of single pixels looks the same to a network, whatever it is.
    blocks = rng.integers(0, 256, (_RANDOM, 8, 8, exact.spec.channels), np.uint8)
    rows, columns = (np.arange(size) * 8 // size for size in (height, width))
    images = parse(exact.preprocess).range(blocks[:, rows][:, :, columns].astype(np.float32))
    before, after = exact(images), other(images)
    largest, scale = float(np.abs(after - before).max()), float(np.abs(before).max())
    facts = {"largest": largest, "relative": largest / scale if scale else None}
    text = (
        f"so {'features' if exact.spec.num_classes is None else 'logits'} of {_RANDOM} random "
        f"images change by {largest:.3g} at most, "
        + (f"{facts['relative']:.2g} of the largest" if scale else "and all of them were 0")
    )
    if exact.spec.num_classes is not None:
        facts["top1"] = float((before.argmax(-1) == after.argmax(-1)).mean())
        text += f"; the most probable class is the same for {facts['top1']:.0%}"
    return facts, text
