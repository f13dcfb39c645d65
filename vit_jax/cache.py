"""The folder for what can be fetched or made again: downloads, listings of large folders."""

import os
from pathlib import Path


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
