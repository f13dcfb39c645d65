"""The checkpoints of a run: written in the background, complete or not at all."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from vit_jax.checkpoints.npz import first_line
from vit_jax.errors import NO_ROOM, UserError
from vit_jax.training.state import TrainState


class Checkpoints:
    """The folder `checkpoints` of a workdir, one sub-folder a step, read and written with Orbax.

    A save is done in the background and appears under its name only when complete; a process that
    dies meanwhile leaves the checkpoints before it as they were.
    """

    def __init__(self, folder: Path, *, keep: int):
        """Opens or makes the folder. The last `keep` checkpoints are kept, older ones are
        deleted."""
        # Orbax reports all its doings, and each error by several threads; a run says what matters.
        self._levels = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
        for log in self._levels:
            log.setLevel(logging.CRITICAL)
        self.folder = folder
        self._manager = ocp.training.Checkpointer(
            folder.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(max(keep, 1)),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None
        self._saving_step: int | None = None

    @property
    def latest(self) -> int | None:
        """The last complete step, or None."""
        latest = self._manager.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save a state; returns as soon as the state may be changed.

        Raises UserError if this save, or the one before, can't be written.
        """
        self.wait()
        with self._explained(step):
            # The next step may be given the arrays to overwrite at once: Orbax has copied them to
            # the host by then, and on a CPU, where there is nothing to copy, JAX leaves memory
            # alone that somebody else holds.
            self._saving = self._manager.save_checkpointables_async(step, {"state": state})
            self._saving_step = step

    def wait(self) -> None:
        """Waits until the save under way is complete. Raises UserError if it failed."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            assert self._saving_step is not None
            with self._explained(self._saving_step):
                saving.result()

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, with the shapes, types and places of `like`, which it is if none is
        saved.

        Raises UserError if it can't be read.
        """
        step = self.latest
        if step is None:
            return like
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_but_late_callbacks, hook)
        try:
            state = self._manager.load_checkpointables(step, {"state": abstract})["state"]
        except Exception as e:
            # Other arrays are still being read. They report to nobody, now or when Python ends.
            self._levels.clear()
            raise UserError(
                f"the checkpoint {self.folder / str(step)} can't be read ({_reason(e)}): "
                "remove that folder to go on from the one before"
            ) from e
        sys.unraisablehook = hook
        return state

    def close(self) -> None:
        """Waits for the save under way and lets the folder go."""
        try:
            self.wait()
        finally:
            # Closing waits for the same save, whose error has been told.
            with contextlib.suppress(Exception):
                self._manager.close()
            for log, level in self._levels.items():
                log.setLevel(level)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # TensorStore, Orbax and the system each raise their own kinds.
            # Looked up on the disk: Orbax strikes a checkpoint from its list before the one that is
            # to take its place is written.
            good = [int(p.name) for p in self.folder.glob("[0-9]*") if p.name.isdigit()]
            good = [s for s in good if s < step]
            rest = (
                f"the checkpoint of step {max(good)} is still good" if good else "none is saved yet"
            )
            raise UserError(
                f"could not save step {step} in {self.folder} ({_reason(e)}); {rest}: "
                "make room or mend the cause, then start the run again"
            ) from e


def _but_late_callbacks(hook: Callable, problem: Any) -> None:
    if str(problem.exc_value) != "Event loop is closed":
        hook(problem)


def _reason(error: BaseException) -> str:
    """The line of an error that says why: TensorStore and the system bury it in context."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = "\n".join(str(e) for e in chain)
    for known in map(os.strerror, NO_ROOM):
        if known in text:
            return known
    return first_line(chain[-1])[:200]
