"""Fine-tuning an AugReg model on a small data set (arXiv:2106.10270).

    python -m vit_jax.main --config=configs/augreg.py:R_Ti_16 --config.dataset=DIR \\
        --workdir=WORKDIR --config.base_lr=0.01

The argument is the model's name in the AugReg files, which means its recommended checkpoint, or the
name of one of them. With --config.model_or_filename=FILE.npz it is the model that the file is of.
"""

from vit_jax.errors import UserError
from vit_jax.models import VARIANTS, variant
from vit_jax.training import default_config


def get_config(arg: str = ""):
    """The configuration for a model, e.g. "Ti_16"."""
    if not arg:
        raise UserError("augreg.py needs a model: --config=augreg:MODEL, e.g. augreg:Ti_16")
    model = arg.partition("-")[0]
    fields = variant(model)  # Says so at once if there is no such model.
    config = default_config()
    config.model.name = next(name for name in VARIANTS if VARIANTS[name] == fields)
    config.model_or_filename = arg
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
