"""The check of a training configuration that a user wrote, and its forms as text."""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.checkpoints import ENDINGS, split_tower
from vit_jax.errors import UserError
from vit_jax.training.fields import (
    ALIASES,
    CHOICES,
    FREE_FIELDS,
    LIMITS,
    default_config,
    model_fields,
)


def check_config(config: ConfigDict) -> ConfigDict:
    """The configuration with every default filled in, or a UserError about what is wrong with it.

    An unknown field is named by its full path, with the nearest known ones. Local files and folders
    get their absolute paths, so that the same run can be named from any folder.
    """
    full = default_config()
    _merge(full, _with_splits(config.to_dict()), "config")
    for field, choices in (CHOICES | {"augment": tuple(data.AUGREG)}).items():
        if full[field] not in choices:
            raise UserError(
                f"config.{field} is {full[field]!r}, expected one of {', '.join(choices)}"
            )
    flat = flatten(full)
    for field, (least, bound) in LIMITS.items():
        value = flat.get(f"config.{field}")
        if value is not None and not least <= value < bound:
            expected = f"at least {least}" if bound == math.inf else f"{least} <= value < {bound}"
            raise UserError(f"config.{field} is {value}, expected {expected}")
    patch = full.model.get("patch_size", (1, 1))
    if len(patch) != 2 or not all(type(size) is int and size > 0 for size in patch):
        raise UserError(
            f"config.model.patch_size is {patch}, expected height and width, e.g. (16, 16)"
        )
    if full.pp.train and full.augment != "none":
        raise UserError(
            f"config.augment {full.augment} and config.pp.train {full.pp.train!r} both say how to "
            f"augment: leave one out, or write {data.AUGREG[full.augment][0]} into config.pp.train"
        )
    if full.batch % full.accum_steps:
        raise UserError(
            f"config.batch {full.batch} is not divisible by config.accum_steps {full.accum_steps}: "
            "change one of them"
        )
    if full.profile and not (
        len(full.profile) == 2
        and all(type(step) is int for step in full.profile)
        and 0 <= full.profile[0] < full.profile[1]
    ):
        raise UserError(
            f"config.profile is {full.profile}, expected the steps (start, stop), e.g. (10, 13), "
            "or () for no trace"
        )
    if full.profile and full.profile[0] >= full.total_steps:
        raise UserError(
            f"config.profile {full.profile} begins after the last of config.total_steps "
            f"{full.total_steps}: lower it"
        )
    if 0 < full.spike <= 1:
        raise UserError(
            f"config.spike is {full.spike}, and a usual gradient is 1 times the usual one: use "
            "more, e.g. 10, or 0 for never"
        )
    if full.compile == "pmap" and full.sharding != "replicate":
        raise UserError(
            f"config.compile is pmap, which has the weights whole on every device, and "
            f"config.sharding {full.sharding}: leave one of them out"
        )
    if full.warmup_steps > full.total_steps:
        raise UserError(
            f"config.warmup_steps {full.warmup_steps} is more than config.total_steps "
            f"{full.total_steps}: lower it"
        )
    if not data.is_known(full.dataset) and os.path.exists(os.path.expanduser(full.dataset)):
        full.dataset = os.path.abspath(os.path.expanduser(full.dataset))
    for path in _local_weights(full):
        file, tower = split_tower(path)
        if os.path.exists(file):
            full.model_or_filename = os.path.abspath(file) + (f":{tower}" if tower else "")
            full.pretrained_dir = ""
            break
    return full


def without_effect(config: ConfigDict) -> list[str]:
    """Fields of a checked configuration that were set and that another one makes useless, of the
    optimizer, of the preprocessing and of the readers: ["config.b2 0.99 (config.optim is sgd)",
    ...]."""
    flat, default = flatten(config), flatten(default_config())
    pp, optim = config.pp, f"config.optim is {config.optim}"
    reasons = dict.fromkeys(("b1", "b2") if config.optim == "sgd" else ("momentum",), optim)
    if pp.eval:
        reasons |= {"pp.resize": "config.pp.eval is set"}
        reasons |= {"pp.crop": "config.pp.train and config.pp.eval are set"} if pp.train else {}
    if config.workers > 0:
        reasons["threads"] = f"config.workers is {config.workers}"
    return [
        f"config.{field} {flat[f'config.{field}']} ({reason})"
        for field, reason in reasons.items()
        if flat[f"config.{field}"] != default[f"config.{field}"]
    ]


def weights_source(config: ConfigDict) -> str | None:
    """The weights that a checked configuration starts from, for `load`; None for from scratch.

    Raises UserError if there are none of that name.
    """
    name, folder = config.model_or_filename, config.pretrained_dir
    if not name and not (folder and config.model.name):
        return None
    if name and os.path.exists(split_tower(name)[0]):
        return name
    if "://" in folder and (not name or "-" in name):
        return f"{folder.rstrip('/')}/{(name or config.model.name).removesuffix('.npz')}.npz"
    if name and ("/" in name or not name.endswith(ENDINGS)):
        return name  # Published, perhaps: `load` knows.
    raise UserError(
        f"no weights at {' or '.join(_local_weights(config))}: give --weights, or "
        "config.model_or_filename, the path of a file, a finished run's workdir, or the name of "
        'published weights such as "augreg/Ti_16"'
    )


def _local_weights(config: ConfigDict) -> list[str]:
    """Where the weights of a configuration may lie."""
    name, folder = config.model_or_filename, Path(config.pretrained_dir or ".").expanduser()
    if name:
        paths = [Path(name).expanduser(), folder / name]
        paths += [] if name.endswith(ENDINGS) else [folder / f"{name}.npz"]
    else:
        paths = [folder / f"{config.model.name}.npz"] if config.pretrained_dir else []
    return list(dict.fromkeys(map(str, paths)))


_PART = r"\s*(even_splits\([^|]*\)|\w+)\s*(\[[^][|]*\]\s*)?"
_SPLIT = re.compile(rf"{_PART}(\+{_PART})*")


def original_split(field: str, value: Any) -> str | None:
    """`config.splits.train` for `config.pp.train`, if it holds a split as in the original's
    configurations, and so with `test`; else None."""
    if field not in ("config.pp.train", "config.pp.test") or not isinstance(value, str):
        return None
    operation = value.strip() in data.OPERATIONS
    return field.replace("pp", "splits") if _SPLIT.fullmatch(value) and not operation else None


def _with_splits(values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(values.get("pp"), dict):
        pp = dict(values["pp"])
        moved = {k: pp.pop(k) for k in list(pp) if original_split(f"config.pp.{k}", pp[k])}
        if moved:
            splits = dict(values.get("splits", {})) | moved
            return values | {"pp": pp, "splits": splits}
    return values


def _merge(full: ConfigDict, values: Mapping[str, Any], path: str) -> None:
    extra = model_fields() if path == "config.model" else {}
    for key, value in values.items():
        here = f"{path}.{key}"
        if key in extra and key not in full:
            value = tuple(value) if isinstance(value, list) else value
            full[key] = _convert(value, extra[key], here)
            continue
        if key not in full:
            raise unknown_field(here, [f"{path}.{k}" for k in full.keys() | extra.keys()])
        default = full[key]
        if isinstance(default, ConfigDict):
            if not isinstance(value, Mapping):
                raise UserError(f"{here} is {value!r}, expected fields: {', '.join(default)}")
            _merge(default, value, here)
        else:
            full[key] = _convert(value, default, here)


def _convert(value: Any, default: Any, path: str) -> Any:
    """The value in its field's type: 1 does for 1.0, nothing else is changed."""
    if default is None:  # Only representation_size: a number, or no layer.
        default = 768 if value is not None else None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(
            f"{path} is {value!r} of type {type(value).__name__}, expected "
            f"{type(default).__name__}, e.g. {default!r}"
        )
    return value


def unknown_field(path: str, known: list[str]) -> UserError:
    """The error for a misspelt field: its full path, and the nearest ones that exist."""
    # Compared by their last names: "config.model." would make any two look alike.
    fields: dict[str, list[str]] = {alias: [field] for alias, field in ALIASES.items()}
    for field in known:
        fields.setdefault(field.rpartition(".")[2], []).append(field)
    name = path.rpartition(".")[2]
    names = [name] if name in fields else difflib.get_close_matches(name, fields, n=3, cutoff=0.6)
    near = list(dict.fromkeys(field for n in names for field in fields[n]))
    if near:
        return UserError(f"unknown field {path}: did you mean {' or '.join(near)}?")
    usual = ", ".join(dict.fromkeys(ALIASES.values()))
    return UserError(f"unknown field {path}: often set are {usual}; training/fields.py lists all")


def config_to_json(config: ConfigDict) -> str:
    """The configuration as JSON text; `config_from_json` gives it back."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def config_from_json(text: str) -> ConfigDict:
    """The configuration that `config_to_json` wrote."""
    values = json.loads(text)
    values["model"] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values["model"].items()
    }
    values["profile"] = tuple(values.get("profile", ()))
    return ConfigDict(values)


def differing_fields(a: ConfigDict, b: ConfigDict) -> list[str]:
    """What differs between two configurations and matters: ["config.batch 32 -> 64", ...]."""
    # A field that is younger than a run has its default there.
    flat_a, flat_b = ({**flatten(default_config()), **flatten(x)} for x in (a, b))
    return [
        f"{key} {flat_a.get(key)!r} -> {flat_b.get(key)!r}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key) != flat_b.get(key) and key.removeprefix("config.") not in FREE_FIELDS
    ]


def flatten(config: ConfigDict, path: str = "config") -> dict[str, Any]:
    """The fields by their full names, {"config.pp.crop": 224, ...}."""
    flat = {}
    for key, value in config.items():
        here = f"{path}.{key}"
        flat.update(flatten(value, here) if isinstance(value, ConfigDict) else {here: value})
    return flat
