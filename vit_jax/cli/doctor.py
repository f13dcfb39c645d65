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
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from vit_jax.cli import add_command
from vit_jax.escape import to_json

# Programs for other processes, and the words for what may be wrong.
_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
LOOK_AT_JAX = "\n".join(_TABLES["look_at_jax"])  # Says what JAX sees, in JSON.
PATIENCE = 120  # Seconds; a TPU that another program holds can make JAX wait for ever.


class Answer(NamedTuple):
    """What another process said: what it printed, its complaints, and why it failed, or ""."""

    out: str
    log: str
    failure: str


def add_parser(subparsers) -> None:
    """Adds the command."""
    what = "say what JAX sees on this machine, and how to mend what is wrong (exit status 1)"
    parser = add_command(subparsers, "doctor", run, what, "vit-jax doctor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; 1 if something is wrong."""
    found = examine()
    print(to_json(found, indent=1) if args.json else _text(found))
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
        *_device_faults(machine, answer, seen, versions),
        *_import_faults(),
        *_cache_faults(),
    ]
    prefixes = tuple(_TABLES["settings"])
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)}
    return dict(versions=versions, machine=machine, settings=settings, jax=seen, faults=faults)


def _ask(program: str, *args: str, **environment: str) -> Answer:
    """Runs a Python program in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *args],
            env=os.environ | {"JAX_TRACEBACK_FILTERING": "off"} | environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return Answer("", "", f"no answer within {PATIENCE} s")
    # A Python error is told by the last line, what the C++ code says before it aborts by the
    # first; the stack that follows either says nothing to a user.
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    lines = lines or [f"it said nothing, exit status {done.returncode}"]
    reason = lines[-1] if done.returncode else ""
    if done.returncode < 0:
        fatal = [line for line in lines if re.match(r"F\d{4}|.*(Check failed|Unknown flag)", line)]
        reason = f"{signal.Signals(-done.returncode).name}: {(fatal or lines)[0]}"
    return Answer(done.stdout, done.stderr, reason[:300])


def _gpus() -> list[dict[str, Any]]:
    """The NVIDIA GPUs that the driver knows; memory in MiB, None where only files tell of them."""
    fields = "--query-gpu=name,memory.total,memory.used"
    command = [shutil.which("nvidia-smi") or "", fields, "--format=csv,noheader,nounits"]
    table = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        table = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    rows = [re.split(r"\s*,\s*", line.strip()) for line in table.splitlines()]
    files = [[Path(folder).name, "", ""] for folder in glob.glob("/proc/driver/nvidia/gpus/*")]
    return [
        {"name": name, **{k: int(n) if n.isdecimal() else None for k, n in sizes.items()}}
        for name, total, used in [row for row in rows if len(row) == 3] or files
        for sizes in [{"memory": total, "used": used}]
    ]


def _fault(key: str, **found: Any) -> dict[str, str]:
    """A fault, or the cause of one, in the words of doctor.json."""
    what, mend = (text.format(**found) for text in _TABLES["faults"][key])
    return {"what": what, "mend": mend}


def _jax_faults(answer: Answer, seen: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    if answer.failure:
        mends = (v for k, v in _TABLES["mends of jax"].items() if re.search(k, answer.failure))
        hidden = os.environ.get("JAX_PLATFORMS")
        mend = "unset JAX_PLATFORMS, so that JAX takes what there is" if hidden else next(mends)
        yield _fault("jax", reason=answer.failure, mend=mend)
    elif not seen["computes"]:
        yield _fault("numbers")


def _device_faults(
    machine: Mapping[str, Any],
    answer: Answer,
    seen: Mapping[str, Any],
    installed: Mapping[str, str],
) -> Iterator[dict[str, str]]:
    """Of accelerators that JAX does not compute on, each with its first cause that holds; and of
    what takes a GPU's memory."""
    said, gpus, backend = f"{answer.failure}\n{answer.log}", machine["gpus"], seen.get("backend")
    platforms, visible = map(os.environ.get, ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"))
    plugins = {name: v for name, v in installed.items() if re.match("jax-cuda.*plugin", name)}
    other = [f"{name} {v}" for name, v in plugins.items() if v != installed.get("jax")]
    holder = re.search(r"TPU is already in use by (?:a )?process with pid (\d+)", said)
    tpu = machine["tpu_devices"] or holder or "A Google TPU may be present" in said
    words = {
        **dict(value=platforms, plugins=", ".join(other), jax=installed.get("jax")),
        **dict(pid=holder and holder[1], names=", ".join(gpu["name"] for gpu in gpus)),
    }
    hidden = {"jax platforms": platforms}
    causes: dict[str, dict[str, Any]] = {
        "cuda": hidden
        | {"cuda devices": visible in ("", "-1"), "no plugin": not plugins}
        | {"other plugin": other, "driver": True},
        "tpu": {"tpu held": holder, "tpu locked": re.search("already in use|libtpu_lockfile", said)}
        | hidden
        | {"no libtpu": "libtpu" not in installed, "libtpu": True},
    }
    for kind, idle in (("cuda", gpus and backend == "cpu"), ("tpu", tpu and backend != "tpu")):
        if idle:
            reason = re.search(rf"Unable to initialize backend '{kind}': (.*)", said)
            words["reason"] = reason[1][:300] if reason else "it does not say why"
            cause = next(key for key, holds in causes[kind].items() if holds)
            yield _fault(kind, **words | _fault(cause, **words))
    for number, gpu in enumerate(gpus):
        if gpu["memory"] and gpu["used"] and gpu["used"] > gpu["memory"] / 2:
            yield _fault("gpu memory", number=number, **gpu)
    if gpus and "tensorflow" in installed:
        yield _fault("tensorflow", version=installed["tensorflow"])


def _import_faults() -> Iterator[dict[str, str]]:
    packages = _TABLES["imports"]
    answer = _ask("\n".join(_TABLES["try_imports"]), *packages, JAX_PLATFORMS="cpu")
    reasons = dict(line.split(" ", 1) for line in answer.out.splitlines() if " " in line)
    if answer.failure:  # Of the one that was begun last.
        reasons[[*reasons][-1]] = answer.failure
    for module, package in packages.items():
        if reason := reasons.get(module):
            name = "opencv" if module == "cv2" and re.search("lib.*[.]so", reason) else "import"
            yield _fault(name, module=module, package=package, reason=reason)


def _cache_faults() -> Iterator[dict[str, str]]:
    from vit_jax.files import cache_folder

    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    places = {str(cache_folder()): "VIT_JAX_CACHE", compiled: "JAX_COMPILATION_CACHE_DIR"}
    for place, setting in places.items():
        if place and "://" not in place:
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
