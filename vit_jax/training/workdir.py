"""The folder of a run: made once, gone on with only by the same configuration; its metrics.

metrics.jsonl holds one JSON object a line, "step" first and the other keys sorted:
`{"step": 10, "time/images_per_s": 812.5, "train/loss": 2.25, "train/lr": 0.01}`. Every number is
written with the digits that give the same float64 back. JSON has no NaN and no infinity: they are
written as null and read back as NaN. Two equal runs differ in their "time/..." keys only.

What a bucket can't do (lock, append, rename) is done by this file alone, see `vit_jax.buckets`.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vit_jax.buckets import Claim, GrowingFiles, check_claim
from vit_jax.checkpoints.hub import needs_credentials
from vit_jax.checkpoints.huggingface import is_theirs, weights_in
from vit_jax.errors import UserError
from vit_jax.files import (
    as_path,
    atomic_write,
    bucket_errors,
    is_bucket,
    list_folder,
    locks,
    open_file,
)
from vit_jax.training.config import config_from_json, config_to_json, differing_fields

CONFIG = "config.json"  # What makes a folder a run's.
DATA_FINGERPRINT = "data.json"  # Fingerprints of the images, by what they are for.
IN_MEMORY_SUFFIX = " (given in Python)"  # Ends the name of images that no name opens again.
LOCK = "lock"  # Held while a run goes on; names its process and host.
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
BEST_WEIGHTS = "weights_best.npz"
REPORT = "report.png"
PAGE = "report.html"
NOTES = "weights.json"
# What may lie in a folder before the run of which it becomes one: where its output goes.
LOGS = (".log", ".out", ".err", ".txt")
FLUSH_SECONDS = 5  # After which TensorBoard sees what was written,
UPLOAD_SECONDS = 60  # and whoever looks into a bucket.

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike, config: ConfigDict) -> Iterator[epath.Path]:
    """The folder of a run, made if it isn't there, and locked until the block ends.

    If the block ends before `write_config`, nothing of this is left.

    Raises UserError if it is no folder, can't be made or written, another process trains in it, it
    holds anything that is no run's, or what a run of another configuration left: then the fields
    that differ are named. Nothing is changed.
    """
    workdir = as_path(path)
    if is_bucket(workdir):
        with Claim(workdir / LOCK):
            with bucket_errors(workdir):
                _check(workdir, config)
            yield workdir
        return
    made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise UserError(f"the workdir {workdir} is a file: choose a folder") from e
    except OSError as e:
        raise UserError(
            f"can't make the workdir {workdir}: {e.strerror}: choose another place"
        ) from e
    try:
        with _locked(workdir):
            _check(workdir, config)
            yield workdir
    finally:
        with contextlib.suppress(OSError, ValueError):  # Most often: they are no longer empty.
            for folder in made:
                os.rmdir(folder)  # Not epath's, which removes what has come meanwhile.


@contextlib.contextmanager
def _locked(workdir: epath.Path) -> Iterator[None]:
    """Keeps other processes out. The system lets go of the lock however the process ends."""
    fcntl = locks()
    path = workdir / LOCK
    try:
        file = open(path, "a+")  # noqa: SIM115
    except OSError as e:
        raise UserError(
            f"the workdir {workdir} can't be written ({e.strerror}): choose another place"
        ) from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            raise UserError(
                f"process {file.read().strip()} is training in {workdir}: wait for it, stop it, or "
                "choose another workdir"
            ) from e
        except OSError as e:  # Some network file systems know no locks.
            _log.warning("%s can't be locked (%s): start no second run in it", workdir, e.strerror)
        if not os.fstat(file.fileno()).st_nlink:  # Removed below, after it was opened here.
            raise UserError(f"another run in {workdir} has just ended: start again")
        try:
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()} on {platform.node()}\n".encode())
            with contextlib.suppress(OSError):  # For `lock_holder` on other hosts; not all can.
                os.fsync(file.fileno())
            yield
        finally:
            if not (workdir / CONFIG).exists():
                path.unlink(missing_ok=True)


def lock_holder(workdir: epath.Path) -> str | None:
    """The process that trains in a folder as this host sees it, or did last; None for none."""
    try:
        with bucket_errors(workdir):
            return (workdir / LOCK).read_text().partition("\n")[0]
    except OSError:
        return None


def _check(workdir: epath.Path, config: ConfigDict) -> None:
    if (workdir / CONFIG).exists():
        differing = differing_fields(read_config(workdir), config)
        if differing:
            raise UserError(
                f"{workdir} holds a run of another configuration ({'; '.join(differing)}): "
                "choose another workdir, or the same fields as then"
            )
        return
    own = (LOCK, DATA_FINGERPRINT, "lost+found")
    names = (name for name in list_folder(workdir) if not name.startswith("."))
    if found := sorted(name for name in names if name not in own and not name.endswith(LOGS)):
        some = ", ".join(found[:3]) + (f" and {len(found) - 3:,} more" if len(found) > 3 else "")
        raise UserError(
            f"{workdir} holds {some} but no {CONFIG}, so it is no run's: choose another workdir, "
            "a new or an empty one"
        )


def write_config(workdir: epath.Path, config: ConfigDict, fingerprints: Mapping[str, str]) -> None:
    """Writes down whose folder this is and on which images, or checks that these are the same.

    Not before a run is about to begin: a mistake found earlier must not bar the folder to the same
    command without the mistake. The fingerprints are {"train": ..., "test": ...}.

    Raises UserError if the files can't be written, or the images are not those of the run's
    beginning: it could not go on as if it had not stopped.
    """
    file, begun = workdir / DATA_FINGERPRINT, (workdir / CONFIG).exists()
    if begun:
        try:
            before = json.loads(file.read_text())
            changed = [name for name in fingerprints if before.get(name) != fingerprints[name]]
        except (OSError, ValueError, AttributeError, RecursionError):
            _log.warning(
                "%s is lost or damaged and is written anew: whether these are the images that "
                "the run began with can't be checked",
                file,
            )
        else:
            if changed:
                raise UserError(
                    f"the {' and '.join(changed)} images of {config.dataset} have changed since "
                    f"the run in {workdir} began: put them back as they were, or choose another "
                    "workdir"
                )
            return
    with atomic_write(file) as out:
        out.write(json.dumps(dict(fingerprints), indent=1).encode() + b"\n")
    if not begun:  # Last: it is what makes a folder a run's.
        with atomic_write(workdir / CONFIG) as out:
            out.write(config_to_json(config).encode())


def is_workdir(path: str | os.PathLike) -> bool:
    """Whether a path is the workdir of a run, here or in a bucket that can be read."""
    if not is_bucket(path):
        file = Path(path).expanduser() / CONFIG
        return os.path.isfile(file) and not _is_theirs(file)
    if not needs_credentials(os.fspath(path)):
        return False
    with bucket_errors(path):
        remote = as_path(path) / CONFIG
        return remote.exists() and not _is_theirs(remote)


def _is_theirs(config: Any) -> bool:
    """Whether a folder's config.json is timm's or transformers'. Of a damaged one that is told by
    their weights beside it, which may also lie in the folder of a run."""
    try:
        with open_file(config) as file:
            return is_theirs(json.loads(file.read()))
    except (OSError, ValueError, RecursionError):
        return weights_in(config.parent) is not None


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The configuration of the run in a folder. Raises UserError if there is none or it is
    damaged."""
    file = as_path(workdir) / CONFIG
    try:
        with open_file(file) as opened:
            content = opened.read()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{workdir} is no workdir of a training run: it holds no {CONFIG}") from e
    except OSError as e:
        raise UserError(f"{file} can't be read ({e.strerror}): choose another workdir") from e
    try:
        return config_from_json(content.decode())
    except (ValueError, AttributeError, RecursionError) as e:
        if _is_theirs(file):
            folder = f"{workdir} is a folder of timm or transformers"
            raise UserError(f"{folder}: choose another workdir") from e
        raise UserError(f"{file} is damaged ({e}): choose another workdir") from e


def check_named(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Raises UserError if the images of a run have no name by which to open them again."""
    if config.dataset.endswith(IN_MEMORY_SUFFIX):
        raise UserError(
            f"{workdir}: its images were given in Python and can't be opened again: the run "
            f"itself writes {PAGE} at its end; or give vit-jax evaluate a folder of images"
        )


def set_aside(folder: epath.Path) -> None:
    """Renames what is damaged to NAME.damaged, NAME.damaged1, ..."""
    names = (folder.with_name(f"{folder.name}.damaged{n or ''}") for n in itertools.count())
    folder.rename(next(name for name in names if not name.exists()))


def set_best_aside(workdir: epath.Path) -> str:
    """Gives the best weights so far another name, weights_best_1.npz, ..., which is returned."""
    stems = (f"{Path(BEST_WEIGHTS).stem}_{n}" for n in itertools.count(1))
    best = workdir / BEST_WEIGHTS
    free = next(s for s in stems if not (workdir / f"{s}.npz").exists())
    for file in (best, best.with_suffix(".json")):
        if file.exists():
            file.rename(file.with_name(free + file.suffix))
    return f"{free}.npz"


class MetricsWriter:
    """Appends scalars to metrics.jsonl and to TensorBoard events in a workdir. In a bucket they
    appear at every `sync`, and every UPLOAD_SECONDS.

    Opening it at the step of the restored state (0 for a fresh run) removes what an interrupted run
    wrote beyond that step (and half a line that a kill left), so that no step is missing and none
    is there twice, if the lines of a step are on disk (see `sync`) before its checkpoint is saved.

    Raises UserError if metrics.jsonl is there and is not such a file; it is then left as it is.
    """

    def __init__(self, workdir: epath.Path, resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._lock = workdir / LOCK
        self._files = GrowingFiles(workdir, [METRICS])
        folder = as_path(self._files.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        if path.exists():
            records = _records(path)
            kept = b"".join(line for record, line in records if record["step"] <= resume_step)
            if kept != path.read_bytes():
                with atomic_write(path) as out:
                    out.write(kept)
        self._file = open(path, "ab")  # noqa: SIM115
        # Not the SummaryWriter: its thread dies on a full disk, and the run then waits for
        # ever. Files are named by the second, and one of the same second would be emptied.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = self._uploaded = time.monotonic()
        self._uploader = ThreadPoolExecutor(1)  # So that no step waits for a bucket.
        self._upload: Future[None] | None = None
        # What an interrupted run wrote from this step on is not to be shown.
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(session_log=start, step=resume_step + 1))
        self._files.sync()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line of scalars by name, such as {"train/loss": 2.25}, after so many updates; once
        this returns (in a bucket: once `sync` does), killing the process cannot lose it."""
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
        if time.monotonic() > self._uploaded + UPLOAD_SECONDS:
            if self._upload is None or self._upload.done():
                self._upload = self._uploader.submit(self._show)
            self._uploaded = time.monotonic()

    def sync(self) -> None:
        """Once this returns, a power cut cannot lose the lines so far either.

        Raises UserError if the workdir is in a bucket and another process has taken the run over.
        """
        check_claim(self._lock)
        os.fsync(self._file.fileno())
        self._flush_events()
        if self._upload:
            self._upload.result()
        self._files.sync()

    def _show(self) -> None:
        """Uploads for those who watch: that nothing is lost, `sync` sees to."""
        try:
            check_claim(self._lock)  # Another process that has taken the run over writes there.
            self._files.sync()
        except UserError as e:
            _log.warning("%s", e)

    def _flush_events(self) -> None:
        self._events.flush()  # To the disk, which takes a while.
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()
        self._uploader.submit(self._show).result()
        self._uploader.shutdown()
        self._files.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, also of one that a run is writing or left with half a line at
    its end: "step" is an int, all others are floats (null gives NaN).

    Raises UserError if there is no such file or a line other than a torn last one is no record.
    """
    return [record for record, _ in _records(as_path(path))]


def _records(path: epath.Path) -> list[tuple[dict[str, Any], bytes]]:
    """The records of a file, each with its line as it stands there, line end included."""
    try:
        with open_file(path) as file:
            lines = file.read().split(b"\n")
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
        elif number < len(lines):  # What follows the last line end is nothing, or torn.
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
