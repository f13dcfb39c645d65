"""Batches on their way to the device, and figures on their way back."""

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Speed:
    """Batches a second, and the share in [0, 1] of the time in which the step waited for data."""

    batches_per_s: float
    wait_share: float


class Feed:
    """Batches on the device, `ahead` of them on their way before they are asked for."""

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], sharding: Sharding, ahead: int):
        self._batches = batches
        self._sharding = sharding
        self._ahead = ahead
        self._ready: deque[Any] = deque()
        self.restart_clock()

    def __next__(self) -> Mapping[str, jax.Array]:
        started = time.perf_counter()
        while len(self._ready) <= self._ahead:
            # The copy to the device goes on in the background.
            self._ready.append(jax.device_put(next(self._batches), self._sharding))
        self._waited += time.perf_counter() - started
        self._count += 1
        return self._ready.popleft()

    def restart_clock(self) -> None:
        """Speed is measured from here on."""
        self._since, self._waited, self._count = time.perf_counter(), 0.0, 0

    def speed(self) -> Speed:
        """The speed since the clock was last restarted, which this does too."""
        seconds = time.perf_counter() - self._since
        speed = Speed(self._count / seconds, self._waited / seconds)
        self.restart_clock()
        return speed


class Figures:
    """The figures of the last steps, left on the device until somebody looks.

    Looking waits for the device. It is done where something is printed, and before anything is
    saved, so that what is saved is known to be finite.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, Mapping[str, jax.Array]]] = []

    def add(self, step: int, figures: Mapping[str, jax.Array]) -> None:
        """Notes the scalars that a step gave."""
        self._steps.append((step, figures))

    def look(self) -> dict[str, float]:
        """The figures of the last step; empty if none was added since the last look.

        Raises UserError naming the first step with a figure that is not finite.
        """
        values: dict[str, float] = {}
        steps, self._steps = self._steps, []
        for step, figures in jax.device_get(steps):
            values = {key: float(value) for key, value in figures.items()}
            bad = [key for key, value in values.items() if not np.isfinite(value)]
            if bad:
                raise UserError(
                    f"at step {step} the {bad[0]} became {values[bad[0]]}; what was saved before "
                    "is kept: try a lower config.base_lr, more config.warmup_steps or a smaller "
                    "config.grad_norm_clip, in another workdir"
                )
        return values
