"""`vit-jax doctor`: what JAX sees on this machine, and what is wrong with it.

What could fail or hang is done in other processes, so that there is always an answer.
"""

import argparse
import dataclasses
import glob
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from vit_jax.data import own_cores

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "optax"),
    *("orbax-checkpoint", "grain", "numpy", "opencv-python-headless", "opencv-python"),
    *("tensorflow-datasets", "tensorflow", "tensorflow-cpu"),
)
# The parts that a broken installation breaks: what is imported, and how it is installed.
IMPORTS = {
    "cv2": "opencv-python-headless",
    "grain": "grain",
    "flax": "flax",
    "orbax.checkpoint": "orbax-checkpoint",
}
# What changes what JAX does, as it comes from the environment.
SETTINGS = ("JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "TPU_", "LIBTPU_", "VIT_JAX_", "LD_LIBRARY_")
PATIENCE = 120  # Seconds; a TPU that another program holds can make JAX wait for ever.

LOOK_AT_JAX = """
import json
import jax, jax.numpy as jnp
def memory(device):
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except RuntimeError:
        return None
total = jax.jit(lambda x: (x @ x).sum())(jnp.ones((256, 256)))
print(json.dumps({
    "backend": jax.default_backend(),
    "processes": jax.process_count(),
    "computes": float(total) == 256.0**3,
    "devices": [
        {"kind": d.device_kind, "memory": memory(d)} for d in jax.local_devices()
    ],
}))
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong, and what to do about it."""

    what: str
    mend: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """What another process said: what it printed, its complaints, and why it failed, or ""."""

    out: str
    log: str
    failure: str


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vit_jax.cli import add_command

    parser = add_command(
        subparsers,
        "doctor",
        run,
        "say what JAX sees on this machine, and how to mend what is wrong (exit status 1)",
        "vit-jax doctor",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; 1 if something is wrong."""
    found = examine()
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 1 if found["faults"] else 0


def examine() -> dict[str, Any]:
    """Versions, machine, what JAX sees, and faults: each with "what" and "mend"."""
    gpus = _gpus()  # First: JAX takes most of their memory.
    answer = _ask(LOOK_AT_JAX, JAX_LOGGING_LEVEL="INFO")
    seen = {} if answer.failure else json.loads(answer.out.splitlines()[-1])
    installed = _versions()
    faults = [
        *_jax_faults(answer, seen),
        *_gpu_faults(gpus, answer, seen, installed),
        *_tpu_faults(answer, seen, installed),
        *_import_faults(),
        *_cache_faults(),
    ]
    return {
        "versions": {"python": platform.python_version()} | installed,
        "machine": {
            "system": platform.platform(),
            "cpus": own_cores(),
            "gpus": gpus,
            "tpu_devices": _tpu_files(),
        },
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
        "jax": seen,
        "faults": [dataclasses.asdict(fault) for fault in faults],
    }


def _ask(program: str, **environment: str) -> Answer:
    """Runs a Python program in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Answer("", "", f"no answer within {PATIENCE} s")
    if done.returncode == 0:
        return Answer(done.stdout, done.stderr, "")
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    # A Python error is told by the last line, what the C++ code says before it aborts by the
    # first; the stack that follows either says nothing to a user.
    if done.returncode > 0:
        reason = lines[-1] if lines else f"exit status {done.returncode}"
    else:
        fatal = [line for line in lines if re.match(r"F\d{4}|.*(Check failed|Unknown flag)", line)]
        name = signal.Signals(-done.returncode).name
        reason = f"{name}: {(fatal or lines or ['it said nothing'])[0]}"
    return Answer(done.stdout, done.stderr, reason[:300])


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that the driver knows; memory in MiB, None where only files tell of them."""
    program = shutil.which("nvidia-smi")
    fields = "--query-gpu=name,memory.total,memory.used"
    command = [program or "", fields, "--format=csv,noheader,nounits"]
    try:
        table = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        table = ""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines()]
    gpus = [
        {"name": name, "memory": _number(total), "used": _number(used)}
        for name, total, used in (row for row in rows if len(row) == 3)
    ]
    folders = glob.glob("/proc/driver/nvidia/gpus/*")
    return gpus or [{"name": Path(f).name, "memory": None, "used": None} for f in folders]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _tpu_files() -> list[str]:
    return sorted(glob.glob("/dev/accel[0-9]*"))


def _jax_faults(answer: Answer, seen: dict[str, Any]) -> Iterator[Fault]:
    if answer.failure:
        if os.environ.get("JAX_PLATFORMS"):
            mend = "unset JAX_PLATFORMS, so that JAX takes what there is"
        elif "XLA_FLAGS" in answer.failure:
            mend = "correct or unset XLA_FLAGS"
        elif "No module named" in answer.failure or "ImportError" in answer.failure:
            mend = "install this package again: pip install vit_jax"
        elif "no answer" in answer.failure:
            mend = "end other programs that use the accelerator; on a pod start all hosts"
        else:
            mend = 'see what python -c "import jax; print(jax.devices())" says'
        yield Fault(f"JAX does not work: {answer.failure}", mend)
    elif not seen["computes"]:
        yield Fault("JAX computes wrong numbers", "install jax and jaxlib again; test the memory")


def _gpu_faults(
    gpus: list[dict[str, Any]], answer: Answer, seen: dict[str, Any], installed: dict[str, str]
) -> Iterator[Fault]:
    if not gpus:
        return
    names = ", ".join(gpu["name"] for gpu in gpus)
    if seen.get("backend") == "cpu":
        plugins = {name: v for name, v in installed.items() if re.match("jax-cuda.*plugin", name)}
        other = [f"{name} {v}" for name, v in plugins.items() if v != installed.get("jax")]
        if os.environ.get("JAX_PLATFORMS"):
            cause = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} hides it"
            mend = "unset JAX_PLATFORMS"
        elif os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            cause, mend = "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"
        elif not plugins:
            cause = "the jaxlib here is for CPUs only"
            mend = 'pip install "vit_jax[gpu]"'
        elif other:
            cause = f"{', '.join(other)} and jax {installed.get('jax')} don't fit together"
            mend = 'pip install --upgrade "vit_jax[gpu]"'
        else:
            cause = _unable(answer.log, "cuda")
            mend = "update the NVIDIA driver, and see the cause"
        yield Fault(f"NVIDIA GPU ({names}), but JAX computes on the CPU: {cause}", mend)
    for number, gpu in enumerate(gpus):
        if gpu["memory"] and gpu["used"] and gpu["used"] > gpu["memory"] / 2:
            yield Fault(
                f"GPU {number} ({gpu['name']}): {gpu['used']:,} of {gpu['memory']:,} MiB are taken "
                "by other programs",
                "end those that nvidia-smi lists; a notebook holds what it took until it is closed",
            )
    if "tensorflow" in installed:
        yield Fault(
            f"tensorflow {installed['tensorflow']} takes the GPU's memory wherever it is imported",
            'pip uninstall tensorflow, then pip install "vit_jax[tf]", which is for CPUs',
        )


def _tpu_faults(answer: Answer, seen: dict[str, Any], installed: dict[str, str]) -> Iterator[Fault]:
    said = f"{answer.failure}\n{answer.log}"
    holder = re.search(r"TPU is already in use by (?:a )?process with pid (\d+)", said)
    there = bool(_tpu_files()) or "A Google TPU may be present" in said or holder
    if not there or seen.get("backend") == "tpu":
        return
    if holder:
        cause = f"process {holder[1]} holds it"
        mend = f"wait for it, or end it: kill {holder[1]}"
    elif "already in use" in said or "libtpu_lockfile" in said:
        cause = "another process holds it"
        mend = "see sudo lsof -w /dev/accel0; if there is none, sudo rm /tmp/libtpu_lockfile"
    elif os.environ.get("JAX_PLATFORMS"):
        cause = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} hides it"
        mend = "unset JAX_PLATFORMS"
    elif "libtpu" not in installed:
        cause, mend = "libtpu is not installed", 'pip install "vit_jax[tpu]"'
    else:
        cause, mend = _unable(said, "tpu"), 'pip install --upgrade "vit_jax[tpu]"'
    yield Fault(f"TPU, but JAX does not compute on it: {cause}", mend)


def _unable(log: str, backend: str) -> str:
    """Why JAX says it could not start a backend."""
    found = re.search(rf"Unable to initialize backend '{backend}': (.*)", log)
    return found[1][:300] if found else "it does not say why"


def _import_faults() -> Iterator[Fault]:
    checks = "".join(
        f"try:\n import {module}\nexcept Exception as e:\n"
        f" print('{module}', type(e).__name__ + ':', *str(e).split())\n"
        for module in IMPORTS
    )
    answer = _ask(checks, JAX_PLATFORMS="cpu")
    broken = dict(line.split(" ", 1) for line in answer.out.splitlines() if " " in line)
    if answer.failure:
        broken["cv2"] = answer.failure
    for module, reason in broken.items():
        if module not in IMPORTS:
            continue  # Something that a package prints of its own.
        mend = f"pip install --force-reinstall {IMPORTS[module]}"
        if module == "cv2" and "lib" in reason and ".so" in reason:
            mend = "pip uninstall opencv-python, then pip install opencv-python-headless"
        yield Fault(f"{module} can't be imported ({reason})", mend)


def _cache_faults() -> Iterator[Fault]:
    from vit_jax.files import cache_folder

    places = {str(cache_folder()): "VIT_JAX_CACHE"}
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        places[compiled] = "JAX_COMPILATION_CACHE_DIR"
    for place, setting in places.items():
        folder = Path(place)
        if "://" in place:
            continue
        while not folder.exists() and folder.parent != folder:
            folder = folder.parent
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            yield Fault(
                f"the cache {place} can't be written ({error.strerror})",
                f"set {setting} to a folder that can, or change its owner and rights",
            )


def _text(found: dict[str, Any]) -> str:
    jax, machine = found["jax"], found["machine"]
    untold = "" if jax.get("backend") == "cpu" else " (memory not told)"
    devices = [
        device["kind"] + (f" ({device['memory'] / 2**30:.1f} GiB)" if device["memory"] else untold)
        for device in jax.get("devices", ())
    ]
    kinds = {kind: devices.count(kind) for kind in devices}
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        "machine": f"{machine['system']}, {machine['cpus']} CPUs",
        "NVIDIA GPUs": ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none",
        "TPU devices": ", ".join(machine["tpu_devices"]) or "none",
        "settings": " ".join(f"{k}={v}" for k, v in found["settings"].items()) or "none",
        "JAX sees": ", ".join(f"{n} x {kind}" for kind, n in kinds.items()) or "nothing",
        "computes on": jax.get("backend", "nothing"),
    }
    text = [f"{title:<12} {value}" for title, value in lines.items()]
    for fault in found["faults"]:
        text += ["", f"FAULT  {fault['what']}", f"mend   {fault['mend']}"]
    return "\n".join(text if found["faults"] else [*text, "", "no faults found"])
