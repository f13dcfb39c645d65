"""The images of a run: how they are made ready, and moved to the devices ahead of the step."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.sharding import divisible, make_global_batch, process_slice
from vit_jax.training.config import eval_spec, recorded_levels, train_spec


@dataclasses.dataclass(frozen=True)
class RunData:
    """Images to train on and to test on, and what is done to them."""

    config: ConfigDict
    train: data.Source
    test: data.Source
    train_ops: data.Preprocess
    eval_ops: data.Preprocess
    cores: int | None = None  # This process's share, if it isn't all that it was given.
    notes: tuple[str, ...] = ()  # What a person should know of the values of the images.

    @functools.cached_property
    def readers(self) -> tuple[data.Readers, data.Readers]:
        """Who reads the images of training, and of an evaluation.

        Raises UserError if processes are wanted that can't be had.
        """
        config, many = self.config, len(self.test) >= data.LEAST_FOR_PROCESSES * process_slice()[1]
        workers = (self.train, config.workers), (self.test, config.workers if many else 0)
        train, test = (data.choose_readers(*w, config.threads, self.cores) for w in workers)
        return train, test

    @functools.cached_property
    def train_split(self) -> tuple[data.Preprocess, data.Normalize | None]:
        """What of `train_ops` is done here, and what is left to the step."""
        return self.train_ops.split(as_uint8=self.config.image_dtype == "uint8")

    @functools.cached_property
    def eval_split(self) -> tuple[data.Preprocess, data.Normalize | None]:
        """What of `eval_ops` is done here, and what is left to the step."""
        return self.eval_ops.split()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.labels

    @property
    def fingerprints(self) -> dict[str, str]:
        """What tells these images from others, see `data.data_fingerprint`."""
        sources = {"train": self.train, "test": self.test}
        return {name: data.data_fingerprint(source) for name, source in sources.items()}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, channels) of an image made ready."""
        return _shape(self.eval_ops, self.train)

    def train_batches(self, start_step: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Endless batches, this process's rows of them: "image" uint8 or float32 (n, h, w, c), not
        normalised yet if `train_split` says so, and "label" int32 (n,)."""
        return data.train_batches(
            self.train,
            self.train_split[0],
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
            self.eval_split[0],
            batch_size=divisible(self.config.batch_eval),
            shard=process_slice(),
            workers=self.readers[1],
            corrupt=self.config.corrupt,
        )


def preprocessing(
    config: ConfigDict, train: data.Source
) -> tuple[data.Preprocess, data.Preprocess, list[str]]:
    """What is done to images in training and in an evaluation, with the levels of the images to
    train on, and what a person should know about it. Raises UserError if they can't be found."""
    train_ops = data.parse(train_spec(config))
    eval_ops = data.parse(eval_spec(config), train=False)
    notes: list[str] = []
    if not (train_ops.levels or eval_ops.levels):
        levels = "" if config.levels else recorded_levels(config)
        if levels:
            notes = [f"{levels}, as recorded with the weights"]
        else:
            levels, notes = data.find_levels(train, config.levels)
        if levels:  # A part of the text, so that it is recorded with the weights.
            train_ops = data.parse(f"{levels}|{train_ops.spec}")
            eval_ops = data.parse(f"{levels}|{eval_ops.spec}", train=False)
    elif config.levels:
        raise UserError(
            f"config.levels {config.levels!r} and the levels of config.pp.train or config.pp.eval "
            "both say what values are black and white: leave one out"
        )
    if train_ops.levels:
        notes += [f"{name} rounds them to whole ones" for name in train_ops.works_on_uint8]
    return train_ops, eval_ops, notes


def open_split(config: ConfigDict, split: str) -> data.Source:
    """Images of a configuration's data set, e.g. of its split "train[:98%]"."""
    places = {"data_dir": config.tfds_data_dir, "manual_dir": config.tfds_manual_dir}
    return data.open_source(config.dataset, split, seed=config.seed, **places)


def open_data(
    config: ConfigDict,
    sources: tuple[data.Source, data.Source] | None = None,
    cores: int | None = None,
) -> RunData:
    """Opens what a configuration names, or takes `sources` to train on and to test on.

    Args:
      cores: for reading; by default all that this process was given.

    Raises UserError if the data can't be opened, or training and evaluation don't fit together.
    """
    splits = (config.splits.train, config.splits.test)
    train, test = sources or (open_split(config, split) for split in splits)
    if train.labels != test.labels:
        raise UserError(
            f"{train.name} and {test.name} have different classes, expected the same in the same "
            "order"
        )
    if train.multi_label and config.loss == "softmax":
        raise UserError(
            f"config.loss is softmax, which knows one class an image, but images of "
            f"{config.dataset} may have several: use --config.loss=sigmoid"
        )
    train_ops, eval_ops, notes = preprocessing(config, train)
    shapes = _shape(train_ops, train), _shape(eval_ops, train)
    if shapes[0] != shapes[1]:
        raise UserError(
            f"training makes images of shape {shapes[0]} and evaluation of {shapes[1]}: "
            "give config.pp.train and config.pp.eval the same size"
        )
    if train_ops.levels != eval_ops.levels:
        raise UserError(
            "config.pp.train and config.pp.eval have different levels: give both the same"
        )
    if train_ops.range != eval_ops.range:
        raise UserError(
            f"training makes images of values from {train_ops.range} and evaluation of values from "
            f"{eval_ops.range}: give config.pp.train and config.pp.eval the same value_range"
        )
    return RunData(config, train, test, train_ops, eval_ops, cores, tuple(notes))


def _shape(ops: data.Preprocess, source: data.Source) -> tuple[int, int, int]:
    # Where the images keep their size, look at one.
    image = source[0]["image"] if ops.output_size is None else ops.blank(source.channels)
    return ops(image, np.random.default_rng(0)).shape


class Clock(NamedTuple):
    """What had been done at a moment.

    Attributes:
      at: the moment, in seconds of `time.perf_counter`.
      steps: the number of steps done.
      idle: seconds in which the device had nothing to do because a batch wasn't there.
    """

    at: float
    steps: int
    idle: float


def to_device(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> Mapping[str, jax.Array]:
    """The batch on the device, of the rows that each process has (see `process_slice`). When it is
    there the host's memory may be used anew, unless the device's is the same."""
    return jax.block_until_ready(make_global_batch(batch, sharding))


class DevicePrefetcher:
    """Moves batches to the device before they are needed, in a thread.

    A batch is on the device until the step that takes it is done: beside the one at work there are
    at most `prefetch`, which wait, or belong to steps that JAX was given already.

    Attributes:
      clock: at the end of the last step that is done, or when the clock was restarted since.
    """

    def __init__(
        self, batches: Iterator[Mapping[str, np.ndarray]], sharding: NamedSharding, prefetch: int
    ):
        self._batches, self._sharding = batches, sharding
        self._transfers = ThreadPoolExecutor(1, "vit_jax.transfers")
        self._watcher = ThreadPoolExecutor(1, "vit_jax.watcher")
        self._ready: SimpleQueue[Future] = SimpleQueue()  # In their order, or on their way.
        self.clock = Clock(time.perf_counter(), 0, 0.0)
        for _ in range(prefetch + 1):
            self._start_transfer()

    def __next__(self) -> Mapping[str, jax.Array]:
        """The next batch. `watch` has to be called for each, or no more will come."""
        batch, self._arrived = self._ready.get().result()
        return batch

    def watch(self, metrics: Mapping[str, jax.Array]) -> Future:
        """Frees the place of the last batch when the step that gave these metrics is done.

        Returns:
          the clock at that moment, when it has come, or the error of the step.
        """
        return self._watcher.submit(self._finish, metrics["loss"], self._arrived)

    def restart_clock(self) -> Clock:
        """What has passed since the last step counts neither as its time nor as idle. To be called
        when all steps are done."""
        self.clock = self.clock._replace(at=time.perf_counter())
        return self.clock

    def close(self) -> None:
        """Ends the threads, after the step and the batch that they wait for, and those that read
        the data."""
        self._watcher.shutdown(cancel_futures=True)
        self._transfers.shutdown(cancel_futures=True)
        self._batches.close()  # type: ignore[attr-defined]
        self._ready = SimpleQueue()  # What nobody takes any more leaves the devices.

    def _start_transfer(self) -> None:
        self._ready.put(self._transfers.submit(self._transfer))

    def _transfer(self) -> tuple[Mapping[str, jax.Array], float]:
        return to_device(next(self._batches), self._sharding), time.perf_counter()

    def _finish(self, output: jax.Array, arrived: float) -> Clock:
        try:
            jax.block_until_ready(output)
        finally:
            self._start_transfer()
        at, steps, idle = self.clock
        self.clock = Clock(time.perf_counter(), steps + 1, idle + max(arrived - at, 0.0))
        return self.clock
