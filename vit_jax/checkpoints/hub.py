"""The names of published checkpoints, and the cache into which they are downloaded.

Environment variables: VIT_JAX_CACHE, the folder of the cache (else XDG_CACHE_HOME/vit_jax, else
~/.cache/vit_jax); VIT_JAX_OFFLINE=1, to use only what is there; VIT_JAX_MIRROR, a base URL that
stands for https://storage.googleapis.com.
"""

import dataclasses
import difflib
import hashlib
import os
import re
import urllib.parse
from pathlib import Path

from vit_jax.checkpoints import augreg
from vit_jax.checkpoints.download import download
from vit_jax.errors import UserError
from vit_jax.files import cache_folder, has_credentials

STORE = "https://storage.googleapis.com"
AUGREG_INDEX = f"{STORE}/vit_models/augreg/index.csv"


@dataclasses.dataclass(frozen=True)
class Folder:
    """A place with checkpoints: BUCKET/FOLDER, and the names that are known to be there."""

    place: str
    names: tuple[str, ...]


# Those whose file is called by the model's name. There may be more in a folder than is known here.
FOLDERS = {
    # arXiv:2010.11929, pre-trained on ImageNet-21k at 224 pixels, with `pre_logits`.
    "imagenet21k": Folder(
        "vit_models/imagenet21k",
        ("ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16"),
    ),
    # The same, fine-tuned on ImageNet at 384 pixels, or 224 where the name says so.
    "imagenet21k+imagenet2012": Folder(
        "vit_models/imagenet21k+imagenet2012",
        (
            *("ViT-B_16", "ViT-B_16-224", "ViT-B_32"),
            *("ViT-L_16", "ViT-L_16-224", "ViT-L_32", "R50+ViT-B_16"),
        ),
    ),
    # arXiv:2106.01548 and arXiv:2203.08065, trained on ImageNet at 224 pixels.
    "sam": Folder("vit_models/sam", ("ViT-B_16", "ViT-B_32")),
    "gsam": Folder(
        "vit_models/gsam",
        ("ViT-S_16-gap-norep", "ViT-S_32-gap-norep", "ViT-B_16-gap-norep", "ViT-B_32-gap-norep"),
    ),
    # arXiv:2105.01601.
    "mixer": Folder("mixer_models/imagenet21k", ("Mixer-B_16", "Mixer-L_16")),
    "mixer/imagenet21k": Folder("mixer_models/imagenet21k", ("Mixer-B_16", "Mixer-L_16")),
    "mixer/imagenet1k": Folder("mixer_models/imagenet1k", ("Mixer-B_16", "Mixer-L_16")),
    "mixer/sam": Folder("mixer_models/sam", ("Mixer-B_16", "Mixer-B_32")),
    "mixer/gsam": Folder("mixer_models/gsam", ("Mixer-B_16", "Mixer-B_32")),
    # arXiv:2111.07991.
    "lit": Folder(
        "vit_models/lit", ("LiT-B16B", "LiT-B16B_2", "LiT-L16L", "LiT-L16S", "LiT-L16Ti")
    ),
}

# LiT models whose text tower has a SentencePiece vocabulary; the others' is a BERT word list.
_SENTENCEPIECE = ("LiT-L16S", "LiT-L16Ti")


def resolve(
    name: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    offline: bool | None = None,
) -> Path:
    """The local file or folder that a name means, downloaded if it isn't there yet.

    Args:
      name: a local path, which wins if it exists; "FOLDER/NAME" with a folder of FOLDERS;
        "augreg/MODEL" for the recommended AugReg checkpoint of a model, "augreg/FILE" for any of
        them; without a folder an AugReg model or file ("Ti_16"), or an official name ("ViT-B_16"),
        which means the paper's ImageNet-21k weights if there are any, else the recommended AugReg
        ones; a gs://, https:// or http:// address.
      cache_dir: where to keep downloads; None for the environment's choice, see above.
      offline: True forbids the network; None for the environment's choice.

    Raises UserError for an unknown name, or if it can't be downloaded.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # An address may be too long for a path; this says False then.
        return path
    if isinstance(name, os.PathLike):
        raise UserError(f"no such file: {path}")
    url = locate(name, cache_dir=cache_dir, offline=offline)
    for companion in companions(url):
        fetch(companion, cache_dir=cache_dir, offline=offline)
    return fetch(url, cache_dir=cache_dir, offline=offline)


def needs_credentials(address: str) -> bool:
    """Whether a gs:// address is to be read with the machine's credentials: not those of published
    weights, nor where there is no network, no credentials or nothing that could use them."""
    bucket = address.removeprefix("gs://").partition("/")[0]
    public = {folder.place.partition("/")[0] for folder in FOLDERS.values()}
    if bucket in public | {"big_vision"} or _is_offline():
        return False
    return has_credentials()


def locate(
    name: str, *, cache_dir: str | os.PathLike | None = None, offline: bool | None = None
) -> str:
    """The address that a name means, see `resolve`. Local files are not looked for.

    The recommended AugReg checkpoints are looked up in their table, which is downloaded for it.

    Raises UserError naming the nearest names if there is none.
    """
    scheme, _, rest = name.partition("://")
    if scheme in ("https", "http") and rest:
        return urllib.parse.quote(name, safe=":/?#[]@!$&'()*+,;=%~")
    if scheme == "gs":
        bucket, _, key = rest.partition("/")
        if not bucket or not key or key.endswith("/"):
            raise UserError(f"{name} names no file: expected gs://BUCKET/FILE")
        return _store_url(rest)

    folder, _, stem = name.removesuffix(".npz").rpartition("/")
    if not folder and name.endswith(".npz"):
        raise UserError(f"no such file: {name}")
    if not folder:
        folder, stem = _home(stem)
    if folder == "augreg" and stem:
        if stem in augreg.MODELS:
            index = fetch(AUGREG_INDEX, cache_dir=cache_dir, offline=offline)
            stem = augreg.recommended(augreg.read_index(index), stem)
        if augreg.is_file_name(stem):
            return _store_url(f"vit_models/augreg/{stem}.npz")
    elif folder in FOLDERS and re.fullmatch(r"[\w.+-]*\w", stem):
        return _store_url(f"{FOLDERS[folder].place}/{stem}.npz")
    known = {n.rpartition("/")[2]: n for n in reversed(names())} | {n: n for n in names()}
    near = [known[n] for n in difflib.get_close_matches(name, known, n=3, cutoff=0.6)]
    near = list(dict.fromkeys(near))
    hint = f"did you mean {' or '.join(near)}?" if near else "vit-jax models lists them"
    raise UserError(f"no such file: {name}, and no published weights of that name; {hint}")


def _home(stem: str) -> tuple[str, str]:
    """(folder, name) of a name that was given without a folder."""
    for folder in ("imagenet21k", "mixer", "lit"):
        if stem in FOLDERS[folder].names:
            return folder, stem
    if augreg.model_of(stem) in augreg.MODELS:
        return "augreg", augreg.model_of(stem)
    return ("augreg" if augreg.is_file_name(stem) else ""), stem


def names() -> list[str]:
    """Every name with a folder that is known to be published, AugReg's single files left out."""
    listed = [f"{folder}/{name}" for folder, f in FOLDERS.items() for name in f.names]
    return [f"augreg/{model}" for model in augreg.MODELS] + listed


def sources(model: str) -> list[str]:
    """The names under which weights of an official model are published, e.g. of "ViT-B_16"."""
    listed = [
        name
        for name in names()
        # "mixer" alone is short for one of its sub-folders; "-224" is an image size.
        if not name.startswith("augreg/")
        and name.rpartition("/")[2].removesuffix("-224") == model
        and name.rpartition("/")[0] != "mixer/imagenet21k"
    ]
    short = augreg.model_of(model)
    return ([f"augreg/{short}"] if short in augreg.MODELS else []) + listed


def companions(url: str) -> tuple[str, ...]:
    """Addresses of the files that have to lie beside a checkpoint: a LiT bundle's vocabulary."""
    match = re.fullmatch(re.escape(f"{STORE}/vit_models/lit/") + r"(.+)\.npz", url)
    if not match:
        return ()
    ending = "model" if match[1] in _SENTENCEPIECE else "txt"
    return (f"{STORE}/vit_models/lit/{match[1]}.{ending}",)


def fetch(
    url: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    offline: bool | None = None,
    attempts: int | None = None,
    timeout: float | None = None,
) -> Path:
    """The cached copy of an address, downloaded if it isn't there yet.

    Published files don't change, so that a cached one is never asked for again: remove it to get it
    anew.

    Args:
      url: https or http.
      cache_dir, offline: see `resolve`.
      attempts, timeout: see `download.download`.

    Raises UserError if it isn't there and can't be downloaded.
    """
    path = cache_path(url, cache_dir)
    if path.is_file():
        return path
    url = _mirrored(url)
    if _is_offline() if offline is None else offline:
        raise UserError(
            f"{path.name} is not in the cache, and downloads are switched off: fetch {url} by hand "
            f"and save it as {path}, or unset VIT_JAX_OFFLINE"
        )
    download(url, path, attempts=attempts, timeout=timeout)
    return path


def cache_path(url: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Where the copy of an address is kept: HOST/PATH below the cache's folder.

    Raises UserError if the address names no file.
    """
    try:
        address = urllib.parse.urlsplit(url)
    except ValueError as e:
        raise UserError(f"{url} names no file ({e}): expected https://HOST/FILE") from e
    host = address.netloc if address.scheme == "https" else f"{address.scheme}:{address.netloc}"
    parts = [urllib.parse.unquote(part) for part in address.path.split("/") if part]
    if not address.netloc or not parts or address.path.endswith("/"):
        raise UserError(f"{url} names no file: expected https://HOST/FILE")
    parts = [_safe(part) for part in (host, *parts)]
    if address.query:
        # What makes two files of one path; before the ending, which says how to read it.
        mark = hashlib.sha256(address.query.encode()).hexdigest()[:8]
        last = Path(parts[-1])
        parts[-1] = f"{last.stem}-{mark}{last.suffix}"
    return cache_folder(cache_dir).joinpath(*parts)


def _safe(part: str) -> str:
    """A part of a path as a name that is harmless on every file system."""
    text = urllib.parse.quote(part, safe="+=@,~")
    if text in (".", ".."):
        raise UserError(f"{part!r} in an address names no file: write the address without it")
    if len(text) <= 200:
        return text
    suffix = Path(text).suffix[-10:]
    return f"{text[:150]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"


def _store_url(place: str) -> str:
    return f"{STORE}/{urllib.parse.quote(place, safe='/+=@,~')}"


def _mirrored(url: str) -> str:
    mirror = os.environ.get("VIT_JAX_MIRROR", "").rstrip("/")
    if not mirror or not url.startswith(f"{STORE}/"):
        return url
    if not mirror.startswith(("https://", "http://")):
        raise UserError(f"VIT_JAX_MIRROR is {mirror!r}, expected an https:// or http:// address")
    return mirror + url.removeprefix(STORE)


def _is_offline() -> bool:
    return os.environ.get("VIT_JAX_OFFLINE", "").lower() not in ("", "0", "false", "no")
