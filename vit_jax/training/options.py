"""Configurations from files, changed by `--config.field=value` options."""

import ast
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.training.config import (
    check_config,
    default_config,
    flatten,
    model_fields,
    original_split,
    unknown_field,
)

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def find_config_file(name: str) -> Path:
    """The file of a configuration: a path, or the name of one that comes with the package,
    "digits", "digits.py" or "configs/digits.py".

    Raises UserError if there is none.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    package = Path(__file__).resolve().parents[1]
    # Installed, the recipes stand in the package; in a clone, at the top of the repository.
    folders = [f for f in (package / "configs", package.parent / "configs") if f.is_dir()]
    recipes = {file.stem: file for folder in folders for file in sorted(folder.glob("*.py"))}
    for stem, file in recipes.items():
        if name in (stem, f"{stem}.py", f"configs/{stem}.py"):
            return file
    raise UserError(
        f"no configuration file {name}: give the path of a .py file, or one of {', '.join(recipes)}"
    )


def load_config(name: str) -> ConfigDict:
    """The configuration that a file makes.

    Args:
      name: a file, or the name of one that comes with the package; with an argument for its
        `get_config` after a colon, e.g. "configs/vit.py:b16,cifar10".

    Raises UserError if there is no such file, it is no configuration, or Python finds a mistake in
    it.
    """
    file, _, argument = name.partition(":")
    path = find_config_file(file)
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert module_spec is not None  # It ends in .py.
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} is no configuration file: it has no function get_config(arg)")
        config = module.get_config(argument)
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        trace = traceback.extract_tb(e.__traceback__)
        lines = [frame.lineno for frame in trace if frame.filename == module_spec.origin]
        line = e.lineno if isinstance(e, SyntaxError) else (lines or [None])[-1]
        where = f"{path}, line {line}" if line else f"{path}"
        reason = " ".join((e.msg if isinstance(e, SyntaxError) else str(e)).split())
        raise UserError(f"{where}: {type(e).__name__}: {reason}") from e
    finally:
        sys.dont_write_bytecode = writes
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of {path} returns {type(config).__name__}, expected a ConfigDict: start "
            "from vit_jax.training.default_config()"
        )
    return config


def override(config: ConfigDict, options: Sequence[str]) -> ConfigDict:
    """Changes fields as options say, and checks the whole.

    A new total_steps without a new warmup_steps shortens the warm-up to as many steps, if need be.

    Args:
      config: as `load_config` gives it.
      options: "--config.field=value" or "--config.field value", e.g. "--config.pp.crop=384"; of a
        field that is true or false also "--config.field" and "--noconfig.field".

    Raises UserError naming a misspelt field with the nearest ones, or a value of the wrong type.
    """
    values = config.copy_and_resolve_references().to_dict()
    known = flatten(default_config())
    known |= {f"config.model.{field}": example for field, example in model_fields().items()}
    changed = {original_split(name, text) or name: text for name, text in _assignments(options)}
    for name, text in changed.items():
        if name not in known:
            inside = [field for field in known if field.startswith(f"{name}.")]
            if inside:
                fields = ", ".join(field.removeprefix(f"{name}.") for field in inside)
                raise UserError(f"{name} is a group of fields: set one of {fields}")
            raise unknown_field(name, [*known])
        _, *folders, last = name.split(".")
        part = values
        for folder in folders:
            part = part.setdefault(folder, {})
            if not isinstance(part, dict):
                raise UserError(f"config.{folder} is {part!r} in the file, expected fields")
        part[last] = _parse(name, text, known[name])
    steps = values.get("total_steps")
    if (
        {"config.total_steps", "config.warmup_steps"} & changed.keys() == {"config.total_steps"}
        and isinstance(steps, int)
        and steps > 0
    ):
        warmup = values.get("warmup_steps", known["config.warmup_steps"])
        values["warmup_steps"] = min(warmup, steps)
    return check_config(ConfigDict(values))


def _assignments(options: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(field, text of its value) of each option; None for a field without a value."""
    rest = list(options)
    while rest:
        option = rest.pop(0)
        name, equals, text = option.partition("=")
        if option.startswith("--noconfig.") and not equals:
            yield name.replace("--no", "", 1), "false"
        elif not option.startswith("--config."):
            raise UserError(f"unknown option {option!r}: fields are set with --config.field=value")
        elif equals:
            yield name[2:], text
        else:
            is_value = bool(rest) and not rest[0].startswith(("--config.", "--noconfig."))
            yield name[2:], rest.pop(0) if is_value else None


def _parse(name: str, text: str | None, example: Any) -> Any:
    """The value that a text means for a field; the text itself, to be refused, if it means none."""
    if text is None and isinstance(example, bool):
        return True
    if text is None:
        raise UserError(f"{name} has no value: write --{name}=VALUE")
    if isinstance(example, str):
        return text
    if isinstance(example, bool):
        return _WORDS.get(text.lower(), text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
