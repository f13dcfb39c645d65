"""Paths here and in buckets, the cache folder (downloads, compiled programs), and files that are
whole or absent."""

import contextlib
import errno
import functools
import io
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from vit_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

LARGEST_OBJECT = 2 << 30  # Bytes of an object of a bucket that is opened as a file.

# Read by etils once: buckets are reached by gcsfs, not by TensorFlow where that is installed.
os.environ.setdefault("EPATH_USE_TF", "false")
# And by gcsfs: it would ask another service, by gRPC, what kind of bucket each is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def expand_user(path: str | os.PathLike) -> str:
    """A path with what ~ and ~USER stand for. Raises UserError if there is no such home folder."""
    text = os.path.expanduser(os.fspath(path))
    if text.startswith("~") and not os.path.lexists(text):
        user = text.partition(os.sep)[0]
        raise UserError(f"{path}: {user} is nobody's home folder here: give the path without it")
    return text


def as_path(path: str | os.PathLike) -> "epath.Path":
    """A path here or in a bucket (gs://BUCKET/...), to be used like one of pathlib.

    Raises UserError for an address of another kind, one without a bucket, or if what reads buckets
    isn't installed.
    """
    from etils import epath

    text = expand_user(path)
    if is_bucket(text):
        if not re.match(r"gs://[^/]", text):
            raise UserError(f"{text} names no bucket: expected gs://BUCKET/FOLDER")
        with bucket_errors(text):
            import fsspec.config

        # Listings are kept for ever else, and other libraries and processes write there, too.
        fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    elif re.match(r"/(gs|s3|az|hf)/", text):  # Which etils takes for buckets.
        raise UserError(f"{text} can't be used: {text[:3]} stands for a bucket; link it elsewhere")
    elif re.match(r"\w+:/", text):
        raise UserError(
            f"{text} can't be used: expected a folder or gs://BUCKET/FOLDER; mount other kinds of "
            "storage and name the folder"
        )
    return epath.Path(text)


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A file here or an object of a bucket, to be read from its beginning.

    Raises OSError, also for what isn't a regular file (devices are without end, and pipes wait) and
    for an object that is too large to be held in memory. UserError as `bucket_errors`.
    """
    if not is_bucket(path):
        file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        return file
    with bucket_errors(path), as_path(path).open("rb") as remote:
        if remote.seek(0, os.SEEK_END) > LARGEST_OBJECT:
            raise OSError(errno.EFBIG, f"larger than {LARGEST_OBJECT:,} bytes", os.fspath(path))
        remote.seek(0)
        return io.BytesIO(remote.read())


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Which Windows hasn't.


def list_folder(path: str | os.PathLike) -> list[str]:
    """The names in a folder here or in a bucket, where nothing there is an empty folder.

    Raises OSError, or UserError as `bucket_errors`.
    """
    if not is_bucket(path):
        return os.listdir(path)
    with bucket_errors(path):
        return [entry.name for entry in as_path(path).iterdir()]


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of the cache, which need not exist.

    `cache_dir`, else the environment's VIT_JAX_CACHE, else XDG_CACHE_HOME/vit_jax, else
    ~/.cache/vit_jax.
    """
    if cache_dir or (cache_dir := os.environ.get("VIT_JAX_CACHE")):
        return Path(expand_user(cache_dir))
    base = os.environ.get("XDG_CACHE_HOME")
    # As XDG has it, a relative path is to be ignored.
    return Path(base if base and os.path.isabs(base) else expand_user("~/.cache")) / "vit_jax"


@contextlib.contextmanager
def cache_errors(path: str | os.PathLike) -> Iterator[None]:
    """Makes a UserError of what the system says against writing a file of the cache."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"can't write {path} ({e.strerror or e}): make room, or set VIT_JAX_CACHE to a folder "
            "that can be written; what has arrived is kept"
        ) from e


def keep_compiled(place: str = "") -> str:
    """Has JAX keep the programs that it compiles, for this process and later ones.

    Args:
      place: a folder; empty for the folder that JAX is set to already, else "compiled" in
        `cache_folder()`; "off" to leave JAX's settings alone.

    Returns:
      what to tell a person: where they are, or why they are not kept.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if place == "off":
        return "compiled programs are not kept"
    settings: Any = jax.config
    own = settings.jax_compilation_cache_dir
    folder = str(expand_user(place) if place else own or cache_folder() / "compiled")
    if folder != own and "://" not in folder:
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as e:
            return f"compiled programs are not kept: {folder} can't be written ({e.strerror})"
    if folder != own:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX looks at the setting once.
    return f"compiled programs are in {folder}"


def locks() -> Any:
    """Python's module fcntl. Raises UserError where there is none, as on Windows."""
    try:
        import fcntl
    except ImportError as e:
        raise UserError(
            "this system can't lock files, which training and downloads need: use Linux, macOS or, "
            "on Windows, its Linux (WSL)"
        ) from e
    return fcntl


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is one in a bucket, gs://BUCKET/..."""
    return os.fspath(path).startswith("gs://")


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Makes a UserError of what goes wrong with a bucket: no such one, no permission, no network.

    Raises it also if the extra `gcs` isn't installed. FileNotFoundError is left as it is, and of a
    local path everything.
    """
    if not is_bucket(path):
        yield
        return
    try:
        import google.api_core.exceptions as api
        import google.auth.exceptions as auth
        import requests.exceptions as http
        from gcsfs.retry import HttpError
    except ImportError as e:
        raise UserError(
            f"{path} is in a bucket, and {e.name} isn't installed: run pip install 'vit_jax[gcs]'"
        ) from e
    kinds = (api.GoogleAPIError, auth.GoogleAuthError, http.RequestException, HttpError, OSError)
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except kinds as e:
        code = getattr(e, "code", None)
        if isinstance(e, auth.DefaultCredentialsError):
            reason = "this machine has no credentials for Google Cloud: run gcloud auth "
            reason += "application-default login, or use a machine whose account may use the bucket"
        elif code in (401, 403) or str(e).startswith("Forbidden"):
            reason = "these credentials may not do that: give their account the role Storage "
            reason += "Object User (to read only, Storage Object Viewer) for the bucket"
        elif code == 404:
            reason = "there is no such bucket or object: correct the name"
        elif isinstance(e, auth.RefreshError):
            reason = "the credentials have expired: run gcloud auth application-default login"
        elif isinstance(e, OSError) and not isinstance(e, http.RequestException):
            raise  # The file system here.
        else:
            first = next(iter(str(e).splitlines()), type(e).__name__)[:200]
            reason = f"the bucket can't be reached ({first}): try again later"
        raise UserError(f"{path}: {reason}") from e


@functools.cache
def has_credentials() -> bool:
    """Whether this machine has credentials for buckets and the extra `gcs`."""
    try:
        import gcsfs  # noqa: F401
        import google.auth
    except ImportError:
        return False
    if "STORAGE_EMULATOR_HOST" in os.environ:
        return True
    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError:
        return False
    return True


@functools.cache
def _bucket_client() -> Any:
    from google.cloud import storage

    return storage.Client(project=None)


def blob_of(path: str | os.PathLike) -> Any:
    """Google's handle of an object, which need not exist."""
    bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
    return _bucket_client().bucket(bucket).blob(name)


def upload(path: str | os.PathLike, file: BinaryIO) -> None:
    """Writes all of a local file, opened, to an object, which changes when that is complete.

    Raises UserError as `bucket_errors`.
    """
    with bucket_errors(path):
        size = file.seek(0, os.SEEK_END)
        blob_of(path).upload_from_file(file, size=size, rewind=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends without an error.

    One in a bucket is written here first and then uploaded.

    Raises UserError if it can't be written: no such folder, no permission, no space.
    """
    if is_bucket(path):
        with tempfile.TemporaryFile() as file:
            yield file
            upload(path, file)
        return
    path = Path(path)
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}"
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as e:
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}: make it first") from e
        raise UserError(f"{path} can't be written ({e.strerror or e})") from e
