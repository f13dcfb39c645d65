"""Swin Transformers from scratch on ImageNet, with the settings of their authors (arXiv:2103.14030,
arXiv:2111.09883).

    vit-jax train --config=configs/swin.py:Swin-T_4-w7 --workdir=WORKDIR

The argument is the model's name, of those that were trained so (others began with ImageNet-21k, or
were fine-tuned). The settings are for batches of 1,024. What differs from the published run,
because it isn't here:

- The rate falls to 0; theirs to 5e-6. Theirs warms up from 5e-7, this from 0.
- RandAugment always applies its two operations, at one magnitude; theirs each of them half of the
  time, at a magnitude drawn around it, of another list, and fills with the mean colour. It takes
  the place of a jitter of colours in both.
- Mixup's share of an image's own is a half at least, and its partner the image before it, not the
  one as far from the end of the batch.
- What is erased becomes noise of bytes; theirs is of normalised values, after the normalisation.
- Weight decay is for kernels, as theirs, but in version 2 also for those of the MLP of relative
  positions, which theirs leaves out. Tables of biases and scales have none in either.
- First weights of the head are zeros; theirs are normal, of deviation 0.02.

Theirs has no average of the weights, and evaluates the last ones.
"""

from vit_jax.errors import UserError
from vit_jax.models import SwinTransformer, variant
from vit_jax.training import default_config

# Stochastic depth.
DEPTH_RATES = {"T": 0.2, "S": 0.3, "B": 0.5}
# What was trained on ImageNet's 1,000 classes from the start.
FROM_SCRATCH = (
    *(f"Swin-{size}_4-w7" for size in DEPTH_RATES),
    "Swin-T_4-c24-w8",
    *(f"SwinV2-{size}_4-w{window}" for size in DEPTH_RATES for window in (8, 16)),
)
_EPOCH = 1_281_167 // 1024  # In steps.
_NORMALIZE = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"


def get_config(arg: str = ""):
    """The configuration for a model, e.g. "Swin-T_4-w7"."""
    if arg not in FROM_SCRATCH:
        raise UserError(
            f"swin.py needs one of {', '.join(FROM_SCRATCH)}, found {arg!r}: others were trained "
            "on ImageNet-21k, or fine-tuned, by other settings"
        )
    size = SwinTransformer(None, **variant(arg)).usual_size[0]
    config = default_config()
    config.model.name = arg
    config.model.stochastic_depth_rate = DEPTH_RATES[arg.partition("-")[2][0]]

    config.dataset = "imagenet2012"
    config.splits.test = "validation"
    config.pp.train = (
        f"inception_crop({size}, 0.08, method='pil_bicubic')|flip|randaug(2, 9)"
        f"|random_erasing(0.25, area_max=0.333)|{_NORMALIZE}"
    )
    config.pp.eval = (
        f"resize_small({256 * size // 224}, method='pil_bicubic')"
        f"|central_crop({size}, round_even=True)|{_NORMALIZE}"
    )
    config.mixup = 0.8
    config.cutmix = 1.0
    config.label_smoothing = 0.1

    config.optim = "adamw"
    config.optim_dtype = "float32"
    config.base_lr, config.weight_decay = 1e-3, 0.05
    config.grad_norm_clip = 5.0
    config.warmup_steps = 20 * _EPOCH
    config.total_steps = 300 * _EPOCH
    config.batch = 1024
    config.accum_steps = 8
    config.eval_every = 10 * _EPOCH
    config.progress_every = 100
    return config
