"""Buckets of Google Cloud Storage (gs://BUCKET/...), as the places of runs, data and weights.

A bucket holds whole objects: one can't be appended to, renamed or locked. Hence

- what is written appears at once, whole, when its upload is complete (`upload`);
- files that grow, as a run's metrics, grow here and are uploaded whole from time to time
  (`GrowingFiles`); nothing is lost by that, for a resumed run drops what it wrote after the
  checkpoint that it goes on from, and everything before is uploaded before that checkpoint is;
- a run holds its workdir by an object that only one process can have created (`Claim`);
- libraries that read local files only get copies in the cache folder (`local_copy`).

Checkpoints are Orbax's and TensorStore's: they write to buckets themselves, and a checkpoint counts
once its `commit_success.txt` is there.

Credentials are those of the machine (a TPU's or GKE's account, GOOGLE_APPLICATION_CREDENTIALS, or
`gcloud auth application-default login`), found by Google's own libraries, the extra `gcs`.
STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL send all of them to an emulator.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from vit_jax.errors import UserError
from vit_jax.files import (
    atomic_write,
    blob_of,
    bucket_errors,
    cache_errors,
    cache_folder,
    is_bucket,
    upload,
)

RENEW_S = 20  # How often the holder of a claim renews it,
STALE_S = 90  # and after how long without that it is taken for dead.

_log = logging.getLogger(__name__)


class GrowingFiles:
    """The files of a run that grow: written in `folder`, a local one, and kept in a workdir.

    Of a local workdir `folder` is the workdir itself. Of one in a bucket it is a temporary folder,
    which begins with copies of the files named and from which `sync` uploads what has changed.
    """

    def __init__(self, workdir: Any, names: Sequence[str]):
        self._workdir = workdir
        self._uploaded: dict[str, tuple[int, int]] = {}
        if not is_bucket(workdir):
            self.folder = Path(workdir)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="vit_jax-")
        self.folder = Path(self._temporary.name)
        for name in names:
            with bucket_errors(workdir), contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._workdir / name).read_bytes())
                self._uploaded[name] = self._state(self.folder / name)

    def sync(self) -> None:
        """Uploads the files that have changed. Raises UserError as `bucket_errors`."""
        if not is_bucket(self._workdir):
            return
        for file in sorted(f for f in self.folder.rglob("*") if f.is_file()):
            name, state = str(file.relative_to(self.folder)), self._state(file)
            if self._uploaded.get(name) != state:
                with file.open("rb") as opened:
                    upload(self._workdir / name, opened)
                self._uploaded[name] = state

    def close(self) -> None:
        """Removes the temporary folder."""
        if is_bucket(self._workdir):
            self._temporary.cleanup()

    @staticmethod
    def _state(file: Path) -> tuple[int, int]:
        status = file.stat()
        return status.st_size, status.st_mtime_ns


_claims: dict[str, "Claim"] = {}  # Of this process, by their paths.


class Claim:
    """Holds a run in a bucket for this process, by an object that names it.

    The object is created on the condition that there is none (a generation precondition), renewed
    every `renew_s` seconds on the condition that nobody else has touched it, and deleted at the end
    of the `with` block. Who finds one takes it over if its holder is dead: if that was a process of
    this machine which is gone, or if the object stays as it is for `stale_s` seconds, by the clock
    of the one who waits for that.

    Entering raises UserError if another process holds it, or as `bucket_errors`.
    """

    def __init__(
        self, path: os.PathLike, *, renew_s: float = RENEW_S, stale_s: float = STALE_S
    ) -> None:
        self._path, self._renew_s, self._stale_s = path, renew_s, stale_s
        self._text = f"{os.getpid()} on {platform.node()}\n{_machine()}\n{secrets.token_hex()}\n"
        self._generation = 0  # Of the object as this process wrote it last.
        self._lock = threading.Lock()  # Of the thread that renews and the one that checks.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True)

    def __enter__(self) -> Self:
        with bucket_errors(self._path):
            while not self._write():
                if found := self._find():
                    self._wait_for_its_end(*found)
                self._generation = found[0] if found else 0
        self._thread.start()
        _claims[os.fspath(self._path)] = self
        return self

    def check(self) -> None:
        """Renews the claim. Raises UserError if another process has taken it over, or as
        `bucket_errors`."""
        with self._lock, bucket_errors(self._path):
            if not self._write():
                holder = found[1].partition("\n")[0] if (found := self._find()) else "(none)"
                raise UserError(
                    f"{self._path} was not renewed for {self._stale_s:g} seconds and process "
                    f"{holder} has taken it over: this one ends, so that no two write there"
                )

    def __exit__(self, *_: object) -> None:
        del _claims[os.fspath(self._path)]
        self._ended.set()
        self._thread.join()
        # If that fails, it is not ours any more, or the next process waits for `stale_s`.
        with contextlib.suppress(UserError, FileNotFoundError), bucket_errors(self._path):
            blob_of(self._path).delete(if_generation_match=self._generation)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self._renew_s):
            with contextlib.suppress(Exception):  # The next `check` tells.
                self.check()

    def _write(self) -> bool:
        """Whether the object was of our generation (0: not there), and is now ours anew."""
        from google.api_core.exceptions import PreconditionFailed

        blob = blob_of(self._path)
        try:
            blob.upload_from_string(self._text, if_generation_match=self._generation)
            self._generation = blob.generation
        except PreconditionFailed:
            # So it ends, too, if the answer was lost and Google's client tried once more.
            found = self._find()
            if not found or found[1] != self._text:
                return False
            self._generation = found[0]
        return True

    def _find(self) -> tuple[int, str] | None:
        """The generation and the text of the object; None if there is none."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob = blob_of(self._path)
        while found := blob.bucket.get_blob(blob.name):
            generation = found.generation  # Not always known after the download.
            with contextlib.suppress(NotFound, PreconditionFailed):  # Changed in between.
                return generation, found.download_as_text(if_generation_match=generation)
        return None

    def _wait_for_its_end(self, generation: int, text: str) -> None:
        """Returns when the holder is seen to be dead. Raises UserError if it lives."""
        holder, machine = (*text.splitlines(), "", "")[:2]
        here = machine == _machine() != ""
        if here and not os.path.exists(f"/proc/{holder.split()[0]}"):
            return
        _log.warning(
            "process %s holds %s: waiting up to %g s to see whether it is alive",
            *(holder, self._path, self._stale_s),
        )
        deadline = time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(self._stale_s / 50)
            found = self._find()
            if not found:
                return
            if found[0] != generation:
                raise UserError(
                    f"process {holder} is training in {os.path.dirname(self._path)}: wait for it, "
                    "stop it, or choose another workdir"
                )


def check_claim(path: str | os.PathLike) -> None:
    """Renews the claim that this process holds on a path, if it holds one; see `Claim.check`."""
    if claim := _claims.get(os.fspath(path)):
        claim.check()


@functools.cache
def _machine() -> str:
    """What tells this system's processes from those of another or an earlier one; "" if unknown."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def local_copy(
    path: str | os.PathLike, beside: Sequence[str] = (), siblings: Sequence[str] = ()
) -> Path:
    """A file or a folder of a bucket, copied into the cache folder unless it is there already.

    The place in the cache is named by the generations of the objects: a copy is never out of date.

    Args:
      path: a file, or a folder, of which all files are copied.
      beside, siblings: files to copy with a file, if there are any: ".json" for NAME.json;
        "config.json" for that in its folder.

    Raises UserError if there is none, the disk is too small, or as `bucket_errors`.
    """
    path = os.fspath(path).rstrip("/")
    with bucket_errors(path):
        store, name = (blob := blob_of(path)).bucket, blob.name
        is_file = bool(name) and blob.exists()
        if is_file:
            names = [name, *(os.path.splitext(name)[0] + ending for ending in beside)]
            names += [os.path.join(os.path.dirname(name), sibling) for sibling in siblings]
            blobs = list(filter(None, map(store.get_blob, names)))
        else:
            listed = store.list_blobs(prefix=f"{name}/" if name else None)
            blobs = [blob for blob in listed if not blob.name.endswith("/")]
        if not blobs:
            raise UserError(f"{path}: there is no such file or folder in the bucket")
        digest = hashlib.sha256("".join(f"{b.name} {b.generation}\n" for b in blobs).encode())
        place = cache_folder() / "gs" / store.name / name / digest.hexdigest()[:12]
        root = os.path.dirname(name) if is_file else name
        for blob in blobs:  # Names of objects are free: this one would lead out of the cache.
            if ".." in blob.name.split("/") or "//" in blob.name or blob.name.startswith("/"):
                raise UserError(f"{path}: an object is named {blob.name!r}, which is no path here")
        copies = [(blob, place / blob.name.removeprefix(f"{root}/")) for blob in blobs]
        missing = [(blob, file) for blob, file in copies if not file.exists()]
        size = sum(blob.size for blob, _ in missing)
        with cache_errors(place):
            place.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(place).free):
            raise UserError(
                f"{path} has {size / 1e9:,.1f} GB to copy into {place}, where {free / 1e9:,.1f} GB "
                "are free: set VIT_JAX_CACHE to a folder with room, or mount the bucket (e.g. with "
                "gcsfuse) and name its folder"
            )
        if size > 1e8:
            _log.warning("copying %s (%.1f GB) to %s", path, size / 1e9, place)
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda copy: _download(*copy), missing):
                pass
    return copies[0][1] if is_file else place


def _download(blob: Any, file: Path) -> None:
    """Google's client compares the checksum."""
    with cache_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        blob.download_to_file(out, if_generation_match=blob.generation)
