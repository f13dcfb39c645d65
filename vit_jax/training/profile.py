"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from vit_jax.buckets import GrowingFiles
from vit_jax.checkpoints.npz import first_line
from vit_jax.training.processes import allgather

FOLDER = "profile"


def trace_folder(workdir: Path) -> Path:
    """Where in a workdir this process writes its trace: files are named by the host, so that those
    who share one with an earlier process need a folder of their own. All have to call it together.
    """
    hosts, me = allgather(platform.node()), jax.process_index()
    own = [f"process_{me}"] if hosts[me] in hosts[:me] else []
    return workdir.joinpath(FOLDER, *own)


class Profile:
    """Traces what host and devices do between two steps.

    Args:
      steps: (start, stop): from the end of step `start` to that of step `stop`; empty for none.
      folder: gets plugins/profile/TIME/HOST.xplane.pb and a .trace.json.gz.
    """

    def __init__(self, steps: Sequence[int], folder: Path):
        self._start, self._stop = steps or (0, 0)
        self._folder = folder
        self._files = GrowingFiles(folder, [])
        self._running = False

    def at(self, step: int, wait: Callable[[], None]) -> str:
        """Starts or stops where that is due after `step`; `wait` is called first, which waits until
        the devices have done the steps so far. What to tell: where a trace was just written, or why
        there is none."""
        due = self._start <= step < self._stop
        if due == self._running:
            return ""
        wait()
        try:
            if due:
                jax.profiler.start_trace(self._files.folder)
            else:
                self._stop_trace()
        except RuntimeError as e:  # Somebody else traces, or the platform has no profiler.
            self._running, self._stop = False, self._start
            return f"no trace: {first_line(e)}"
        self._running = due
        return "" if due else f"a trace is in {self._folder}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._running:
            self._running = False
            self._stop_trace()
        self._files.close()

    def _stop_trace(self) -> None:
        jax.profiler.stop_trace()
        self._files.sync()
