"""Batches on their way to the device, and figures on their way back."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from vit_jax.parallel import join
from vit_jax.training.guard import BadStep, bad_step, new_guard


@dataclasses.dataclass(frozen=True)
class Speed:
    """Batches a second, and the share in [0, 1] of the time in which the device waited for data.

    NaN if there was no batch to measure.
    """

    batches_per_s: float
    wait_share: float


class Feed:
    """Batches on the device; a thread fetches `ahead` of them before they are asked for.

    Each process gives the rows of its `parallel.shard`.
    """

    def __init__(
        self, batches: Iterator[Mapping[str, np.ndarray]], sharding: NamedSharding, ahead: int
    ):
        self._batches = batches
        self._sharding = sharding
        self._thread = futures.ThreadPoolExecutor(1)
        self._coming = deque(self._thread.submit(self._fetch) for _ in range(ahead))
        self.restart_clock()

    def _fetch(self) -> Any:
        return jax.block_until_ready(join(next(self._batches), self._sharding))

    def take(self, drain: Callable[[], None]) -> Mapping[str, jax.Array]:
        """The next batch.

        Args:
          drain: waits until the device has nothing left to do; called if the batch isn't there.
            While the device is busy with earlier steps it does not wait for data, so that only what
            the batch takes beyond that counts as waiting.
        """
        coming = self._coming.popleft()
        if not coming.done():
            drain()
            started = time.perf_counter()
            futures.wait([coming])
            self._waited += time.perf_counter() - started
        self._count += 1
        self._coming.append(self._thread.submit(self._fetch))
        return coming.result()

    def restart_clock(self) -> None:
        """Speed is measured from here on."""
        self._since, self._waited, self._count = time.perf_counter(), 0.0, 0

    def speed(self) -> Speed:
        """The speed since the clock was last restarted, which this does too."""
        seconds = time.perf_counter() - self._since
        measured = Speed(self._count / seconds, self._waited / seconds)
        speed = measured if self._count else Speed(math.nan, math.nan)
        self.restart_clock()
        return speed

    def close(self) -> None:
        """Ends the thread, after the batch that it is fetching, and those that read the data."""
        self._thread.shutdown(cancel_futures=True)
        self._batches.close()  # type: ignore[attr-defined]


class Figures:
    """The figures of the last steps, left on the device until somebody looks.

    Looking waits for the device. It is done where something is printed, and before anything is
    saved, so that what is saved is known to be good.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, figures: Mapping[str, jax.Array]) -> None:
        """Notes the scalars that a step gave."""
        self._steps.append((step, figures))

    def wait(self, running: int = 0) -> None:
        """Waits until the device has done the steps so far, but for the last `running` of them."""
        if len(self._steps) > running:
            jax.block_until_ready(self._steps[-1 - running][1])

    def look(self) -> tuple[dict[str, float], list[BadStep]]:
        """The figures of the last step, and what steps went wrong; both empty if none was added
        since the last look."""
        steps, self._steps = jax.device_get(self._steps), []
        steps = [(n, {key: float(x) for key, x in figures.items()}) for n, figures in steps]
        bad = [bad for n, figures in steps if (bad := bad_step(n, figures))]
        values = dict(steps[-1][1]) if steps else {}
        for key in new_guard().keys() - {"bad_steps"}:
            values.pop(key, None)
        return values, bad
