"""The configuration of a run: its fields (fields.toml), and the check of what a user wrote.

Nothing slow is imported with this module: `vit-jax train --help` lists the fields.
"""

import difflib
import functools
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.files import expand_user


class Field(NamedTuple):
    """One field of a configuration.

    Attributes:
      name: without "config.".
      default: its value if nobody gives one; its type is the field's.
      values: the choices; or (least, bound) of a number, least <= value < bound; or any if empty.
      changes: whether a run may go on with another value: "" no; "run" yes, if all processes have
        the same; "process" yes, and each process may have its own.
      help: what it means, in a line.
    """

    name: str
    default: Any
    values: tuple[Any, ...]
    changes: str
    help: str

    @property
    def expected(self) -> str:
        """The values that it may have, in words; "" for any."""
        if not self.values or isinstance(self.values[0], str):
            return f"one of {', '.join(self.values)}" if self.values else ""
        least, bound = self.values
        return f"at least {least}" if bound == math.inf else f"{least} <= value < {bound}"


def _read_fields() -> dict[str, Field]:
    table = tomllib.loads(Path(__file__).with_name("fields.toml").read_text(encoding="utf-8"))
    fields = {}
    for name, row in table.items():
        default = () if row["default"] == [] else row["default"]
        limits = (row["at_least"], row.get("below", math.inf)) if "at_least" in row else ()
        values = tuple(row.get("choices", limits))
        fields[name] = Field(name, default, values, row.get("changes", ""), row["help"])
    return fields


FIELDS = _read_fields()  # By name.
# Of the network's own fields, see `model_fields`.
MODEL_SIZES = (
    *("model.hidden_size", "model.num_layers", "model.num_heads", "model.mlp_dim"),
    *("model.representation_size", "model.tokens_mlp_dim", "model.channels_mlp_dim"),
)
# What other programs call a field.
ALIASES = {
    "learning_rate": "config.base_lr",
    "lr": "config.base_lr",
    "batch_size": "config.batch",
    "epochs": "config.total_steps",
    "steps": "config.total_steps",
    "image_size": "config.pp.crop",
    "weights": "config.model_or_filename",
}


# Fields of the original's that have no counterpart, and why.
_ANSWERS = {
    "shuffle_buffer": "the order of images follows from config.seed and the step alone",
    "trainer": "there is one, and config.compile and config.sharding say how it is spread",
}


def default_config() -> ConfigDict:
    """Every field with its default value."""
    values: dict[str, Any] = {}
    for field in FIELDS.values():
        group, _, name = field.name.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = field.default
    return ConfigDict(values)


def model_fields() -> dict[str, Any]:
    """The fields of the network that config.model may hold beside those of `default_config`, each
    with a value of its type."""
    import dataclasses
    import typing

    from vit_jax.models import FAMILIES, VARIANTS

    families = [family for family in FAMILIES if not family.classifies_by_text]
    fields = {}
    for field in (field for family in families for field in dataclasses.fields(family)):
        number = field.default is None and float in typing.get_args(field.type)
        fields[field.name] = 1e-5 if number else field.default
    for variant in VARIANTS.values():  # Some fields have no default, or one of another type.
        fields |= variant
    computed = ("name", "parent", "num_classes", "dtype", "loop", "kernels")
    return {name: value for name, value in fields.items() if name not in computed}


def check_config(config: ConfigDict) -> ConfigDict:
    """The configuration with every default filled in, or a UserError about what is wrong with it.

    An unknown field is named by its full path, with the nearest known ones. Local files and folders
    get their absolute paths, so that the same run can be named from any folder.
    """
    from vit_jax.checkpoints import split_tower

    full = default_config()
    _merge(full, _with_splits(config.to_dict()), "config")
    for problem in _problems(full):
        raise UserError(problem)
    dataset = expand_user(full.dataset)
    if not data.is_known(dataset) and os.path.exists(dataset):
        full.dataset = os.path.abspath(dataset)
    for path in _local_weights(full):
        file, tower = split_tower(path)
        if os.path.exists(file):
            full.model_or_filename = os.path.abspath(file) + (f":{tower}" if tower else "")
            full.pretrained_dir = ""
            break
    return full


def _merge(full: ConfigDict, values: Mapping[str, Any], path: str) -> None:
    """Puts values into their fields. Raises UserError for unknown ones and other types."""
    extra = model_fields() if path == "config.model" else {}
    for key, value in values.items():
        here = f"{path}.{key}"
        if key not in full and key not in extra:
            raise unknown_field(here, [f"{path}.{k}" for k in full.keys() | extra.keys()])
        default = full[key] if key in full else extra[key]
        if not isinstance(default, ConfigDict):
            full[key] = _convert(value, default, here)
        elif isinstance(value, Mapping):
            _merge(default, value, here)
        else:
            raise UserError(f"{here} is {value!r}, expected fields: {', '.join(default)}")


def _convert(value: Any, default: Any, path: str) -> Any:
    """The value in its field's type: 1 does for 1.0, a list for a tuple, no more."""
    if default is None:  # Only representation_size: a number, or no layer.
        default = 768 if value is not None else None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if type(value) is not type(default):
        raise UserError(
            f"{path} is {value!r} of type {type(value).__name__}, expected "
            f"{type(default).__name__}, e.g. {default!r}"
        )
    return value


def _problems(config: ConfigDict) -> Iterator[str]:
    """What is wrong with the values of a configuration whose fields and types are right."""
    flat = flatten(config)
    sizes = [Field(name, 1, (1, math.inf), "", "") for name in MODEL_SIZES]
    for field in [*FIELDS.values(), *sizes]:
        value = flat.get(f"config.{field.name}")
        if isinstance(field.default, str):
            fits = not field.values or value in field.values
        else:
            fits = not field.values or value is None or field.values[0] <= value < field.values[1]
        if not fits:
            yield f"config.{field.name} is {value!r}, expected {field.expected}"
    patch = config.model.get("patch_size", (1, 1))
    if len(patch) != 2 or not all(type(size) is int and size > 0 for size in patch):
        yield f"config.model.patch_size is {patch}, expected height and width, e.g. (16, 16)"
    if config.pp.train and config.augment != "none":
        operation = data.AUGREG[config.augment][0]
        yield (
            f"config.augment {config.augment} and config.pp.train {config.pp.train!r} both say how "
            f"to augment: leave one out, or write {operation} into config.pp.train"
        )
    if config.batch % config.accum_steps:
        yield (
            f"config.batch {config.batch} is not divisible by config.accum_steps "
            f"{config.accum_steps}: change one of them"
        )
    steps = config.profile
    if steps and not (
        len(steps) == 2 and all(type(s) is int for s in steps) and 0 <= steps[0] < steps[1]
    ):
        yield (
            f"config.profile is {steps}, expected the steps (start, stop), e.g. (10, 13), or () "
            "for no trace"
        )
    elif steps and steps[0] >= config.total_steps:
        yield (
            f"config.profile {steps} begins after the last of config.total_steps "
            f"{config.total_steps}: lower it"
        )
    if 0 < config.spike <= 1:
        yield (
            f"config.spike is {config.spike}, and a usual gradient is 1 times the usual one: use "
            "more, e.g. 10, or 0 for never"
        )
    if config.compile == "pmap" and config.sharding != "replicate":
        yield (
            f"config.compile is pmap, which has the weights whole on every device, and "
            f"config.sharding {config.sharding}: leave one of them out"
        )
    if config.warmup_steps > config.total_steps:
        yield (
            f"config.warmup_steps {config.warmup_steps} is more than config.total_steps "
            f"{config.total_steps}: lower it"
        )


def unknown_field(path: str, known: list[str]) -> UserError:
    """The error for a misspelt field: its full path, and the nearest ones that exist."""
    # Compared by their last names: "config.model." would make any two look alike.
    fields: dict[str, list[str]] = {alias: [field] for alias, field in ALIASES.items()}
    for field in known:
        fields.setdefault(field.rpartition(".")[2], []).append(field)
    name = path.rpartition(".")[2]
    if name in _ANSWERS:
        return UserError(f"there is no {path}: {_ANSWERS[name]}; leave it out")
    names = [name] if name in fields else difflib.get_close_matches(name, fields, n=3, cutoff=0.6)
    near = list(dict.fromkeys(field for n in names for field in fields[n]))
    if near:
        return UserError(f"unknown field {path}: did you mean {' or '.join(near)}?")
    usual = ", ".join(dict.fromkeys(ALIASES.values()))
    return UserError(f"unknown field {path}: often set are {usual}; vit-jax train --help lists all")


def without_effect(config: ConfigDict) -> list[str]:
    """Fields of a checked configuration that were set and that another one makes useless, of the
    optimizer, of the preprocessing and of the readers: ["config.b2 0.99 (config.optim is sgd)",
    ...]."""
    flat, pp, optim = flatten(config), config.pp, f"config.optim is {config.optim}"
    reasons = dict.fromkeys(("b1", "b2") if config.optim == "sgd" else ("momentum",), optim)
    if pp.eval:
        reasons |= {"pp.resize": "config.pp.eval is set"}
        reasons |= {"pp.crop": "config.pp.train and config.pp.eval are set"} if pp.train else {}
    if config.workers > 0:
        reasons["threads"] = f"config.workers is {config.workers}"
    return [
        f"config.{name} {flat[f'config.{name}']} ({reason})"
        for name, reason in reasons.items()
        if flat[f"config.{name}"] != FIELDS[name].default
    ]


def differing_fields(a: ConfigDict, b: ConfigDict) -> list[str]:
    """What differs between two configurations and matters: ["config.batch 32 -> 64", ...]."""
    # A field that is younger than a run has its default there.
    flat_a, flat_b = ({**flatten(default_config()), **flatten(x)} for x in (a, b))
    free = {f"config.{field.name}" for field in FIELDS.values() if field.changes}
    return [
        f"{key} {flat_a.get(key)!r} -> {flat_b.get(key)!r}"
        for key in sorted((flat_a.keys() | flat_b.keys()) - free)
        if flat_a.get(key) != flat_b.get(key)
    ]


def flatten(config: ConfigDict, path: str = "config") -> dict[str, Any]:
    """The fields by their full names, {"config.pp.crop": 224, ...}."""
    flat = {}
    for key, value in config.items():
        here = f"{path}.{key}"
        flat.update(flatten(value, here) if isinstance(value, ConfigDict) else {here: value})
    return flat


def config_to_json(config: ConfigDict) -> str:
    """The configuration as JSON text; `config_from_json` gives it back."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def config_from_json(text: str) -> ConfigDict:
    """The configuration that `config_to_json` wrote; a field that is younger has its default.

    Raises UserError for unknown fields and other types, ValueError and AttributeError for what is
    no such JSON.
    """
    config = default_config()
    _merge(config, json.loads(text), "config")
    return config


# Where a run starts.


def weights_source(config: ConfigDict) -> str | None:
    """The weights that a checked configuration starts from, for `load`; None for from scratch.

    Raises UserError if there are none of that name.
    """
    from vit_jax.checkpoints import ENDINGS, split_tower

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
    from vit_jax.checkpoints import ENDINGS

    name, folder = config.model_or_filename, Path(expand_user(config.pretrained_dir or "."))
    if name:
        paths = [Path(expand_user(name)), folder / name]
        paths += [] if name.endswith(ENDINGS) else [folder / f"{name}.npz"]
    else:
        paths = [folder / f"{config.model.name}.npz"] if config.pretrained_dir else []
    return list(dict.fromkeys(map(str, paths)))


# What is done to an image.


def train_spec(config: ConfigDict) -> str:
    """What training does to an image: by default the method and the values are the weights'."""
    if config.pp.train:
        return config.pp.train
    method, values = _method_and_values(_recorded(config))
    augment, _ = data.AUGREG[config.augment]
    parts = [f"inception_crop({config.pp.crop}{method})", "flip", augment, values]
    return "|".join(filter(None, parts))


def given_heads(config: ConfigDict) -> int | None:
    """The attention heads of the weights that a run starts from, which files of PyTorch's may not
    tell; None if the configuration doesn't either."""
    return config.model.get("num_heads")


def eval_spec(config: ConfigDict) -> str:
    """What evaluation does to an image: by default what is recorded with the weights.

    Raises UserError if it is to be cut larger than it was resized.
    """
    from vit_jax.pretrained import original_preprocess

    crop, resize = config.pp.crop, config.pp.resize
    if config.pp.eval:
        return config.pp.eval
    if resize and resize < crop:
        raise UserError(
            f"config.pp.resize {resize} is less than config.pp.crop {crop}: raise it, or use 0"
        )
    recorded = _recorded(config)
    if resize:
        method, values = _method_and_values(recorded)
        return f"resize_small({resize}{method})|central_crop({crop})|{values}"
    return recorded or original_preprocess((crop, crop))


def _method_and_values(recorded: str | None) -> tuple[str, str]:
    """What a recorded preprocessing resizes with, and its last operation."""
    method = re.search(r", method='\w+'", recorded or "")
    return method[0] if method else "", (recorded or "value_range(-1, 1)").rpartition("|")[2]


def _recorded(config: ConfigDict) -> str | None:
    """What is recorded with the weights that a run starts from, for images of config.pp.crop.

    None from scratch, for weights without notes, and for those that can't be read, of which
    whoever loads them will tell; or if images don't get their size by it, or values at its end.
    """
    return _recorded_with_levels(config)[0]


def recorded_levels(config: ConfigDict) -> str:
    """The operation `levels` that is recorded with the weights that a run starts from; else ""."""
    return _recorded_with_levels(config)[1]


def _recorded_with_levels(config: ConfigDict) -> tuple[str | None, str]:
    from vit_jax.checkpoints import split_tower

    try:
        source = weights_source(config)
        if source is None:
            return None, ""
        file = split_tower(source)[0]
        changed = os.stat(file).st_mtime_ns if os.path.exists(file) else 0
        return _recorded_in(source, given_heads(config), config.pp.crop, changed)
    except UserError:
        return None, ""


@functools.lru_cache(maxsize=8)
def _recorded_in(source: str, heads: int | None, crop: int, changed: int) -> tuple[str | None, str]:
    """Read once; `changed` is the file's time, by which others of that name are told."""
    from vit_jax.pretrained import find_weights, preprocess_for, read_weights

    path, tower = find_weights(source)
    _, spec, notes = read_weights(path, tower, values=False, heads=heads)
    text = preprocess_for(notes, spec, spec.replace(image_size=(crop, crop)))
    preprocess = data.parse(text)
    fits = notes and preprocess.output_size == (crop, crop) and preprocess.normalize
    first, _, rest = preprocess.spec.partition("|")
    levels, rest = (first, rest) if preprocess.levels else ("", preprocess.spec)
    return (rest if fits else None), levels


def mixup(config: ConfigDict) -> float:
    """The parameter of mixup's Beta distribution, 0 for none."""
    return config.mixup or data.AUGREG[config.augment][1]


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
    """The fields with the splits that stand in `pp` moved to `splits`."""
    pp = values.get("pp")
    if not isinstance(pp, dict):
        return values
    splits = {k: v for k, v in pp.items() if original_split(f"config.pp.{k}", v)}
    rest = {k: v for k, v in pp.items() if k not in splits}
    return values | {"pp": rest, "splits": {**values.get("splits", {}), **splits}}
