"""Consoles of any encoding, closed ones, full disks, and systems that are not Unix."""

import json
import os
import subprocess
import sys

import pytest

from vit_jax.cli import COMMANDS, main

LATIN = "café"
CHINESE = "狗"


def vit_jax(*argv, shell="", **environment):
    """The command as a process, in bytes as they come; `shell` stands behind it."""
    command = ["/bin/sh", "-c", f'exec "$0" "$@" {shell}', sys.executable, "-m", "vit_jax"]
    return subprocess.run(
        [*command, *map(str, argv)],
        capture_output=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        | {k: str(v) for k, v in environment.items()},
    )


@pytest.fixture
def images(photos):
    names = [photos / f"{name}.jpg" for name in (LATIN, CHINESE)]
    for path in names:
        path.write_bytes((photos / "dark" / "0.jpg").read_bytes())
    return names


@pytest.mark.parametrize(
    ("encoding", "latin", "chinese"),
    [
        ("ascii", rb"caf\xe9", rb"\u72d7"),
        ("cp1252", "café".encode("cp1252"), rb"\u72d7"),
        ("utf-8", "café".encode(), "狗".encode()),
    ],
)
def test_a_text_that_a_console_lacks_is_escaped_and_nothing_is_lost(
    encoding, latin, chinese, images, weights
):
    missing = images[1].with_name(f"{CHINESE}{CHINESE}.jpg")
    done = vit_jax("predict", weights, *images, missing, PYTHONIOENCODING=encoding)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.endswith(b".jpg")] == [lines[0], lines[3]]
    assert lines[0].endswith(latin + b".jpg")
    assert lines[3].endswith(chinese + b".jpg")
    assert b"Traceback" not in done.stderr
    assert chinese + chinese in done.stderr


def test_json_is_json_in_every_encoding(images, weights):
    done = vit_jax("predict", weights, *images, "--json", PYTHONIOENCODING="cp1252")
    rows = json.loads(done.stdout.decode("utf-8"))
    assert [row["picture"] for row in rows] == [str(path) for path in images]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_console_is_no_mistake(closed, weights):
    done = vit_jax("info", weights, shell=closed)
    assert (done.returncode, done.stderr) == (0, b"")
    done = vit_jax("info", "nothing.npz", shell=closed)
    assert done.returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_what_can_not_be_printed_is_said(weights):
    done = vit_jax("info", weights, shell=">/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"vit-jax: what is printed can't be written (No space left")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("JAX_PLATFORMS", "cuda", ""),
        ("JAX_PLATFORMS", "nonsense", "'nonsense' is not in the list"),
        ("JAX_ENABLE_X64", "maybe", "invalid truth value"),
    ],
)
@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_jax_that_does_not_start_is_one_line(
    command, name, value, reason, weights, images, tmp_path
):
    argv = {
        "train": ("train", "--config=digits", f"--workdir={tmp_path / 'run'}"),
        "predict": ("predict", weights, images[0]),
    }[command]
    done = vit_jax(*argv, **{name: value})
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("vit-jax: JAX does not start with ")
    assert f"{name}={value}" in line
    assert reason in line
    assert line.endswith("correct or unset that, or see what vit-jax doctor says")
    assert not (tmp_path / "run").exists()


# As on Windows: the package finds no modules of Unix, and Python has none of its functions.
ELSEWHERE = """
import builtins, json, os, signal, sys
unix = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}
real = builtins.__import__
def imported(name, globals=None, *rest, **others):
    if name in unix and (globals or {}).get("__name__", "").startswith("vit_jax"):
        raise ModuleNotFoundError(f"No module named {name!r}")
    return real(name, globals, *rest, **others)
builtins.__import__ = imported
import cv2, flax, jax, matplotlib.pyplot, orbax.checkpoint  # They have their own ways on Windows.
for module, names in (
    (os, "fork getpgid getuid killpg mkfifo pread setsid sched_getaffinity statvfs sysconf"),
    (signal, "SIGHUP SIGKILL SIGUSR1 SIGUSR2 pthread_sigmask"),
):
    for name in names.split():
        delattr(module, name)
from vit_jax.cli import main
for argv in json.loads(sys.argv[1]):
    print(argv[0], main(argv), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.ci
def test_what_only_reads_works_where_there_is_no_unix(weights, whole, photos, tmp_path):
    commands = [
        ["models"],
        ["info", str(whole)],
        ["predict", str(weights), str(photos / "dark" / "0.jpg")],
        ["evaluate", str(whole), "digits", "--split=test[:9]"],
        ["evaluate", str(weights), str(photos)],
        ["report", str(whole), f"--out={tmp_path / 'page.html'}"],
        ["explain", str(weights), str(photos / "dark" / "0.jpg"), f"--out={tmp_path / 'why.png'}"],
        ["data", "check", str(photos)],
        ["convert", str(weights), str(tmp_path / "w.safetensors")],
        ["train", "--config=digits", f"--workdir={tmp_path / 'run'}"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    found = [line for line in done.stderr.splitlines() if line.split(" ")[0] in COMMANDS]
    assert found == [f"{argv[0]} {2 if argv[0] == 'train' else 0}" for argv in commands], (
        done.stderr
    )
    assert "vit-jax: this system can't lock files, which training" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("place", ["~nouser/run", "~nouser"])
def test_a_home_that_is_nobodys_is_refused(place, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = "~nouser is nobody's home folder here: give the path without it"
    assert said in fails("train", "--config=digits", f"--workdir={place}")
    assert said in fails("train", f"--data={place}", "--workdir=run")
    assert said in fails("data", "check", place)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("VIT_JAX_CACHE", place)
    assert said in fails("info", "augreg/Ti_16")


def test_a_home_stands_for_its_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config=digits", "--workdir=~/run", "--config.model.num_heads=3"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["home"])
