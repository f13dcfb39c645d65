"""The fields of a training configuration: their defaults, and what they may hold."""

import dataclasses
import math
import typing
from typing import Any

from ml_collections import ConfigDict

from vit_jax.models import FAMILIES, VARIANTS
from vit_jax.models.kernels import ATTENTION
from vit_jax.models.stack import REMAT
from vit_jax.sharding import SHARDINGS

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
    "ema_decay": (0, 1),
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
    "workers": (-1, math.inf),
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

    # On what: a folder of images, a table, a TFDS name, ...: see docs/data.md.
    config.dataset = "digits"
    config.tfds_data_dir = ""  # Where TFDS keeps its data sets; empty for ~/tensorflow_datasets.
    config.tfds_manual_dir = ""  # Where it finds archives that had to be downloaded by hand.
    config.corrupt = (
        "error"  # An image that can't be read: stop ("error"), or warn and go on ("skip").
    )
    config.splits = ConfigDict()
    config.splits.train = "train"  # E.g. "train[:98%]".
    config.splits.test = "test"

    # What is done to an image, e.g. "inception_crop(224)|flip|value_range(-1, 1)"; empty for what
    # `crop`, `resize` and `augment` mean. A split in `pp.train` or `pp.test`, where the original
    # has them, is taken as one.
    config.pp = ConfigDict()
    config.pp.train = ""
    config.pp.eval = ""
    config.pp.crop = 224  # Height and width of what the model sees, in pixels.
    # 0: evaluation resizes the whole image to `crop`, as the original. Else the size in pixels of
    # the shorter side, from whose centre `crop` is cut.
    config.pp.resize = 0
    # RandAugment and mixup by a name of AugReg's: none, light1, light2, medium1, medium2, strong1,
    # strong2.
    config.augment = "none"
    config.mixup = 0.0  # The parameter of its Beta distribution; 0 leaves it to `augment`.
    config.cutmix = 0.0

    # How long and how much at once. `batch` counts the images of a step over all devices.
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
    # bfloat16 and no dropout in attention; "auto" takes cudnn where it works and is faster.
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
    # What is evaluated and left at the end is an exponential moving average of the weights:
    # average = ema_decay * average + (1 - ema_decay) * weights, from the first ones on; 0 for none.
    config.ema_decay = 0.0

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
    # Who decodes images: so many processes, or threads where `workers` is 0. -1 for a process a
    # core where there are more than two and `threads` doesn't ask for threads.
    config.workers = -1
    config.threads = 0  # 0 for one a core.
    # As what training's images cross to the device: "uint8" rounds to whole grey levels, which
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


def model_fields() -> dict[str, Any]:
    """The fields of the network that config.model may hold beside those of `default_config`, each
    with a value of its type."""
    families = [family for family in FAMILIES if not family.classifies_by_text]
    fields = {}
    for field in (field for family in families for field in dataclasses.fields(family)):
        number = field.default is None and float in typing.get_args(field.type)
        fields[field.name] = 1e-5 if number else field.default
    for variant in VARIANTS.values():  # Some fields have no default, or one of another type.
        fields |= variant
    computed = ("name", "parent", "num_classes", "dtype", "loop", "kernels")
    return {name: value for name, value in fields.items() if name not in computed}
