"""Handwritten digits from scratch, in about a minute on two CPU cores.

A small Vision Transformer on the 1,797 digits (8x8 pixels, one channel) that come with the package.
"""

from vit_jax.errors import UserError
from vit_jax.training import default_config


def get_config(arg: str = ""):
    """The configuration; takes no argument."""
    if arg:
        raise UserError(f"digits takes no argument, found {arg!r}: write --config=digits")
    config = default_config()
    config.dataset = "digits"
    config.model.name = "ViT-Ti_16"
    config.model.patch_size = (2, 2)
    config.model.hidden_size = 64
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.mlp_dim = 128
    config.model.dropout_rate = 0.1

    # The digits fill their 8x8 pixels: shifting or cropping them does harm.
    config.pp.train = "resize(8)|value_range(-1, 1)"
    config.pp.eval = "resize(8)|value_range(-1, 1)"

    config.optim = "adamw"
    config.optim_dtype = "float32"
    config.base_lr = 4e-3
    config.weight_decay = 1.0
    config.warmup_steps = 50
    config.total_steps = 1000
    config.batch = 64
    config.batch_eval = 360
    config.accum_steps = 1

    config.progress_every = 20
    config.eval_every = 200
    config.checkpoint_every = 200
    return config
