"""Imports point one way, and `import vit_jax` is light."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vit_jax

PACKAGE = Path(vit_jax.__file__).parent

FOR_ALL = {"errors", "escape", "files", "signals"}
# What each part of the package may import beside those for all.
ALLOWED = {
    "errors": set(),
    "escape": set(),
    "files": set(),
    "signals": set(),
    "original": set(),
    "buckets": set(),
    "page": set(),
    "models": set(),
    "checkpoints": {"models", "data", "buckets"},
    "data": {"models", "buckets"},
    "tokenizers": set(),
    "sharding": {"models"},
    "pretrained": {"models", "checkpoints", "data", "tokenizers", "buckets"},
    "evaluation": {"models", "checkpoints", "data", "pretrained", "sharding", "page"},
    "explain": {"models", "checkpoints", "data", "pretrained", "page"},
    "training": {
        *("models", "checkpoints", "data", "pretrained"),
        *("sharding", "evaluation", "explain", "buckets"),
    },
    "cli": {
        *("models", "checkpoints", "data", "files", "pretrained", "evaluation"),
        *("explain", "training", "page"),
    },
    "main": {"cli"},
    "__main__": {"cli"},
}
HEAVY = (
    "cv2",
    "grain",
    "huggingface_hub",
    "matplotlib",
    "PIL",
    "tensorflow",
    "tensorflow_datasets",
    "orbax",
    "scipy.ndimage",
)


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, at its top or inside of a function."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {n.split(".")[1] for n in names if re.match(r"vit_jax\.[a-z]", n)}
        assert "vit_jax" not in names, f"{path}: imports the whole package"
    return parts


def parts() -> list[str]:
    files = (file.relative_to(PACKAGE).parts[0] for file in PACKAGE.rglob("*.py"))
    # The package's own __init__ gives every part its name, lazily.
    return sorted({part.removesuffix(".py") for part in files} - {"__init__", "configs"})


@pytest.mark.parametrize("part", parts())
def test_imports_point_one_way(part):
    for file in (PACKAGE / f"{part}.py", *(PACKAGE / part).rglob("*.py")):
        if file.exists():
            assert imported_parts(file) <= ALLOWED[part] | {part} | FOR_ALL, file


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports, at its top or inside of a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            # Of `from vit_jax.data import images` the module is meant, not its folder's __init__.
            names |= whole | ({node.module} if not any(map(file_of, whole)) else set())
    return {file for name in names if (file := file_of(name)) and file != path}


def file_of(name: str) -> Path | None:
    """The file of a module of this package; None for a name that is no module."""
    place = PACKAGE.parent.joinpath(*name.split("."))
    found = [f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()]
    return found[0] if found and name.startswith("vit_jax") else None


@pytest.mark.parametrize("folder", sorted({f.parent for f in PACKAGE.rglob("*.py")} - {PACKAGE}))
def test_no_circle_of_files_within_a_folder(folder):
    files = set(folder.glob("*.py"))
    edges = {file: imported_files(file) & files for file in files}
    reached = {file: set(direct) for file, direct in edges.items()}
    for _ in files:
        for seen in reached.values():
            seen |= set().union(*(reached[file] for file in seen))
    circles = {
        frozenset(f"{folder.name}/{f.name}" for f in (one, other))
        for one in files
        for other in reached[one]
        if one != other and one in reached[other]
    }
    assert not circles


def fresh(code: str) -> str:
    """What a new process prints."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("code", ["import vit_jax", "import vit_jax; vit_jax.load"])
def test_importing_loads_nothing_heavy(code):
    loaded = fresh(f"{code}\nimport sys\nprint(*sys.modules)").split()

    assert not [name for name in HEAVY if name in loaded]


def test_every_public_name_is_there():
    for name in vit_jax.__all__:
        assert getattr(vit_jax, name) is not None
        assert name in dir(vit_jax)
    assert vit_jax.models.create_model is vit_jax.create_model
    assert vit_jax.checkpoints.__name__ == "vit_jax.checkpoints"
    with pytest.raises(AttributeError, match="module 'vit_jax' has no attribute 'lod'"):
        _ = vit_jax.lod


def processor_seconds(code: str) -> float:
    """What a new process costs: unlike the clock, the same on a busy machine."""
    before = os.times()
    fresh(code)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])  # User and system time of child processes.


def test_importing_with_all_public_names_takes_little_longer_than_jax_and_flax():
    base, ours = "import jax, flax", "import vit_jax; vit_jax.load, vit_jax.create_model"
    seconds = [(processor_seconds(base), processor_seconds(ours)) for _ in range(3)]

    assert min(ours for _, ours in seconds) < 1.3 * min(base for base, _ in seconds), seconds
