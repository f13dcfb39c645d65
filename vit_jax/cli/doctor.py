"""`vit-jax doctor`: what JAX sees on this machine, and what is wrong with it.

What could fail or hang is done in other processes, so that there is always an answer.
"""

import argparse
import contextlib
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
from typing import Any, NamedTuple

_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
LOOK_AT_JAX = "\n".join(_TABLES["look_at_jax"])  # The program that says what JAX sees, in JSON.
PATIENCE = 120  # Seconds; a TPU that another program holds can make JAX wait for ever.


class Answer(NamedTuple):
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
    from vit_jax.data import own_cores

    machine = {
        "system": platform.platform(),
        "cpus": own_cores(),
        "gpus": _gpus(),  # Before JAX takes most of their memory.
        "tpu_devices": sorted(glob.glob("/dev/accel[0-9]*")),
    }
    versions = {"python": platform.python_version()}
    for name in _TABLES["packages"]:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    answer = _ask(LOOK_AT_JAX, JAX_LOGGING_LEVEL="INFO")
    seen = {} if answer.failure else json.loads(answer.out.splitlines()[-1])
    faults = [
        *_jax_faults(answer, seen),
        *_gpu_faults(machine["gpus"], answer, seen, versions),
        *_tpu_faults(machine["tpu_devices"], answer, seen, versions),
        *_import_faults(),
        *_cache_faults(),
    ]
    prefixes = tuple(_TABLES["settings"])
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}
    return dict(versions=versions, machine=machine, settings=settings, jax=seen, faults=faults)


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


def _gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that the driver knows; memory in MiB, None where only files tell of them."""
    fields = "--query-gpu=name,memory.total,memory.used"
    command = [shutil.which("nvidia-smi") or "", fields, "--format=csv,noheader,nounits"]
    try:
        table = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        table = ""
    rows = [re.split(r"\s*,\s*", line.strip()) for line in table.splitlines()]
    found = [row for row in rows if len(row) == 3] or [
        [Path(folder).name, "", ""] for folder in glob.glob("/proc/driver/nvidia/gpus/*")
    ]

    def number(text: str) -> int | None:
        return int(text) if text.isdecimal() else None

    return [{"name": n, "memory": number(total), "used": number(used)} for n, total, used in found]


def _fault(key: str, **found: Any) -> dict[str, str]:
    """A fault, or the cause of one, in the words of doctor.json."""
    what, mend = (text.format(**found) for text in _TABLES["faults"][key])
    return {"what": what, "mend": mend}


def _jax_faults(answer: Answer, seen: dict[str, Any]) -> Iterator[dict[str, str]]:
    if answer.failure:
        mends = (v for k, v in _TABLES["mends of jax"].items() if re.search(k, answer.failure))
        hidden = os.environ.get("JAX_PLATFORMS")
        mend = "unset JAX_PLATFORMS, so that JAX takes what there is" if hidden else next(mends)
        yield _fault("jax", reason=answer.failure, mend=mend)
    elif not seen["computes"]:
        yield _fault("numbers")


def _gpu_faults(
    gpus: list[dict[str, Any]], answer: Answer, seen: dict[str, Any], installed: dict[str, str]
) -> Iterator[dict[str, str]]:
    if gpus and seen.get("backend") == "cpu":
        jax = installed.get("jax")
        plugins = {name: v for name, v in installed.items() if re.match("jax-cuda.*plugin", name)}
        other = [f"{name} {v}" for name, v in plugins.items() if v != jax]
        if platforms := os.environ.get("JAX_PLATFORMS"):
            cause = _fault("jax platforms", value=platforms)
        elif os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            cause = _fault("cuda devices")
        elif not plugins:
            cause = _fault("no plugin")
        elif other:
            cause = _fault("other plugin", plugins=", ".join(other), jax=jax)
        else:
            cause = _fault("driver", reason=_unable(answer.log, "cuda"))
        yield _fault("gpu", names=", ".join(gpu["name"] for gpu in gpus), **cause)
    for number, gpu in enumerate(gpus):
        if gpu["memory"] and gpu["used"] and gpu["used"] > gpu["memory"] / 2:
            yield _fault("gpu memory", number=number, **gpu)
    if gpus and "tensorflow" in installed:
        yield _fault("tensorflow", version=installed["tensorflow"])


def _tpu_faults(
    files: list[str], answer: Answer, seen: dict[str, Any], installed: dict[str, str]
) -> Iterator[dict[str, str]]:
    said = f"{answer.failure}\n{answer.log}"
    holder = re.search(r"TPU is already in use by (?:a )?process with pid (\d+)", said)
    there = files or holder or "A Google TPU may be present" in said
    if not there or seen.get("backend") == "tpu":
        return
    if holder:
        cause = _fault("tpu held", pid=holder[1])
    elif "already in use" in said or "libtpu_lockfile" in said:
        cause = _fault("tpu locked")
    elif platforms := os.environ.get("JAX_PLATFORMS"):
        cause = _fault("jax platforms", value=platforms)
    elif "libtpu" not in installed:
        cause = _fault("no libtpu")
    else:
        cause = _fault("libtpu", reason=_unable(said, "tpu"))
    yield _fault("tpu", **cause)


def _unable(log: str, backend: str) -> str:
    """Why JAX says it could not start a backend."""
    found = re.search(rf"Unable to initialize backend '{backend}': (.*)", log)
    return found[1][:300] if found else "it does not say why"


def _import_faults() -> Iterator[dict[str, str]]:
    checks = "".join(
        f"try:\n import {module}\nexcept Exception as e:\n"
        f" print('{module}', type(e).__name__ + ':', *str(e).split())\n"
        for module in _TABLES["imports"]
    )
    answer = _ask(checks, JAX_PLATFORMS="cpu")
    broken = dict(line.split(" ", 1) for line in answer.out.splitlines() if " " in line)
    if answer.failure:
        broken["cv2"] = answer.failure
    for module, package in _TABLES["imports"].items():
        if reason := broken.get(module):
            name = "opencv" if module == "cv2" and re.search("lib.*[.]so", reason) else "import"
            yield _fault(name, module=module, package=package, reason=reason)


def _cache_faults() -> Iterator[dict[str, str]]:
    from vit_jax.files import cache_folder

    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    places = {str(cache_folder()): "VIT_JAX_CACHE", compiled: "JAX_COMPILATION_CACHE_DIR"}
    for place, setting in places.items():
        if not place or "://" in place:
            continue
        folder = next(path for path in (Path(place), *Path(place).parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as e:
            yield _fault("cache", place=place, setting=setting, reason=e.strerror)


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
