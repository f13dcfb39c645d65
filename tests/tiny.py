"""The smallest run that has everything: 40 steps on the digits, with dropout and AdamW."""

from vit_jax.training import default_config


def get_config(arg: str = ""):
    config = default_config()
    config.dataset = "digits"
    config.model.name = "ViT-Ti_16"
    config.model.patch_size = (4, 4)
    config.model.hidden_size = 16
    config.model.num_layers = 1
    config.model.num_heads = 2
    config.model.mlp_dim = 16
    config.model.dropout_rate = 0.1
    config.pp.train = "random_shift(1)|value_range(-1, 1)"
    config.pp.eval = "value_range(-1, 1)"
    config.optim = "adamw"
    config.base_lr = 4e-3
    config.weight_decay = 0.05
    config.warmup_steps = 4
    config.total_steps = 40
    config.batch = 16
    config.batch_eval = 120
    config.accum_steps = 2
    config.progress_every = 5
    config.eval_every = 20
    config.checkpoint_every = 10
    config.threads = 1
    return config
