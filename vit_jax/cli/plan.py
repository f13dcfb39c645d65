"""`vit-jax plan`: what a run will need, before it is started."""

import argparse
import re
from typing import Any

from vit_jax.cli import add_command, positive
from vit_jax.errors import UserError
from vit_jax.escape import to_json
from vit_jax.signals import tell

_UNITS = {"": 2**30, "G": 1e9, "GB": 1e9, "GIB": 2**30, "M": 1e6, "MB": 1e6, "MIB": 2**20}


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        "say what a run will need: memory, operations, time, cost (exit status 1 if it won't fit)",
        "vit-jax plan --config=digits\n"
        "  vit-jax plan --config=vit:b16,cifar10 --classes=10 --devices=8 --chip=v5e --price=1.2",
    )
    parser.usage = (
        "vit-jax plan --config=FILE[:ARG] [--classes=N] [--devices=N] [--chip=NAME] "
        "[--memory=SIZE] [--price=P] [--json] [--config.FIELD=VALUE ...]"
    )
    add = parser.add_argument
    add("--config", required=True, help="a configuration, as of vit-jax train")
    add("--classes", type=positive, help="if the data set is not on this machine")
    add("--devices", type=positive, default=1, help="their number (default: 1)")
    add("--chip", help="what they are, e.g. h100, a100, v5e: gives memory and peak")
    add("--memory", type=_size, help="of each device, e.g. 16GiB")
    add("--peak-tflops", type=_number, help="of each device, in config.dtype")
    share = "share of it that is made use of (default: 0.4)"
    add("--mfu", type=_number, default=0.4, help=share)
    add("--price", type=_number, help="of a device for an hour, in any currency")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(takes_fields=True)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 1 if it does not fit. Devices are simulated: no accelerator is touched."""
    import jax

    from vit_jax.training.hardware import chip_named
    from vit_jax.training.options import load_config, override
    from vit_jax.training.plan import plan

    if args.mfu > 1:
        raise UserError(f"--mfu is {args.mfu}, expected a share of at most 1, e.g. 0.4")
    chip = chip_named(args.chip) if args.chip else None
    tflops = args.peak_tflops or (chip.tflops if chip else None)
    memory = args.memory or (chip.memory * 2**30 if chip else None)
    if args.price and tflops is None:
        raise UserError("--price needs to know how fast a device is: add --chip or --peak-tflops")
    config = override(load_config(args.config), args.fields)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.devices)
    found = plan(config, classes=args.classes, memory=memory, say=tell)
    if tflops is not None:
        speed = found["devices"] * tflops * 1e12 * args.mfu
        found["seconds_per_step"] = found["flops_per_step"] / speed
        found["hours"] = found["seconds_per_step"] * found["total_steps"] / 3600
        if args.price:
            found["cost"] = found["hours"] * found["devices"] * args.price
    print(to_json(found, indent=1) if args.json else _text(found, args.mfu, tflops))
    return 1 if found["fits"] is False else 0


def _text(found: dict[str, Any], mfu: float, tflops: float | None) -> str:
    phases = [found["training"], found["evaluation"]]
    at_once = found["batch"] // found["devices"] // found["accum_steps"]
    shape = "x".join(map(str, found["picture_shape"]))
    lines = [
        f"network     {found['parameters']:,} parameters, {found['classes']:,} classes, images "
        f"of {shape}",
        f"step        {found['batch']:,} images on {found['devices']} devices, {at_once} at once "
        f"on each ({found['accum_steps']} accum_steps), {found['flops_per_step'] / 1e12:,.3g} "
        f"TFLOPs: {', '.join(f'{p} {x:.1%}' for p, x in found['flops_by_part'].items())}",
        "",
        f"{'GiB on each device':<20} {'training':>10} {'evaluation':>10}",
    ]
    for part in phases[0]:
        sizes = [phase[part] for phase in phases]
        texts = ["not told" if size is None else f"{size / 2**30:.3f}" for size in sizes]
        lines.append(f"  {part:<18} {texts[0]:>10} {texts[1]:>10}")
    if any(phase["total"] is None for phase in phases):
        lines += ["the compiler does not tell here what the program needs beside its arrays", ""]
    else:
        lines += ["as XLA lays it out for CPUs; another kind of device may need more or less", ""]
    if found["memory"] is not None:
        lines.append(f"fits        {_verdict(found)}")
    if tflops is not None:
        lines.append(
            f"time        {found['seconds_per_step']:,.3g} s a step, {found['hours']:,.2f} h for "
            f"{found['total_steps']:,} steps, if {mfu:.0%} of {tflops:g} TFLOP/s are made use of; "
            "evaluations not counted"
        )
    if "cost" in found:
        lines.append(f"cost        {found['cost']:,.2f}")
    return "\n".join(lines).rstrip()


def _verdict(found: dict[str, Any]) -> str:
    size = f"{found['memory'] / 2**30:.1f} GiB"
    if found["fits"] is None:
        return f"not known, into {size}: see above"
    if found["fits"]:
        return f"yes, into {size}"
    if found["changes"] is not None:
        changes = (f"--config.{field}={value}" for field, value in found["changes"].items())
        return f"no, not into {size}; it would with {' '.join(changes)}"
    state = (found["training"]["parameters"] + found["training"]["optimizer"]) / 2**30
    return (
        f"no, not into {size}, with none of the accum_steps, batch_eval, remat and sharding that "
        f"were tried (the state is {state:.1f} GiB): take a smaller model or image, or larger or "
        "more devices"
    )


def _size(text: str) -> float:
    """Bytes of "16GiB", "80GB", "512MiB"; a bare number is GiB."""
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16GiB or 80GB")
    return float(found[1]) * _UNITS[found[2].upper()]


def _number(text: str) -> float:
    if not re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return float(text)
