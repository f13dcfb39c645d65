"""The checkpoints of a run: written in the background, complete or not at all."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from vit_jax.checkpoints.digests import digest
from vit_jax.errors import NO_ROOM, UserError, error_chain, first_line
from vit_jax.files import is_bucket
from vit_jax.training.distributed import allgather, is_main_process
from vit_jax.training.state import TrainState
from vit_jax.training.workdir import set_aside

COMMITTED = "commit_success.txt"  # By which Orbax marks checkpoints in buckets as complete.
CENTURY = 100 * 365 * 24 * 3600  # Seconds.
# What the guard's fields are called in checkpoints, ever since there are any.
STORED_NAMES = {"grad_norm_ema": "usual", "good_steps": "good", "consecutive_bad": "in_a_row"}
LOADED_NAMES = {stored: name for name, stored in STORED_NAMES.items()}


class Checkpoints:
    """The folder `checkpoints` of a workdir, one sub-folder a step, read and written with Orbax.

    A save is done in the background and appears under its name only when complete; a process that
    dies meanwhile leaves the checkpoints before it as they were.
    """

    def __init__(self, folder: epath.Path, *, keep: int, every: int | None = None):
        """Opens or makes the folder. The last `keep` checkpoints are kept, and with `every`, the
        last one to go back to (see `restore_scheduled`); older ones are deleted."""
        # Orbax reports all its doings, and each error by several threads; a run says what matters.
        self._levels = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
        for log in self._levels:
            log.setLevel(logging.CRITICAL)
        self.folder = folder
        # Orbax gives a save up after 20 minutes by the clock of the system, which may jump.
        patient = ocp.Context(async_options=ocp.options.AsyncOptions(timeout_secs=CENTURY))
        self._manager = ocp.training.Checkpointer(
            _absolute(folder),
            context=patient,
            preservation_policy=_Keep(keep, every),
            cleanup_tmp_directories=True,
        )
        self._every = every
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
            state = _renamed(state, STORED_NAMES)
            parts = {"state": _fields(state), "digest": digest(state)}
            self._saving = self._manager.save_checkpointables_async(step, parts)
            self._saving_step = step

    def wait(self) -> None:
        """Waits until the save under way is complete. Raises UserError if it failed."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            assert self._saving_step is not None
            with self._explained(self._saving_step):
                saving.result()

    def restore(self, like: TrainState) -> tuple[TrainState, str]:
        """The latest whole state, with the shapes, types and places of `like`, which it is if none
        is saved; and what to tell of damaged ones.

        Those are set aside as STEP.damaged, if there is a whole one before them.

        Raises UserError if none of those saved is whole.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            state, problem = self._load(step, like)
            if state is not None:
                return state, self._set_aside(damaged, step) if damaged else ""
            damaged[step] = problem
        if damaged:
            step, problem = next(iter(damaged.items()))
            none = "" if len(damaged) == 1 else f", nor {len(damaged) - 1} before it"
            raise UserError(
                f"the checkpoint {self.folder / str(step)} can't be used ({problem}){none}: mend "
                "the cause, or remove these folders to begin anew"
            )
        return like, ""

    def restore_scheduled(self, like: TrainState) -> tuple[int, TrainState]:
        """The last state of a step that is 0 or a multiple of `every`, and its step: not of one at
        which the run was stopped, so that it is the same whether it was or not.

        `like` is given up, to make room. Raises UserError if the state is damaged.
        """
        self.wait()
        steps = self._steps()
        step = max([s for s in steps if _scheduled(s, self._every)] or steps)
        jax.tree.map(lambda x: x.delete(), like)
        state, problem = self._load(step, like)
        if state is None:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} to go back to can't be used "
                f"({problem}): start the same command again to go on from the one before"
            )
        return step, state

    def _steps(self) -> list[int]:
        return [c.step for c in self._manager.checkpoints]

    def _load(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """The state of a step, or what is wrong with it; in all processes alike."""
        like = _renamed(like, STORED_NAMES)
        want = {"state": _fields(like), "digest": jax.eval_shape(digest, like)}
        whole = like.step.sharding
        want = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or whole), want
        )
        context = ocp.Context()
        # Processes don't wait for each other within: one alone may fail.
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        hook = sys.unraisablehook
        sys.unraisablehook = functools.partial(_ignore_late_callbacks, hook)
        found, problem = None, None
        try:
            with context:
                found = ocp.load_checkpointables(_absolute(self.folder) / str(step), want)
            sys.unraisablehook = hook
        except Exception as e:
            # Other arrays are still being read. They report to nobody, now or when Python ends.
            self._levels.clear()
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            problem = _reason(e)
        problems = allgather(problem)
        if found is not None and not any(problems):
            state = like.replace(**found["state"])
            same = np.array_equal(*jax.device_get((digest(state), found["digest"])))
            problems = allgather(None if same else "its contents are not what was saved")
            if not any(problems):
                return _renamed(state, LOADED_NAMES), ""
        return None, next(filter(None, problems))

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> str:
        for step in damaged if is_main_process() else ():
            set_aside(self.folder / str(step))
        allgather(None)  # Only then is the folder read again.
        self._manager.reload()
        reasons = ", ".join(f"{step} ({problem})" for step, problem in damaged.items())
        return (
            f"damaged in {self.folder}, and renamed to STEP.damaged: {reasons}; step {good} is "
            "used in their place"
        )

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
            good = [s for s in saved_steps(self.folder) if s < step]
            rest = (
                f"the checkpoint of step {max(good)} is still good" if good else "none is saved yet"
            )
            raise UserError(
                f"could not save step {step} in {self.folder} ({_reason(e)}); {rest}: "
                "make room or mend the cause, then start the run again"
            ) from e


class _Keep:
    """Which checkpoints stay, for Orbax."""

    def __init__(self, keep: int, every: int | None):
        self._keep, self._every = max(keep, 1), every

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [c.step for c in checkpoints]
        kept = steps[-self._keep :] + [s for s in steps if _scheduled(s, self._every)][-1:]
        return [step in kept for step in steps]


def saved_steps(folder: epath.Path) -> list[int]:
    """The steps of which a folder holds complete checkpoints."""
    paths = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    if is_bucket(folder):  # Which has no names for what is on its way.
        paths = [path for path in paths if (path / COMMITTED).exists()]
    return [int(path.name) for path in paths]


def _absolute(folder: epath.Path) -> epath.Path:
    return folder if is_bucket(folder) else epath.Path(os.path.realpath(folder))


def _renamed(state: TrainState, names: Mapping[str, str]) -> TrainState:
    return state.replace(guard={names.get(k, k): x for k, x in state.guard.items()})


def _fields(state: TrainState) -> dict[str, Any]:
    """What is saved of a state: nothing of an average if there is none, as before there was any."""
    return {name: field for name, field in vars(state).items() if field is not None}


def _scheduled(step: int, every: int | None) -> bool:
    return every is not None and (step % every == 0 if every else step == 0)


def _ignore_late_callbacks(hook: Callable, problem: Any) -> None:
    if str(problem.exc_value) != "Event loop is closed":
        hook(problem)


def _reason(error: BaseException) -> str:
    """The line of an error that says why: TensorStore and the system bury it in context."""
    chain = error_chain(error)
    text = "\n".join(str(e) for e in chain)
    for known in map(os.strerror, NO_ROOM):
        if known in text:
            return known
    return first_line(chain[-1])[:200]
