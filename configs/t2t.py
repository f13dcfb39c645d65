"""T2T-ViT from scratch on ImageNet, with the settings of its authors (arXiv:2101.11986).

    vit-jax train --config=configs/t2t.py:14 --workdir=WORKDIR

The argument is the model's name without "T2T-ViT-", e.g. "7", "14" or "t-24". Its settings are for
batches of 512; the averaged weights are what is evaluated and left. What differs from the published
run, because it isn't here:

- The rate falls to 0 in 310 epochs; theirs to 1e-5 in 300, where it stays for 10 more. Theirs warms
  up from 1e-6, this from 0.
- RandAugment always applies its two operations, at one magnitude; theirs each of them half of the
  time, at a magnitude drawn around it, of another list, and fills with the mean colour.
- Mixup's share of an image's own is a half at least, and its partner the image before it, not the
  one as far from the end of the batch.
- Random crops are bicubic; theirs bicubic or bilinear by chance. What is erased becomes noise of
  bytes; theirs is of normalised values, after the normalisation.
- First weights of the blocks are those of a ViT here, and zeros of the head and the class token;
  theirs are normal, of deviation 0.02, as in the tokens-to-token module of both.

Of its variants "14-resnext" and "14-wide" no settings were published: they have those of "14".
Its fine-tuning on CIFAR has a hundredth of the head's rate for all else, for which there is no
field yet: `vit-jax train --weights=t2t/T2T-ViT-14` fine-tunes as any other.
"""

from vit_jax.errors import UserError
from vit_jax.training import default_config

# Of each model the highest learning rate and the weight decay.
_SMALL, _MEDIUM, _LARGE = (1e-3, 0.03), (5e-4, 0.05), (5e-4, 0.065)
RATES = {
    **dict.fromkeys(("7", "10", "12"), _SMALL),
    **dict.fromkeys(("14", "t-14", "14-resnext", "14-wide"), _MEDIUM),
    **dict.fromkeys(("19", "24", "t-19", "t-24"), _LARGE),
}
_EPOCH = 1_281_167 // 512  # In steps.
_NORMALIZE = "normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))"


def get_config(arg: str = ""):
    """The configuration for a model, e.g. "14"."""
    model = arg.removeprefix("T2T-ViT-")
    if model not in RATES:
        raise UserError(
            f"t2t.py needs one of {', '.join(RATES)}, found {arg!r}: e.g. configs/t2t.py:14"
        )
    config = default_config()
    config.model.name = f"T2T-ViT-{model}"
    config.model.stochastic_depth_rate = 0.1

    config.dataset = "imagenet2012"
    config.splits.test = "validation"
    config.pp.train = (
        "inception_crop(224, 0.08, method='pil_bicubic')|flip|randaug(2, 9)"
        f"|random_erasing(0.25, area_max=0.333)|{_NORMALIZE}"
    )
    config.pp.eval = (
        "resize_small(248, method='pil_bicubic')|central_crop(224, round_even=True)|" + _NORMALIZE
    )
    config.mixup = 0.8
    config.cutmix = 1.0
    config.label_smoothing = 0.1

    config.optim = "adamw"
    config.optim_dtype = "float32"
    config.base_lr, config.weight_decay = RATES[model]
    config.grad_norm_clip = 0.0
    config.ema_decay = 0.99996
    config.warmup_steps = 10 * _EPOCH
    config.total_steps = 310 * _EPOCH
    config.batch = 512
    config.accum_steps = 8
    config.eval_every = 10 * _EPOCH
    config.progress_every = 100
    return config
