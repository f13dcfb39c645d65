"""The fields of a training configuration, their defaults, and the check of what a user wrote."""

import dataclasses
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
from vit_jax.models import MlpMixer, VisionTransformer, variant
from vit_jax.models.attention import ATTENTION
from vit_jax.models.blocks import REMAT
from vit_jax.parallel import SHARDINGS

CHOICES = {
    "decay_type": ("cosine", "linear", "constant", "rsqrt"),
    "optim": ("sgd", "adamw"),
    "optim_dtype": ("bfloat16", "float32"),
    "loss": ("softmax", "sigmoid"),
    "dtype": ("float32", "bfloat16"),
    "corrupt": ("error", "skip"),
    "image_dtype": ("uint8", "float32"),
    "sharding": SHARDINGS,
    "compile": ("jit", "pmap"),
    "remat": tuple(REMAT),
    "on_bad_step": ("stop", "skip", "rollback"),
    "attention": ("auto", *ATTENTION),
}
# least <= value < bound.
LIMITS = {
    "seed": (0, 2**32),
    "batch": (1, math.inf),
    "batch_eval": (1, math.inf),
    "accum_steps": (1, math.inf),
    "total_steps": (1, math.inf),
    "warmup_steps": (0, math.inf),
    "pp.crop": (1, math.inf),
    "pp.resize": (0, math.inf),
    "momentum": (0, 1),
    "b1": (0, 1),
    "b2": (0, 1),
    "weight_decay": (0, math.inf),
    "base_lr": (0, math.inf),
    "grad_norm_clip": (0, math.inf),
    "label_smoothing": (0, 1),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "progress_every": (1, math.inf),
    "eval_every": (0, math.inf),
    "checkpoint_every": (0, math.inf),
    "keep_checkpoints": (1, math.inf),
    "prefetch": (1, math.inf),
    "silence_timeout": (1, 600),
    "spike": (0, math.inf),
    "threads": (0, math.inf),
    "workers": (0, math.inf),
    "model.dropout_rate": (0, 1),
    "model.attention_dropout_rate": (0, 1),
    "model.stochastic_depth_rate": (0, 1),
    "model.hidden_size": (1, math.inf),
    "model.num_layers": (1, math.inf),
    "model.num_heads": (1, math.inf),
    "model.mlp_dim": (1, math.inf),
    "model.representation_size": (1, math.inf),
    "model.tokens_mlp_dim": (1, math.inf),
    "model.channels_mlp_dim": (1, math.inf),
}

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

# These don't change what is computed, where anything is: a run may go on with other values.
FREE_FIELDS = frozenset(
    {
        "prefetch",
        "threads",
        "workers",
        "corrupt",
        "keep_checkpoints",
        "profile",
        "sharding",
        "remat",
        "attention",
        "compile_cache",
        "silence_timeout",
        "tfds_data_dir",
        "tfds_manual_dir",
        "on_bad_step",
        "spike",
    }
)
# But all processes of a run must have the same of these.
CHANGING = {"sharding", "remat", "attention", "on_bad_step", "spike", "silence_timeout"}


def default_config() -> ConfigDict:
    """Every field with its default value: the original's fine-tuning recipe where it has one."""
    config = ConfigDict()
    config.seed = 0

    # What is trained: a named model, changed by any other fields of the network given here. With
    # weights to start from the name may stay empty; if it isn't, they have to be of that model.
    config.model = ConfigDict()
    config.model.name = ""
    config.model.dropout_rate = 0.0
    config.model.attention_dropout_rate = 0.0
    config.model.stochastic_depth_rate = 0.0
    # Where it starts: a file of weights, by its path or its name in `pretrained_dir`. With an empty
    # name the file of the model's name in `pretrained_dir`; with that empty too, from scratch.
    config.model_or_filename = ""
    config.pretrained_dir = ""
    config.dtype = "float32"  # What is computed in; weights and sums stay float32.

    # On what: a folder of pictures, a table, a TFDS name, ...: see docs/data.md.
    config.dataset = "digits"
    config.tfds_data_dir = ""  # Where TFDS keeps its data sets; empty for ~/tensorflow_datasets.
    config.tfds_manual_dir = ""  # Where it finds archives that had to be downloaded by hand.
    config.corrupt = (
        "error"  # A picture that can't be read: stop ("error"), or warn and go on ("skip").
    )
    config.splits = ConfigDict()
    config.splits.train = "train"  # E.g. "train[:98%]".
    config.splits.test = "test"

    # What is done to a picture, e.g. "inception_crop(224)|flip|value_range(-1, 1)"; empty for what
    # `crop`, `resize` and `augment` mean. A split in `pp.train` or `pp.test`, where the original
    # has them, is taken as one.
    config.pp = ConfigDict()
    config.pp.train = ""
    config.pp.eval = ""
    config.pp.crop = 224  # Height and width of what the model sees, in pixels.
    # 0: evaluation resizes the whole picture to `crop`, as the original. Else the size in pixels of
    # the shorter side, from whose centre `crop` is cut.
    config.pp.resize = 0
    # RandAugment and mixup by a name of AugReg's: none, light1, light2, medium1, medium2, strong1,
    # strong2.
    config.augment = "none"
    config.mixup = 0.0  # The parameter of its Beta distribution; 0 leaves it to `augment`.
    config.cutmix = 0.0

    # How long and how much at once. `batch` counts the pictures of a step over all devices.
    config.total_steps = 10_000
    config.batch = 512
    config.batch_eval = 512
    config.accum_steps = 8  # A step's batch is computed in this many slices, to save memory.

    # Where weights and optimizer lie: "replicate": whole on every device; "fsdp": in parts over all
    # devices; "hybrid": in parts over the devices of each process. See docs/scaling.md.
    config.sharding = "replicate"

    # "jit", or "pmap" for data parallelism over the devices of one process by `jax.pmap`.
    config.compile = "jit"
    # Where compiled programs are kept for the next start: a folder; empty for "compiled" in the
    # cache (see README.md), "off" for nowhere.
    config.compile_cache = ""
    config.scan_layers = False  # Compile one block and a loop over them, in place of each block.
    # What of a block is computed again on the way back, to save memory: "none"; "dots": all but
    # the products of tokens and weights; "full": all. See docs/scaling.md.
    config.remat = "none"

    # By what attention is computed: "xla"; "cudnn", by NVIDIA's kernel, which needs a GPU, dtype
    # bfloat16 and no dropout in attention; "auto" takes cudnn where it works.
    config.attention = "auto"

    # How.
    config.optim = "sgd"
    config.momentum = 0.9  # Of SGD.
    config.optim_dtype = "bfloat16"  # In what the momentum is kept.
    config.b1 = 0.9  # Of AdamW.
    config.b2 = 0.999
    config.weight_decay = 0.0  # Of the kernels, decoupled and scaled by the learning rate.
    config.base_lr = 0.03
    config.decay_type = "cosine"
    config.warmup_steps = 500
    config.grad_norm_clip = 1.0  # 0 for none.
    config.loss = "softmax"
    config.label_smoothing = 0.0

    # What is shown and kept. 0 for never before the end.
    config.progress_every = 10
    config.eval_every = 100
    config.checkpoint_every = 1_000
    config.keep_checkpoints = 2
    config.keep_best = False  # Also keep the weights of the best evaluation, as weights_best.npz.
    # (start, stop): what host and devices do from the end of step `start` to that of step `stop` is
    # written to WORKDIR/profile; () for never.
    config.profile = ()

    # How the data get to the device.
    config.prefetch = 2  # Batches made ready ahead of the step.
    config.threads = 0  # That decode pictures; 0 for one a core.
    config.workers = 0  # Processes that decode pictures in place of threads; 0 for threads.
    # As what training's pictures cross to the device: "uint8" rounds to whole grey levels, which
    # are normalised there; "float32" keeps fractions, as evaluation and the original do.
    config.image_dtype = "uint8"

    # When something goes wrong.
    # A step whose loss, gradient or new weights are not finite, or whose gradient's norm is more
    # than `spike` times its running mean (0: never mind): "stop" there, "skip" its update, or
    # "rollback" to the state of the last checkpoint; with both the run goes on with the next batch.
    config.on_bad_step = "stop"
    config.spike = 0.0
    # Of several processes: seconds without a sign of life after which one is given up.
    config.silence_timeout = 60.0
    return config


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


def model_fields() -> dict[str, Any]:
    """The fields of the network that config.model may hold beside those of `default_config`, each
    with a value of its type."""
    fields = {
        f.name: f.default
        for module in (MlpMixer, VisionTransformer)
        for f in dataclasses.fields(module)
    }
    for computed in ("name", "parent", "num_classes", "dtype", "loop", "attention"):
        del fields[computed]
    return fields | variant("R50+ViT-B_16") | variant("Mixer-B_16")


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
    return UserError(f"unknown field {path}: often set are {usual}; training/config.py lists all")


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
