"""The cache folder (downloads, listings of large folders, compiled programs), and files that are
whole or absent."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vit_jax.errors import UserError


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of the cache, which need not exist.

    `cache_dir`, else the environment's VIT_JAX_CACHE, else XDG_CACHE_HOME/vit_jax, else
    ~/.cache/vit_jax.
    """
    if cache_dir or (cache_dir := os.environ.get("VIT_JAX_CACHE")):
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    # As XDG has it, a relative path is to be ignored.
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "vit_jax"


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
    folder = str(Path(place).expanduser() if place else own or cache_folder() / "compiled")
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


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends without an error.

    Raises UserError if it can't be written: no such folder, no permission, no space.
    """
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
