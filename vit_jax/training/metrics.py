"""The numbers of a run on disk: metrics.jsonl, and the same scalars as TensorBoard events.

metrics.jsonl holds one JSON object a line, "step" first and the other keys sorted:
`{"step": 10, "time/images_per_s": 812.5, "train/loss": 2.25, "train/lr": 0.01}`. Every number is
written with the digits that give the same float64 back. JSON has no NaN and no infinity: they are
written as null and read back as NaN. Two equal runs differ in their "time/..." keys only.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vit_jax.errors import UserError
from vit_jax.training.workdir import METRICS

FLUSH_SECONDS = 5  # After which TensorBoard sees what was written.


class MetricsWriter:
    """Appends scalars to workdir/metrics.jsonl and to TensorBoard events in workdir.

    Opening it at a resumed step removes what an interrupted run wrote beyond that step (and half a
    line that a kill left), so that no step is missing and none is there twice, if the lines of a
    step are on disk (see `sync`) before its checkpoint is saved.

    Args:
        workdir: folder of the run; made if it is not there.
        resume_step: the last step that the restored state contains; 0 for a fresh run.

    Raises:
        UserError: if metrics.jsonl is there and is not such a file; it is then left as it is.
    """

    def __init__(self, workdir: Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS
        if path.exists():
            _drop_after(path, resume_step)
        self._file = path.open("ab")
        # Not the SummaryWriter: its thread dies on a full disk, and the run then waits for
        # ever. Files are named by the second, and one of the same second would be emptied.
        self._events = EventsWriter(str(workdir / "events"), f".{time.time_ns()}")
        # What an interrupted run wrote from this step on is not to be shown.
        self._flushed = time.monotonic()
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(session_log=start, step=resume_step + 1))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line; once this returns, killing the process cannot lose it.

        Args:
            step: number of updates done.
            values: scalars by name, such as {"train/loss": 2.25}; anything float() takes.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = {key: float(values[key]) for key in sorted(values)}
        finite = {key: x if math.isfinite(x) else None for key, x in scalars.items()}
        line = json.dumps({"step": int(step), **finite}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        summary = Summary(value=[Summary.Value(tag=k, simple_value=x) for k, x in scalars.items()])
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._flush_events()

    def sync(self) -> None:
        """Once this returns, a power cut cannot lose the lines so far either."""
        os.fsync(self._file.fileno())
        self._flush_events()

    def _flush_events(self) -> None:
        self._events.flush()  # To the disk, which takes a while.
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, also one that a run is writing or left with half a last line.

    Args:
        path: the file.

    Returns:
        One dict a line, in the file's order: "step" an int, all others floats (null gives NaN).

    Raises:
        UserError: if there is no such file or a line other than a torn last one is no record.
    """
    return [record for record, _ in _records(path)]


def _records(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """The records of a file, each with its line as it stands there, line end included."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"Cannot read {path} ({error.strerror}); expected the {METRICS} of a training run: "
            "give a folder that a run has written."
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append((record, line + b"\n"))
        elif number < len(lines):  # what follows the last line end is nothing, or torn
            raise UserError(
                f"{path} line {number} reads {line[:40].decode(errors='replace')!r}; expected a "
                'JSON object such as {"step": 10, "train/loss": 0.5}: mend or remove the line.'
            )
    return records


def _parse(line: bytes) -> dict[str, Any] | None:
    """One line as a record; None where it is none."""
    try:
        record = json.loads(line)
        step = record.pop("step")
        values = {key: math.nan if x is None else float(x) for key, x in record.items()}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
    return {"step": step, **values} if type(step) is int else None


def _drop_after(path: Path, last_step: int) -> None:
    """Removes the lines beyond `last_step` and a torn last line; all at once or not at all."""
    kept = b"".join(line for record, line in _records(path) if record["step"] <= last_step)
    if kept == path.read_bytes():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
