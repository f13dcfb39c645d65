"""Weights of timm and transformers in the repositories of huggingface.co, through its own library.

Its environment variables hold: HF_HOME and HF_HUB_CACHE for its cache, which timm and transformers
share, HF_TOKEN, HF_ENDPOINT for a mirror, HF_HUB_OFFLINE.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, first_line

# Whose repositories need no prefix. Others do, or every misspelt path would be asked for.
ORGANISATIONS = ("facebook", "google", "microsoft", "timm")
_PREFIX = "hf-hub:"

# Bytes of a configuration: 21,000 classes and what they mean take 3 MB.
_LARGEST = 64 << 20
# Of files of weights beside which there may be files that describe them.
ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".msgpack")
CONFIGS = ("config.json", "preprocessor_config.json")
# The first that is there is taken; of several files the index is opened.
_WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("flax_model.msgpack",),
)


def repository(name: str) -> str | None:
    """The repository that a name means, ORG/NAME or ORG/NAME@REVISION; None if it means none."""
    if name.startswith(_PREFIX):
        return name.removeprefix(_PREFIX)
    return name if name.partition("/")[0] in ORGANISATIONS else None


def weights_in(folder: Path) -> Path | None:
    """The file to open in a folder that was downloaded, or written by timm or transformers."""
    files = [folder / names[0] for names in _WEIGHTS]
    return next((file for file in files if file.is_file()), None)


def is_theirs(config: Any) -> bool:
    """Whether a config.json has the content of one of timm or transformers, and is no run's."""
    names = {"model_type", "architecture", "architectures"}
    return type(config) is dict and not names.isdisjoint(config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of timm or transformers in a folder; None if there is none, or it is a run's.

    What preprocessor_config.json says stands under "preprocessor". Raises UserError for damage.
    """
    found: dict[str, Any] = {}
    for name in ("config", "preprocessor_config"):
        file = folder / f"{name}.json"
        try:
            text = _start_of(file, _LARGEST + 1) if file.is_file() else b"{}"
            if len(text) > _LARGEST:
                raise ValueError(f"it has more than {_LARGEST:,} bytes")
            found[name] = json.loads(text)
            if type(found[name]) is not dict:
                raise ValueError("it is no JSON object")
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{file} can't be read ({e}): mend or remove it") from e
    if not is_theirs(found["config"]):
        return None
    return found["config"] | {"preprocessor": found["preprocessor_config"]}


def licence(weights: Path) -> str | None:
    """The licence of weights, by the config.json or the card beside them."""
    if weights.suffix not in (*ENDINGS, ".json"):  # What lies there too may be of other weights.
        return None
    config = read_config(weights.parent) or {}
    if named := (config.get("pretrained_cfg") or {}).get("license"):
        return str(named)
    card = weights.parent / "README.md"
    text = _start_of(card, 10_000).decode(errors="replace") if config and card.is_file() else ""
    match = re.search(r"\A---\n(?:.*\n)*?license: *(\S+)", text.partition("\n---")[0])
    return match[1] if match else None


def _start_of(file: Path, size: int) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(size)


def origin(weights: Path) -> tuple[str, str] | None:
    """(repository, commit) of a file in the library's cache; None of any other."""
    parts = weights.parts[-4:]
    if len(parts) < 4 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return None
    return parts[0].removeprefix("models--").replace("--", "/"), parts[2]


def fetch(repository: str, *, cache_dir: str | os.PathLike | None, offline: bool) -> Path:
    """The folder of a repository's weights and what describes them, downloaded if need be.

    Args:
      repository: see `repository`.
      cache_dir: where to keep it, in place of the library's own choice.
      offline: whether only what is there may be used.

    Raises UserError if there are no such weights or they can't be downloaded.
    """
    from huggingface_hub import constants, errors, snapshot_download, utils

    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    repo, _, revision = repository.partition("@")
    page = f"{constants.ENDPOINT}/{repo}"
    options: dict[str, Any] = {"cache_dir": cache_dir, "revision": revision or None}
    try:
        for names in _WEIGHTS:
            wanted = [*CONFIGS, "README.md", *names]
            folder = snapshot_download(
                repo, allow_patterns=wanted, local_files_only=offline, **options
            )
            if weights_in(Path(folder)):
                return Path(folder)
        problem = f"holds none of {', '.join(names[0] for names in _WEIGHTS)}: see {page}"
    except errors.GatedRepoError:
        problem = (
            f"is for those who accepted its terms: do so at {page}, make a token, and set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        problem = f"has no revision {revision!r}: see {page}"
    except errors.RepositoryNotFoundError:
        problem = f"is not at {page}, or is private: check the name, or set HF_TOKEN"
    except errors.LocalEntryNotFoundError as e:
        problem = f"can't be reached at {page} ({first_line(e.__cause__ or e)}): try again later"
        if offline or constants.HF_HUB_OFFLINE:
            problem = (
                "is not in the cache, and downloads are switched off: unset VIT_JAX_OFFLINE and "
                f"HF_HUB_OFFLINE, or fetch the files of {page} by hand and name their folder"
            )
    except errors.HFValidationError:
        problem = "is no name: expected ORG/NAME or ORG/NAME@REVISION"
    except Exception as e:  # Of the network or the disk.
        problem = f"can't be fetched from {page} ({first_line(e)[:300]}): try again later"
    raise UserError(f"the repository {repo} {problem}")
