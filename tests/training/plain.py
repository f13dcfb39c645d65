"""The default configuration, with nothing but what makes a run small: 2 steps on the digits."""

from vit_jax.training import default_config


def get_config(arg: str = ""):
    config = default_config()
    config.model.name = "ViT-Ti_16"
    config.model.patch_size = (4, 4)
    config.model.num_layers = 2
    config.pp.crop = 16
    config.total_steps = 2
    config.warmup_steps = 0  # The first step has the full learning rate.
    config.batch = 16
    return config
