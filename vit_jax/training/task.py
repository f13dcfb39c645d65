"""The images of a run, and how training and evaluation make them ready."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.pretrained import original_preprocess
from vit_jax.sharding import divisible, process_slice


@dataclasses.dataclass(frozen=True)
class Task:
    """Images to train on and to test on, and what is done to them."""

    config: ConfigDict
    train: data.Source
    test: data.Source
    train_ops: data.Preprocess
    eval_ops: data.Preprocess
    value_range: tuple[float, float]  # What 0 and 255 of uint8 training images become.
    cores: int | None = None  # This process's share, if it isn't all that it was given.

    @functools.cached_property
    def readers(self) -> tuple[data.Readers, data.Readers]:
        """Who reads the images of training, and of an evaluation.

        Raises UserError if processes are wanted that can't be had.
        """
        config, many = self.config, len(self.test) >= data.LEAST_FOR_PROCESSES * process_slice()[1]
        workers = (self.train, config.workers), (self.test, config.workers if many else 0)
        train, test = (data.choose_readers(*w, config.threads, self.cores) for w in workers)
        return train, test

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.labels

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells these images from others, see `data.data_fingerprint`."""
        return {
            "train": data.data_fingerprint(self.train),
            "test": data.data_fingerprint(self.test),
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, channels) of an image made ready."""
        return _shape(self.eval_ops, self.train)

    def train_batches(self, start_step: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Endless batches, this process's rows of them: "image" uint8 or float32 (n, h, w, c) and
        "label" int32 (n,)."""
        return data.train_batches(
            self.train,
            self.train_ops,
            batch_size=self.config.batch,
            seed=self.config.seed,
            start_step=start_step,
            shard=process_slice(),
            workers=self.readers[0],
            prefetch=1,  # As many as `config.prefetch` wait on the device.
            corrupt=self.config.corrupt,
        )

    def eval_batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The test images once: also "mask" bool (n,) and "index" int32 (n,)."""
        return data.eval_batches(
            self.test,
            self.eval_ops,
            batch_size=divisible(self.config.batch_eval),
            shard=process_slice(),
            workers=self.readers[1],
            corrupt=self.config.corrupt,
        )


def open_task(
    config: ConfigDict,
    sources: tuple[data.Source, data.Source] | None = None,
    cores: int | None = None,
) -> Task:
    """Opens what a configuration names, or takes `sources` to train on and to test on.

    Args:
      cores: for reading; by default all that this process was given.

    Raises UserError if the data can't be opened, or training and evaluation don't fit together.
    """
    train_ops = data.parse(train_spec(config))
    eval_ops = data.parse(eval_spec(config), train=False)
    train_source, test_source = sources or (
        data.open_source(
            config.dataset,
            split,
            seed=config.seed,
            data_dir=config.tfds_data_dir,
            manual_dir=config.tfds_manual_dir,
        )
        for split in (config.splits.train, config.splits.test)
    )
    if train_source.labels != test_source.labels:
        raise UserError(
            f"{train_source.name} and {test_source.name} have different classes, expected the same "
            "in the same order"
        )
    if train_source.multi_label and config.loss == "softmax":
        raise UserError(
            f"config.loss is softmax, which knows one class an image, but images of "
            f"{config.dataset} may have several: use --config.loss=sigmoid"
        )
    shapes = _shape(train_ops, train_source), _shape(eval_ops, train_source)
    if shapes[0] != shapes[1]:
        raise UserError(
            f"training makes images of shape {shapes[0]} and evaluation of {shapes[1]}: "
            "give config.pp.train and config.pp.eval the same size"
        )
    if train_ops.value_range != eval_ops.value_range:
        ranges = ("{:g} to {:g}".format(*ops.value_range) for ops in (train_ops, eval_ops))
        raise UserError(
            "training makes images of values from {} and evaluation of values from {}: give "
            "config.pp.train and config.pp.eval the same value_range".format(*ranges)
        )
    value_range = (-1.0, 1.0)
    if config.image_dtype == "uint8" and (levels := train_ops.to_levels()):
        train_ops, value_range = levels
    return Task(config, train_source, test_source, train_ops, eval_ops, value_range, cores)


def train_spec(config: ConfigDict) -> str:
    """What training does to an image."""
    augment, _ = data.AUGREG[config.augment]
    parts = [f"inception_crop({config.pp.crop})", "flip", augment, "value_range(-1, 1)"]
    return config.pp.train or "|".join(filter(None, parts))


def eval_spec(config: ConfigDict) -> str:
    """What evaluation does to an image.

    Raises UserError if it is to be cut larger than it was resized.
    """
    crop, resize = config.pp.crop, config.pp.resize
    if config.pp.eval:
        return config.pp.eval
    if resize and resize < crop:
        raise UserError(
            f"config.pp.resize {resize} is less than config.pp.crop {crop}: raise it, or use 0"
        )
    if resize:
        return f"resize_small({resize})|central_crop({crop})|value_range(-1, 1)"
    return original_preprocess((crop, crop))


def mixup(config: ConfigDict) -> float:
    """The parameter of mixup's Beta distribution, 0 for none."""
    return config.mixup or data.AUGREG[config.augment][1]


def _shape(ops: data.Preprocess, source: data.Source) -> tuple[int, int, int]:
    # Not smaller than a crop wants it, nor of a worse aspect.
    size = np.max([step.size or (1, 1) for step in ops.steps], axis=0).clip(1)
    blank = np.zeros((*size, source.channels), np.uint8)
    if ops.output_size is None:  # The images keep their size: look at one.
        blank = source[0]["image"]
    return ops(blank, np.random.default_rng(0)).shape
