"""Fetching one file over HTTP so that it is whole or absent: resumed, checked, atomic, once.

The bytes arrive in `.NAME.part` beside the final name, and what the server said about the file is
kept in `.NAME.part.json`, so that a later start goes on where this one ended. The lock that keeps
other processes away is on the part itself: the system releases it when a process dies.
"""

import base64
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import ssl
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path
from typing import Any

import google_crc32c
import requests
from urllib3 import exceptions as broken

from vit_jax.errors import AbsentError, UserError, first_line
from vit_jax.files import cache_errors, locks

TIMEOUT = 30.0  # Seconds without a byte after which a connection counts as dead.
ATTEMPTS = 5  # Fruitless ones in a row, after which we give up.
BACKOFF = 1.0  # Seconds before the second attempt; doubled for each further one.
LONGEST_WAIT = 60.0  # Seconds; a server may ask for less, not for more.

LARGEST = 16 << 30  # Bytes of a file, several times the largest that is published.

_PIECE = 1 << 20
_LEFT_FREE = 64 << 20  # Bytes of the disk.
_MARKS = {"etag", "generation", "md5", "crc32c"}  # By which a file is known again.

_log = logging.getLogger(__name__)
_Report = Callable[[int, int | None], None]  # (bytes there, bytes in all or None)
_Remote = dict[str, Any]  # A file as its server describes it, see `_describe`.


class _FailedError(Exception):
    """Why an attempt failed; `tries` such in a row are enough, `wait` seconds are to be between;
    what a person is told is an `error`."""

    def __init__(
        self,
        reason: str,
        tries: float = math.inf,
        wait: float | None = None,
        error: type[UserError] = UserError,
    ):
        super().__init__(reason)
        self.tries, self.wait, self.error = tries, wait, error


def download(
    url: str,
    path: Path,
    *,
    attempts: int | None = None,
    timeout: float | None = None,
    limit: int | None = None,
) -> None:
    """Makes `path` a copy of what `url` gives, unless it is there already.

    Args:
      url: http or https.
      path: the final name. It appears once the file is complete, checked and on disk.
      attempts: how many may fail in a row without a new byte, by default ATTEMPTS.
      timeout: seconds without a byte after which an attempt fails, by default TIMEOUT.
      limit: bytes that the file may have, whatever the server says, by default LARGEST.

    Raises UserError saying what went wrong and where to put the file by hand, AbsentError if the
    server says that it gives no such file. What has arrived stays, and the next call goes on from
    there.
    """
    if os.path.isdir(path):
        raise UserError(
            f"can't download {url}: another download occupies that name, {path} is a folder: "
            "remove it, or set VIT_JAX_CACHE to another folder"
        )
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_part(path) as part:
            if not path.is_file():  # It may be there by another process's work.
                receive = functools.partial(
                    _receive, url, part, path, timeout=timeout or TIMEOUT, limit=limit or LARGEST
                )
                _transfer(url, receive, part, path, attempts or ATTEMPTS)
                os.fsync(part.fileno())
                os.replace(part.name, path)
                _notes(path).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_part(path: Path) -> Iterator[BufferedRandom]:
    """The part, ours alone. It is removed at the end if nothing came, or it is no longer needed."""
    fcntl = locks()
    name = path.with_name(f".{path.name}.part")
    while True:
        with open(name, "a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.warning("waiting for another process that is downloading %s", path.name)
                fcntl.flock(part, fcntl.LOCK_EX)
            except OSError as e:
                raise UserError(
                    f"files in {path.parent} can't be locked ({e.strerror}): set VIT_JAX_CACHE to "
                    "a folder on a local disk"
                ) from e
            if not os.fstat(part.fileno()).st_nlink:  # Whoever had the lock removed it.
                continue
            try:
                yield part
            finally:
                if path.is_file() or not _size(part):
                    name.unlink(missing_ok=True)
            return


def _transfer(
    url: str,
    receive: Callable[[_Report], _Remote],
    part: BufferedRandom,
    path: Path,
    attempts: int,
) -> None:
    """Fills the part, in as many attempts as it takes while each brings something new."""
    most, failed = _size(part), 0
    with _progress(path.name) as report:
        while True:
            try:
                _check(receive(report), part, path)
                return
            except _FailedError as e:
                failed = 1 if _size(part) > most else failed + 1
                most = max(most, _size(part))
                if failed >= min(e.tries, attempts):
                    often = f", {failed} times in a row: try again later" if failed > 1 else ""
                    kept = _read_notes(path) and _size(part)
                    rest = f"; {kept:,} bytes are kept for another try" if kept else ""
                    raise e.error(
                        f"can't download {url}: {e}{often}{rest}; or fetch that address by hand "
                        f"and save it as {path}"
                    ) from e
                wait = BACKOFF * 2 ** (failed - 1) if e.wait is None else e.wait
                wait = min(wait, LONGEST_WAIT)
                _log.warning("%s: %s; trying again in %.0f s", path.name, e, wait)
                time.sleep(wait)


def _receive(
    url: str, part: BufferedRandom, path: Path, report: _Report, *, timeout: float, limit: int
) -> _Remote:
    """One request: the rest of the file if the server still has the same one, else all of it."""
    known, done = _read_notes(path), _size(part)
    if known.get("url") != url or done > known.get("size", done):
        known, done = {}, 0
    elif done and done == known.get("size"):
        return known  # Stopped between the last byte and the check.
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
        if "etag" in known:
            headers["If-Range"] = known["etag"]
    with _open(url, headers, timeout) as response:
        remote = _describe(url, response)
        if response.status_code != 200:
            start, _, total = response.headers.get("Content-Range", "").partition("/")
            remote["size"] = _number(total)
            same = all(known.get(k, v) == v for k, v in remote.items() if v is not None)
            marked = _MARKS & remote.keys() & known.keys()
            if not (same and marked and start.startswith(f"bytes {done}-")):
                _discard(part, path)
                raise _FailedError("the file has changed on the server")
            remote = known
        else:
            _discard(part, path)
            done = 0
            # Without any mark by which to know the file again, it can't be resumed.
            if _MARKS & remote.keys():
                _notes(path).write_text(json.dumps(remote))
        size = remote.get("size")
        free = shutil.disk_usage(path.parent).free - _LEFT_FREE
        if size is not None and size - done > free:
            raise UserError(
                f"{path.name} needs {(size - done) / 1e6:,.0f} MB, but {path.parent} has "
                f"{max(free, 0) / 1e6:,.0f} MB free for it: make room, or set VIT_JAX_CACHE to "
                "another folder"
            )
        # Of a size that nobody told there is no end in sight.
        limit = min(limit, done + free)
        try:
            report(done, size)
            # What has arrived, at once: the timeout is then one between two arrivals.
            while piece := response.raw.read1(_PIECE, decode_content=False):
                if max(size or 0, done + len(piece)) > limit:
                    _discard(part, path)
                    raise UserError(
                        f"{url} gives more than {limit / 1e6:,.0f} MB, too much for such a file or "
                        f"this disk: check the address, or fetch it by hand and save it as {path}"
                    )
                done += part.write(piece)
                report(done, size)
        except broken.HTTPError as e:
            how = "silent for too long" if isinstance(e, broken.TimeoutError) else "cut off"
            raise _FailedError(f"{how} after {done:,} bytes") from e
        finally:
            part.flush()
    if size is not None and done != size:
        raise _FailedError(f"cut off after {done:,} of {size:,} bytes")
    if size is None and not response.raw.chunked and not remote.keys() & {"md5", "crc32c"}:
        _log.warning(
            "%s: the server tells neither its size nor a checksum: whether these %d bytes are all "
            "can't be known",
            *(path.name, done),
        )
    return remote


def _open(url: str, headers: dict[str, str], timeout: float) -> requests.Response:
    """The answer: the file follows (200), or a part of it (206), or there is no such part (416)."""
    # The system's certificates, or those of SSL_CERT_FILE; where there are none, requests' own.
    verify = ssl.get_default_verify_paths().cafile or True
    try:
        response = requests.get(url, headers=headers, timeout=timeout, stream=True, verify=verify)
    except requests.RequestException as e:
        reason = getattr(e.args[0] if e.args else e, "reason", e)
        text = "no answer in time" if isinstance(e, requests.Timeout) else first_line(reason)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            text = (
                f"its certificate is not trusted ({text}): check the clock, or set SSL_CERT_FILE "
                "to your network's certificates"
            )
            raise _FailedError(text, tries=1) from e
        unknown = isinstance(reason, broken.NameResolutionError) and "Range" not in headers
        # The other two: no http or https address.
        if unknown or isinstance(e, ValueError | requests.TooManyRedirects):
            raise _FailedError(f"{text}: check the name and the network", tries=1) from e
        raise _FailedError(f"no connection ({text})") from e
    status = response.status_code
    secure = response.url.startswith("https:") or not url.startswith("https:")
    if secure and (status in (200, 206) or (status == 416 and "Range" in headers)):
        return response
    response.close()
    if not secure:
        raise _FailedError(f"it redirects to {response.url}, which is not secure", tries=1)
    said = f"the server answered {status} {response.reason or ''}".rstrip()
    if status in (408, 425, 429, 500, 502, 503, 504):
        seconds = response.headers.get("Retry-After", "")
        raise _FailedError(said, wait=float(seconds) if seconds.isdecimal() else None)
    if status in (401, 403, 404, 410):
        said += ", so there is no such file or no permission to read it"
    error = AbsentError if 400 <= status < 500 else UserError
    raise _FailedError(f"{said}: check the name", tries=1, error=error)


def _describe(url: str, response: requests.Response) -> _Remote:
    """The address, and what the server tells of: the size (of a part its own), marks by which the
    file is known again (ETag, generation), and checksums in base64 (MD5, CRC32C)."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        packing = headers["Content-Encoding"]
        raise _FailedError(f"the server sends it compressed ({packing}), unasked", tries=1)
    told: _Remote = {"generation": headers.get("x-goog-generation")}
    if headers.get("ETag", "").startswith('"'):  # A weak one, W/"...", promises no equal bytes.
        told["etag"] = headers["ETag"]
    size = headers.get("Content-Length", "")
    # What is stored compressed and sent plain has the checksums and size of the compressed form.
    if headers.get("x-goog-stored-content-encoding", "identity") == "identity":
        size = headers.get("x-goog-stored-content-length", size)
        pairs = [text.strip().partition("=") for text in headers.get("x-goog-hash", "").split(",")]
        told |= {kind: value for kind, _, value in pairs if kind in ("md5", "crc32c")}
    told["size"] = _number(size)
    return {"url": url} | {name: value for name, value in told.items() if value is not None}


def _number(text: str) -> int | None:
    """A size as a server tells it; None for what is none."""
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _check(remote: _Remote, part: BufferedRandom, path: Path) -> None:
    """Compares the part with the server's checksum, and looks whether an .npz is one."""
    wrong = ""
    if kind := next((kind for kind in ("md5", "crc32c") if kind in remote), None):
        digest = hashlib.md5(usedforsecurity=False) if kind == "md5" else google_crc32c.Checksum()
        part.seek(0)
        while piece := part.read(_PIECE):
            digest.update(piece)
        found = base64.b64encode(digest.digest()).decode()
        if found != remote[kind]:
            wrong = f"its {kind.upper()} is {found}, but the server gives {remote[kind]}"
    part.seek(0)
    # The directory of an .npz stands at its end, so that a truncated one is not accepted either.
    if not wrong and path.suffix == ".npz" and not zipfile.is_zipfile(part):
        part.seek(0)
        start = part.read(8)
        wrong = (
            f"what came is no complete .npz file ({_size(part):,} bytes that start with {start!r})"
        )
    if wrong:
        # Damage on the way, or a part of another version: from the start, but not again and again.
        _discard(part, path)
        raise _FailedError(wrong, tries=3)


def _size(part: BufferedRandom) -> int:
    return part.seek(0, os.SEEK_END)


def _discard(part: BufferedRandom, path: Path) -> None:
    # First the bytes, then what is known of them: never bytes with the notes of another file.
    part.truncate(0)
    _notes(path).unlink(missing_ok=True)


def _notes(path: Path) -> Path:
    return path.with_name(f".{path.name}.part.json")


def _read_notes(path: Path) -> _Remote:
    try:
        notes = dict(json.loads(_notes(path).read_text()))
        return {k: v for k, v in notes.items() if type(v) is (int if k == "size" else str)}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


@contextlib.contextmanager
def _progress(title: str) -> Iterator[_Report]:
    """A progress bar on a terminal; elsewhere one line in the log."""
    if not sys.stderr.isatty():
        _log.info("downloading %s", title)
        yield lambda done, total: None
        return
    from rich import console, markup, progress

    # The bar takes what the others leave of the line: of 80 columns 13, beside the longest title.
    columns = (progress.BarColumn(bar_width=None), progress.DownloadColumn(binary_units=True))
    speed = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    short = title if len(title) <= 28 else f"{title[:16]}...{title[-9:]}"
    screen = console.Console(stderr=True)
    with progress.Progress(
        "{task.description}", *columns, *speed, console=screen, expand=True
    ) as bar:
        task = bar.add_task(markup.escape(short), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
