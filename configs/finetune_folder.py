"""Fine-tuning on a folder of images, with a recipe worked out from their number.

    vit-jax train --data=DIR --weights=FILE.npz --workdir=WORKDIR

DIR is laid out as DIR/{train,test}/<class>/*, or DIR/<class>/*, of which a fifth is kept for
testing; docs/data.md tells what else it may be. Of TFDS give the path of the prepared data set, or
set TFDS_DATA_DIR, if it isn't in ~/tensorflow_datasets: its images are counted before
--config.tfds_data_dir is looked at.
"""

import math

from vit_jax.data import open_source
from vit_jax.errors import UserError
from vit_jax.training import default_config


def get_config(arg: str = ""):
    """The configuration for the folder `arg`."""
    if not arg:
        raise UserError(
            "finetune_folder needs a folder: --config=finetune_folder:DIR, or --data=DIR"
        )
    config = default_config()
    config.dataset = arg
    images = len(open_source(arg, config.splits.train))

    # A batch of about a fifteenth of the images, a power of two from 8 to 512; eight times
    # through all of them, in at least 100 and at most 20,000 steps. The learning rate follows the
    # square root of the batch from the 0.03 at 512 of the published recipe.
    config.batch = min(max(2 ** round(math.log2(images / 15)), 8), 512)
    config.batch_eval = 32
    config.accum_steps = max(config.batch // 32, 1)
    config.total_steps = min(max(math.ceil(8 * images / config.batch), 100), 20_000)
    config.warmup_steps = config.total_steps // 10
    config.base_lr = 0.03 * math.sqrt(config.batch / 512)

    config.progress_every = max(config.total_steps // 25, 1)
    config.eval_every = math.ceil(config.total_steps / 4)
    config.checkpoint_every = config.eval_every
    return config
