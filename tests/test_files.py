"""Where downloads, listings and compiled programs are kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.errors import UserError
from vit_jax.files import cache_folder


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "files"))
    assert cache_folder() == tmp_path / "files"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "vit_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "vit_jax"

    for place in ("~nobody-of-that-name/files", "~nobody-of-that-name"):
        monkeypatch.setenv("VIT_JAX_CACHE", place)
        with pytest.raises(UserError, match="~nobody-of-that-name is nobody's home folder here"):
            cache_folder()


PROGRAM = """
import sys, jax, jax.numpy as jnp
from vit_jax.files import keep_compiled
jax.jit(jnp.sin)(1.0)  # JAX has looked at its settings by then.
print(keep_compiled(*sys.argv[1:]))
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
print(jax.jit(lambda x: jnp.cumsum(x @ x))(jnp.ones((8, 8)))[-1])
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def kept(*arguments, **environment):
    """What the program above prints, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


def test_a_second_process_finds_the_programs_of_the_first_and_says_nothing_else(tmp_path):
    place = tmp_path / "files" / "compiled"
    first, second = (kept(VIT_JAX_CACHE=tmp_path / "files") for _ in range(2))
    assert first[0] == second[0] == f"compiled programs are in {place}"
    assert first[1] == second[1]
    assert (first[2], int(second[2]) > 0) == ("0", True)


def test_a_cache_that_cannot_be_written_is_said_and_nothing_is_kept(tmp_path):
    file = tmp_path / "file"
    file.touch()
    said = kept(file / "compiled")[0]
    assert said.startswith(f"compiled programs are not kept: {file}/compiled can't be written")
    assert kept("off", VIT_JAX_CACHE=tmp_path / "new")[0] == "compiled programs are not kept"
    assert os.listdir(tmp_path) == ["file"]


def test_jax_s_own_setting_is_kept_unless_a_place_is_named(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": tmp_path / "own"}
    assert kept(**own)[0] == f"compiled programs are in {tmp_path}/own"
    assert kept(tmp_path, **own)[0] == f"compiled programs are in {tmp_path}"
