"""Fetching one file over HTTP so that it is whole or absent: resumed, checked, atomic, once.

The bytes arrive in `.NAME.part` beside the final name, and what the server said about the file is
kept in `.NAME.part.json`, so that a later start goes on where this one ended. The lock that keeps
other processes away is on the part itself: the system releases it when a process dies, and no
lock file is left behind.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import json
import logging
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path

from vit_jax.checkpoints.remote import (
    CorruptError,
    RefusedError,
    Remote,
    TryAgainError,
    content_range,
    describe,
    open_url,
)
from vit_jax.errors import UserError

TIMEOUT = 30.0  # Seconds without a byte after which a connection counts as dead.
ATTEMPTS = 5  # Fruitless ones in a row, after which we give up.
BACKOFF = 1.0  # Seconds before the second attempt; doubled for each further one.
LONGEST_WAIT = 60.0  # Seconds; a server may ask for less, not for more.

_PIECE = 1 << 20

_log = logging.getLogger(__name__)
_Report = Callable[[int, int | None], None]  # (bytes there, bytes in all or None)


def download(
    url: str, path: Path, *, attempts: int | None = None, timeout: float | None = None
) -> None:
    """Makes `path` a copy of what `url` gives, unless it is there already.

    Args:
      url: http or https.
      path: the final name. It appears once the file is complete, checked and on disk.
      attempts: how many may fail in a row without a new byte, by default ATTEMPTS.
      timeout: seconds without a byte after which an attempt fails, by default TIMEOUT.

    Raises UserError saying what went wrong and where to put the file by hand. What has arrived
    stays, and the next call goes on from there.
    """
    if path.is_dir():
        raise UserError(
            f"can't download {url}: another download occupies that name, {path} is a folder: "
            "remove it, or set VIT_JAX_CACHE to another folder"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_part(path) as part:
            if part is not None:
                with _progress(path.name) as report:
                    _transfer(
                        url,
                        part,
                        path,
                        report,
                        ATTEMPTS if attempts is None else attempts,
                        TIMEOUT if timeout is None else timeout,
                    )
                os.fsync(part.fileno())
                os.replace(_part_name(path), path)
                _state_name(path).unlink(missing_ok=True)
    except RefusedError as e:
        raise UserError(
            f"can't download {url}: {e}; or fetch that address by hand and save it as {path}"
        ) from e
    except (PermissionError, FileExistsError, NotADirectoryError) as e:
        raise UserError(
            f"can't write {path} ({e.strerror}): set VIT_JAX_CACHE to a folder that can be written"
        ) from e


def _part_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _state_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.part.json")


@contextlib.contextmanager
def _locked_part(path: Path) -> Iterator[BufferedRandom | None]:
    """The part, ours alone; None if the file is complete, perhaps by another process's work."""
    name = _part_name(path)
    while not path.is_file():
        with open(os.open(name, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as part:
            _lock(part, path)
            # Whoever had the lock may have given the part its final name, or begun another.
            if not _is_named(part, name):
                continue
            if path.is_file():
                name.unlink()
                continue
            try:
                yield part
            finally:
                if not _size(part) and _is_named(part, name):
                    name.unlink()  # Nothing came.
            return
    yield None


def _lock(part: BufferedRandom, path: Path) -> None:
    import fcntl  # Not on Windows, where local files work all the same.

    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _log.warning("waiting for another process that is downloading %s", path.name)
        fcntl.flock(part, fcntl.LOCK_EX)
    except OSError as e:
        raise UserError(
            f"files in {path.parent} can't be locked ({e.strerror}): set VIT_JAX_CACHE to a folder "
            "on a local disk"
        ) from e


def _is_named(file: BufferedRandom, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except FileNotFoundError:
        return False


def _transfer(
    url: str, part: BufferedRandom, path: Path, report: _Report, attempts: int, timeout: float
) -> None:
    """Fills the part, in as many attempts as it takes while each brings something new."""
    most, fruitless, corrupt = _size(part), 0, 0
    while True:
        try:
            remote = _receive(url, part, path, report, timeout)
            _check(remote, part, path)
            return
        except CorruptError as e:
            # Damage on the way, or a part of another version: once more, from the start.
            _discard(part, path)
            corrupt += 1
            if corrupt == min(2, attempts):
                raise RefusedError(f"{e}: try again later") from e
            _log.warning("%s: %s; fetching it again from the start", path.name, e)
        except TryAgainError as e:
            fruitless = 0 if _size(part) > most else fruitless
            most = max(most, _size(part))
            fruitless += 1
            if fruitless >= attempts:
                kept = _read_state(path) and _size(part)
                rest = f"; {kept:,} bytes are kept for another try" if kept else ""
                raise RefusedError(
                    f"{e}, {attempts} times in a row{rest}: check the network and try again"
                ) from e
            wait = BACKOFF * 2 ** (fruitless - 1) if e.wait is None else e.wait
            wait = min(wait, LONGEST_WAIT)
            _log.warning("%s: %s; trying again in %.0f s", path.name, e, wait)
            time.sleep(wait)


def _receive(url: str, part: BufferedRandom, path: Path, report: _Report, timeout: float) -> Remote:
    """One request: the rest of the file if the server still has the same one, else all of it."""
    known = _read_state(path)
    have = _size(part)
    if known is None or known.url != url or (known.size is not None and have > known.size):
        known = None
        have = 0
    elif have and have == known.size:
        return known  # Stopped between the last byte and the check.
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity"}
    if have and known:
        headers["Range"] = f"bytes={have}-"
        if known.strong_etag:
            headers["If-Range"] = known.strong_etag
    with open_url(url, headers, timeout) as response:
        if response.status == 206:
            start, total = content_range(response)
            now = dataclasses.replace(describe(url, response), size=total)
            if known is None or start != have or not known.is_same(now):
                _discard(part, path)
                raise TryAgainError("the file has changed on the server")
            remote = known
        elif response.status == 200:
            _discard(part, path)
            remote = describe(url, response)
            # Without any mark by which to know the file again, it can't be resumed.
            if remote.is_same(remote):
                _state_name(path).write_text(json.dumps(dataclasses.asdict(remote)))
        else:
            raise RefusedError(f"the server answered {response.status}, expected 200")
        if remote.size is not None:
            _check_room(path, remote.size - _size(part))
        _copy(response, part, remote.size, report)
    if remote.size is not None and _size(part) != remote.size:
        raise TryAgainError(f"cut off after {_size(part):,} of {remote.size:,} bytes")
    return remote


def _copy(response, part: BufferedRandom, size: int | None, report: _Report) -> None:
    done = _size(part)
    part.seek(done)
    try:
        while True:
            report(done, size)
            try:
                # What has arrived, at once: the timeout is then one between two arrivals.
                piece = response.read1(_PIECE)
            except TimeoutError as e:
                raise TryAgainError(f"no byte came for a while after {done:,}") from e
            except (OSError, http.client.HTTPException) as e:
                raise TryAgainError(f"the connection broke after {done:,} bytes") from e
            if not piece:
                return
            part.write(piece)
            done += len(piece)
    finally:
        part.flush()


def _check(remote: Remote, part: BufferedRandom, path: Path) -> None:
    """Compares the part with the server's checksum, and looks whether an .npz is one."""
    part.seek(0)
    if remote.md5:
        found = hashlib.file_digest(part, lambda: hashlib.md5(usedforsecurity=False)).digest()
        _compare("MD5", found, remote.md5)
    elif remote.crc32c:
        from vit_jax.checkpoints.crc32c import crc32c

        _compare("CRC32C", crc32c(part).to_bytes(4, "big"), remote.crc32c)
    part.seek(0)
    # The directory of an .npz stands at its end, so that a truncated one is not accepted either.
    if path.suffix == ".npz" and not zipfile.is_zipfile(part):
        size = _size(part)
        part.seek(0)
        raise CorruptError(
            f"what came is no complete .npz file ({size:,} bytes that start with {part.read(8)!r})"
        )


def _compare(kind: str, found: bytes, expected: str) -> None:
    if base64.b64encode(found).decode() != expected:
        raise CorruptError(
            f"its {kind} is {base64.b64encode(found).decode()}, but the server gives {expected}"
        )


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path.name} needs {needed / 1e6:,.0f} MB, but {path.parent} has {free / 1e6:,.0f} MB "
            "free: make room, or set VIT_JAX_CACHE to another folder"
        )


def _size(part: BufferedRandom) -> int:
    return part.seek(0, os.SEEK_END)


def _discard(part: BufferedRandom, path: Path) -> None:
    # First the bytes, then what is known of them: never bytes with the notes of another file.
    part.truncate(0)
    _state_name(path).unlink(missing_ok=True)


def _read_state(path: Path) -> Remote | None:
    try:
        return Remote(**json.loads(_state_name(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _progress(title: str) -> Iterator[_Report]:
    """A progress bar on a terminal; elsewhere one line in the log."""
    if not sys.stderr.isatty():
        _log.info("downloading %s", title)
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        short = title if len(title) <= 40 else f"{title[:28]}...{title[-9:]}"
        task = bar.add_task(short, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
