"""Fine-tuning an AugReg model on a small data set (arXiv:2106.10270).

    python -m vit_jax.main --config=configs/augreg.py:Ti_16 --config.model_or_filename=FILE.npz \\
        --config.dataset=DIR --workdir=WORKDIR

The argument is the model's name in the AugReg files, and the file has to be of that model.
"""

from vit_jax.models import variant
from vit_jax.training import default_config


def get_config(arg: str = "B_16"):
    """The configuration for a model, e.g. "Ti_16"."""
    variant(arg)  # Says so at once if there is no such model.
    config = default_config()
    config.model.name = f"ViT-{arg}"
    config.pretrained_dir = "."
    config.pp.crop = 384

    config.optim = "sgd"
    config.base_lr = 0.03
    config.decay_type = "cosine"
    config.warmup_steps = 100
    config.total_steps = 500
    config.grad_norm_clip = 1.0
    config.batch = 512
    config.accum_steps = 8
    return config
