"""Batches on their way to the device, and metrics on their way back."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from vit_jax.sharding import make_global_batch
from vit_jax.training.guard import BadStep, bad_step


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
        self._coming: SimpleQueue[Future] = SimpleQueue()
        self.clock = Clock(time.perf_counter(), 0, 0.0)
        for _ in range(prefetch + 1):
            self._start_transfer()

    def __next__(self) -> Mapping[str, jax.Array]:
        """The next batch. `watch` has to be called for each, or no more will come."""
        batch, self._arrived = self._coming.get().result()
        return batch

    def watch(self, metrics: Mapping[str, jax.Array]) -> Future:
        """Frees the place of the last batch when the step that gave these metrics is done.

        Returns:
          the clock at that moment, when it has come, or the error of the step.
        """
        return self._watcher.submit(self._finish, metrics["loss"], self._arrived)

    def restart_clock(self) -> None:
        """What has passed since the last step counts neither as its time nor as idle. To be called
        when all steps are done."""
        self.clock = self.clock._replace(at=time.perf_counter())

    def close(self) -> None:
        """Ends the threads, after the step and the batch that they wait for, and those that read
        the data."""
        self._watcher.shutdown(cancel_futures=True)
        self._transfers.shutdown(cancel_futures=True)
        self._batches.close()  # type: ignore[attr-defined]
        self._coming = SimpleQueue()  # What nobody takes any more leaves the devices.

    def _start_transfer(self) -> None:
        self._coming.put(self._transfers.submit(self._transfer))

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


class StepMetrics(NamedTuple):
    """What is known of a step that is done.

    Attributes:
      values: its metrics, if they were wanted or it was bad; else empty.
      bad: what was wrong with it, if anything.
      clock: see `DevicePrefetcher.watch`.
    """

    step: int
    values: dict[str, float]
    bad: BadStep | None
    clock: Clock


class MetricsBuffer:
    """The metrics of the last steps, left on the device until they are read."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, bool, Mapping[str, jax.Array], Future]] = deque()

    def add(
        self, step: int, metrics: Mapping[str, jax.Array], done: Future, *, wanted: bool
    ) -> None:
        """Notes the scalars that a step gives, and whether they are wanted if it isn't bad."""
        self._steps.append((step, wanted, metrics, done))

    def wait(self) -> None:
        """Waits until the device has done the steps so far."""
        if self._steps:
            self._steps[-1][-1].result()

    def read(self, last: int) -> Iterator[StepMetrics]:
        """The steps up to number `last` that were not read yet; waits until these are done."""
        steps = []
        while self._steps and self._steps[0][0] <= last:
            steps.append(self._steps.popleft())
        # A copy of each scalar takes a GPU ten microseconds: most steps need this one alone.
        flags = jax.device_get([metrics["in_a_row"] for _, _, metrics, _ in steps])
        for (step, wanted, metrics, done), is_bad in zip(steps, flags, strict=True):
            values: dict[str, float] = {}
            if wanted or is_bad:
                values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            bad = bad_step(step, values) if is_bad else None
            yield StepMetrics(step, values, bad, done.result())
