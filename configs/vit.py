"""Fine-tuning a ViT as the paper did (arXiv:2010.11929).

    python -m vit_jax.main --config=configs/vit.py:b16,cifar10 --config.pretrained_dir=DIR \\
        --workdir=WORKDIR

The argument is MODEL,DATASET: a short or official name of a model, and a data set or folder.
"""

from vit_jax.errors import UserError
from vit_jax.models import list_models, variant
from vit_jax.training import default_config

# What the published recipe says of a data set: its splits, steps and image size.
PRESETS = {
    "cifar10": {"train": "train[:98%]", "test": "test", "total_steps": 10_000, "crop": 384},
    "cifar100": {"train": "train[:98%]", "test": "test", "total_steps": 10_000, "crop": 384},
    "imagenet2012": {
        "train": "train[:99%]",
        "test": "validation",
        "total_steps": 20_000,
        "crop": 384,
    },
}

# "b16" for "ViT-B_16", "s32_gap_norep" for "ViT-S_32-gap-norep".
SHORT_NAMES = {
    name.removeprefix("ViT-").replace("-", "_").lower().replace("_", "", 1): name
    for name in list_models()
}


def get_config(arg: str = ""):
    """The configuration for "MODEL,DATASET"."""
    model, _, dataset = arg.partition(",")
    if not dataset:
        raise UserError(f"vit.py needs MODEL,DATASET, found {arg!r}: e.g. vit.py:b16,cifar10")
    preset = PRESETS.get(
        dataset, {"train": "train", "test": "test", "total_steps": 500, "crop": 384}
    )

    config = default_config()
    config.model.name = SHORT_NAMES.get(model, model)
    config.model.dropout_rate = variant(config.model.name).get("dropout_rate", 0.0)
    config.pretrained_dir = "."  # Holds the official weights, e.g. ViT-B_16.npz.
    config.dataset = dataset
    config.splits.train = preset["train"]
    config.splits.test = preset["test"]
    config.pp.crop = preset["crop"]
    config.total_steps = preset["total_steps"]

    config.optim = "sgd"
    config.base_lr = 0.01 if (model, dataset) == ("b16", "cifar10") else 0.03
    config.decay_type = "cosine"
    config.warmup_steps = min(500, config.total_steps // 5)
    config.grad_norm_clip = 1.0
    config.batch = 512
    config.accum_steps = 8
    return config
