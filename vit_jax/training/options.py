"""Configurations from files, changed by `--config.field=value` options."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from vit_jax.errors import UserError
from vit_jax.training.config import check_config, model_fields, unknown_field


def find_config_file(name: str) -> Path:
    """The file of a configuration: a path, or the name of one that comes with the package,
    "digits".

    Raises UserError if there is none.
    """
    path = Path(name)
    package = Path(__file__).resolve().parents[1]
    # Installed, the recipes stand in the package; in a clone, at the top of the repository.
    folders = [f for f in (package / "configs", package.parent / "configs") if f.is_dir()]
    candidates = [path, *(f / f"{path.stem}.py" for f in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({p.stem for f in folders for p in f.glob("*.py")})
    raise UserError(f"no configuration file {name}: give a path, or one of {', '.join(known)}")


def load_config(name: str) -> ConfigDict:
    """The configuration that a file makes.

    Args:
      name: a file, or the name of one that comes with the package; with an argument for its
        `get_config` after a colon, e.g. "configs/vit.py:b16,cifar10".

    Raises UserError if there is no such file or it is no configuration.
    """
    file, _, argument = name.partition(":")
    path = find_config_file(file)
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is no configuration file: expected Python with get_config(arg)")
    module = importlib.util.module_from_spec(module_spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError, AttributeError, NameError, TypeError) as e:
        raise UserError(f"{path} is no configuration file: {type(e).__name__}: {e}") from e
    finally:
        sys.dont_write_bytecode = writes
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is no configuration file: it has no function get_config(arg)")
    return module.get_config(argument)


def override(config: ConfigDict, options: Sequence[str]) -> ConfigDict:
    """Changes fields as options say, and checks the whole.

    Args:
      config: as `load_config` gives it.
      options: "--config.field=value" or "--config.field value", e.g. "--config.pp.crop=384".

    Raises UserError naming a misspelt field with the nearest ones, or a value of the wrong type.
    """
    options = list(options)
    config = _with_model_fields(config, options)
    known = [*_fields(config), *(f"config.model.{field}" for field in model_fields())]
    names = []
    for position, option in enumerate(options):
        if option.startswith("--config."):
            name = option[2:].partition("=")[0]
            if name not in known and not any(k.startswith(f"{name}.") for k in known):
                raise unknown_field(name, known)
            names.append(name)
        elif not position or options[position - 1].partition("=")[1] or not names:
            raise UserError(f"unknown option {option!r}: fields are set with --config.field=value")
    command = ["vit-jax", *options]
    values = flags.FlagValues()
    try:
        # This defines a flag for each field that stands in `sys_argv`.
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        values(command)
    except (flags.Error, ValueError, TypeError, AttributeError) as e:
        raise UserError(" ".join(str(e).split()).replace("flag --config", "config")) from e
    return check_config(values.config)


def _with_model_fields(config: ConfigDict, options: Sequence[str]) -> ConfigDict:
    """Adds the fields of the network that options set and the configuration leaves to the named
    model: only fields that are there can be set."""
    config = config.copy_and_resolve_references()
    named = {o.removeprefix("--config.model.").partition("=")[0] for o in options}
    for field, example in model_fields().items():
        if field in named and field not in config.get("model", ConfigDict()):
            config.model[field] = placeholder(int) if example is None else example
    return config


def _fields(config: ConfigDict, path: str = "config") -> list[str]:
    names = []
    for key, value in config.items():
        here = f"{path}.{key}"
        names += _fields(value, here) if isinstance(value, ConfigDict) else [here]
    return names
