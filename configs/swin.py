"""Swin Transformers from scratch on ImageNet, with the settings of their authors (arXiv:2103.14030,
arXiv:2111.09883).

    vit-jax train --config=configs/swin.py:Swin-T_4-w7 --workdir=WORKDIR

The argument is the model's name. The settings are for batches of 1,024. What differs from the
published run, because it isn't here:

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

# Stochastic depth; of Swin-L, which was trained on ImageNet-21k alone, that of this training.
DEPTH_RATES = {"T": 0.2, "S": 0.3, "B": 0.5, "L": 0.2}
_EPOCH = 1_281_167 // 1024  # In steps.
_NORMALIZE = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"


def get_config(arg: str = ""):
    """The configuration for a model, e.g. "Swin-T_4-w7"."""
    if arg not in SwinTransformer.variants:
        raise UserError(
            f"swin.py needs one of {', '.join(SwinTransformer.variants)}, found {arg!r}: e.g. "
            "configs/swin.py:Swin-T_4-w7"
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
    if size > 256:  # The whole image.
        config.pp.eval = f"resize({size}, method='pil_bicubic')|{_NORMALIZE}"
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
