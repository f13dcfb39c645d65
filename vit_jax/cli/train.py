"""`vit-jax train`: trains from a configuration, or fine-tunes on a folder of images."""

import argparse
import ctypes
import dataclasses
import glob
import os
import sys

from vit_jax.errors import UserError
from vit_jax.escape import to_json
from vit_jax.signals import EXIT_AGAIN, NothingToSave

# mallopt's parameters, from malloc.h, and values: no block of its own for what is large; nothing
# is given back; one heap for all threads, or what is freed in one could not be used by another.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2**21


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(
        subparsers,
        "train",
        run,
        "train, or go on with a run that was stopped",
        "vit-jax train --config=digits --workdir=runs/digits --config.total_steps=300\n"
        "  vit-jax train --data=photos --weights=Ti_16.npz --workdir=runs/photos",
    )
    parser.usage = (
        "vit-jax train (--config=FILE[:ARG] | --data=DIR) [--weights=FILE] --workdir=DIR [--json] "
        "[--config.FIELD=VALUE ...]"
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a training run."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="a configuration file, or the name of one of the package's")
    what.add_argument("--data", help="a folder of images, a table, a TFDS name: fine-tune")
    parser.add_argument("--weights", help="the weights to start from, a file or a name")
    parser.add_argument(
        "--workdir", required=True, help="the folder of this run, or gs://BUCKET/RUN"
    )
    for name, kind, meaning in (
        ("--coordinator", str, "host:port of process 0, if several processes train together"),
        ("--num-processes", int, "their number"),
        ("--process-id", int, "the number of this one, from 0"),
    ):
        parser.add_argument(name, type=kind, help=meaning)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, first=keep_memory, takes_fields=True)
    examples = parser.epilog

    def format_help() -> str:  # The fields are only looked up where help is asked for.
        parser.epilog = f"{_fields_help()}\n{examples}" if examples else _fields_help()
        return argparse.ArgumentParser.format_help(parser)

    parser.format_help = format_help  # type: ignore[method-assign]


def _fields_help() -> str:
    from vit_jax.training.config import FIELDS

    lines = ["fields of the configuration, their defaults, what they mean:"]
    for field in FIELDS.values():
        is_choice = field.values and isinstance(field.default, str)
        choices = f" ({', '.join(field.values)})" if is_choice else ""
        default = "empty" if field.default in ("", ()) else field.default
        lines.append(f"  {field.name:<29} {default!s:<10} {field.help}{choices}")
    return "\n".join([*lines, ""])


def run(args: argparse.Namespace) -> int:
    """Trains and prints how it ended."""
    with NothingToSave():
        from vit_jax import training
        from vit_jax.training.distributed import exit_with_others, initialize, is_main_process
        from vit_jax.training.options import load_config, override

        if not args.workdir:
            raise UserError("--workdir is empty: name the folder of this run")
        recipe = args.config if args.data is None else f"finetune_folder:{args.data}"
        weights = [f"--config.model_or_filename={args.weights}"] if args.weights else []
        # Before the others are waited for, whose time-out is one of its fields.
        config = override(load_config(recipe), [*args.fields, *weights])
        silence = config.silence_timeout
        with exit_with_others(silence):
            place = (args.coordinator, args.num_processes, args.process_id)
            initialize(*place, heartbeat_timeout_s=silence)
            result = training.run(config, args.workdir)
        if is_main_process():
            print(to_json(dataclasses.asdict(result)) if args.json else result.summary)
        return 0 if result.finished else EXIT_AGAIN


def keep_memory() -> bool:
    """Has glibc's allocator keep freed memory in the process between steps, in huge pages.

    XLA frees a step's temporary memory, often a GB, after each step. The allocator would give it
    back to the system, which clears every 4 KB of it when they are touched in the next step.

    Returns:
      whether it did: not after NumPy has been imported, for its threads have heaps of their own;
      nor beside a GPU or TPU, whose memory is another; nor with the environment's
      VIT_JAX_KEEP_MEMORY=0; nor where there is no glibc.
    """
    if "numpy" in sys.modules or os.environ.get("VIT_JAX_KEEP_MEMORY") == "0":
        return False
    # dxg: GPUs of Windows, seen from its Linux.
    accelerators = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/accel*", "/dev/vfio/[0-9]*")
    if sys.platform != "linux" or any(map(glob.glob, accelerators)):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    for parameter, value in _SETTINGS.items():
        libc.mallopt(parameter, value)
    # Addresses only: half as many as there is memory, which becomes the heap's free end.
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype = ctypes.c_void_p
    if start := libc.malloc(ctypes.c_size_t(size)):
        aligned = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        length = (start + size - aligned) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(length), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(start))
    return True
