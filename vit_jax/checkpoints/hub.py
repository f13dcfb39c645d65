"""The names of published checkpoints, and the cache into which they are downloaded.

Environment variables: VIT_JAX_CACHE, the folder of the cache (else XDG_CACHE_HOME/vit_jax, else
~/.cache/vit_jax); VIT_JAX_OFFLINE=1, to use only what is there; VIT_JAX_MIRROR, a base URL that
stands for https://storage.googleapis.com.
"""

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import tomllib
import urllib.parse
from importlib import resources
from pathlib import Path

from vit_jax.checkpoints import augreg, huggingface
from vit_jax.errors import AbsentError, UserError
from vit_jax.files import cache_folder, has_credentials

STORE = "https://storage.googleapis.com"
AUGREG_INDEX = f"{STORE}/vit_models/augreg/index.csv"
# The names of ImageNet-21k's classes that the original prints, one a line.
IMAGENET21K = f"{STORE}/bit_models/imagenet21k_wordnet_lemmas.txt"
_TEXT = 256 << 20  # Bytes that such a file may have.

_DATA = resources.files("vit_jax.checkpoints")
_FOLDERS = tomllib.loads((_DATA / "published.toml").read_text("utf-8"))
_TIMM: dict[str, str] = _FOLDERS.pop("timm")  # Names of timm's, and ours of the same weights.

_log = logging.getLogger(__name__)


def resolve(
    name: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    offline: bool | None = None,
) -> Path:
    """The local file or folder that a name means, downloaded if it isn't there yet.

    Args:
      name: a local path, which wins if it exists; "FOLDER/NAME" with a folder of published.toml;
        "augreg/MODEL" for the recommended AugReg checkpoint of a model, "augreg/FILE" for any of
        them; without a folder an AugReg model or file ("Ti_16"), or an official name ("ViT-B_16"),
        which means the paper's ImageNet-21k weights if there are any, else the recommended AugReg
        ones; a repository of huggingface.co, "timm/NAME", "facebook/NAME" or "hf-hub:ORG/NAME"; a
        gs://, https:// or http:// address. Beside weights of PyTorch's their config.json and
        preprocessor_config.json are fetched, too, if there are any.
      cache_dir: where to keep downloads; None for the environment's choice, see above.
      offline: True forbids the network; None for the environment's choice.

    Raises UserError for an unknown name, or if it can't be downloaded.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # An address may be too long for a path; this says False then.
        return path
    if isinstance(name, os.PathLike):
        raise UserError(f"no such file: {path}")
    same = _TIMM.get(name.removeprefix("timm/")) if name.startswith("timm/") else None
    if same:
        _log.warning(
            "%s are Google's %s, which are taken; hf-hub:%s is timm's copy", *(name, same), name
        )
        name = same
    if found := huggingface.repository(name):
        return huggingface.fetch(found, cache_dir=cache_dir, offline=_is_offline(offline))
    url = url_for(name, cache_dir=cache_dir, offline=offline)
    sidecars = sidecar_files(url)
    new = not os.path.isfile(cache_path(url, cache_dir))
    if new and cache_path(url).suffix in huggingface.ENDINGS and not _is_offline(offline):
        for file in huggingface.CONFIGS:
            beside = urllib.parse.urljoin(url, file)
            if not os.path.isfile(cache_path(beside, cache_dir)):
                with contextlib.suppress(AbsentError):
                    _drop_page(fetch(beside, cache_dir=cache_dir, offline=offline), beside)
    try:
        path = fetch(url, cache_dir=cache_dir, offline=offline)
    except UserError as e:
        raise UserError(f"{e}{''.join(f'; beside it belongs {file}' for file in sidecars)}") from e
    for file in sidecars:
        fetch(file, cache_dir=cache_dir, offline=offline)
    return path


def _drop_page(file: Path, url: str) -> None:
    """Removes a .json that nobody asked for if it is none: some servers answer with a page that
    they have no such file."""
    try:
        is_json = type(json.loads(file.read_bytes())) is dict
    except (ValueError, RecursionError):
        is_json = False
    if not is_json:
        file.unlink(missing_ok=True)
        _log.warning("%s gives no JSON object and is left out", url)


def needs_credentials(address: str) -> bool:
    """Whether a gs:// address is to be read with the machine's credentials: not those of published
    weights, nor where there is no network, no credentials or nothing that could use them."""
    bucket = address.removeprefix("gs://").partition("/")[0]
    public = {folder["place"].partition("/")[0] for folder in _FOLDERS.values()}
    if bucket in public or _is_offline():
        return False
    return has_credentials()


def url_for(
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
    stem = stem.removesuffix(_FOLDERS.get(folder, {}).get("ending", ".npz"))
    if not folder and name.endswith(".npz"):
        raise UserError(f"no such file: {name}")
    if not folder:
        folder, stem = _default_collection(stem)
    if folder == "augreg" and stem:
        model, _, adapted_to = stem.partition("+")
        if model in augreg.MODELS:
            try:
                rows = augreg.read_index(fetch(AUGREG_INDEX, cache_dir=cache_dir, offline=offline))
            except UserError as e:
                if adapted_to or model not in augreg.RECOMMENDED:
                    raise
                place = _store_url(f"vit_models/augreg/{augreg.RECOMMENDED[model]}.npz")
                raise UserError(
                    f"to use {name} without a network, fetch {place} by hand and give its path; "
                    f"its name is looked up in a table, and {e}"
                ) from e
            if adapted_to:
                stem = str(augreg.best_adapted(rows, model, adapted_to)["adapt_filename"])
            else:
                stem = augreg.recommended(rows, model)
            stem = stem.removesuffix(".npz")
        if augreg.is_file_name(stem):
            return _store_url(f"vit_models/augreg/{stem}.npz")
    elif folder in _FOLDERS and re.fullmatch(r"[\w.+-]*\w", stem):
        found = _FOLDERS[folder]
        files = found["names"] if isinstance(found["names"], dict) else {}
        file = f"{found['place']}/{files.get(stem, stem)}{found.get('ending', '.npz')}"
        return _url(found.get("site", STORE), file)
    known = {n.rpartition("/")[2]: n for n in reversed(names())} | {n: n for n in names()}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    near = list(dict.fromkeys(known[n] for n in close))
    hint = f"did you mean {' or '.join(near)}?" if near else "vit-jax models lists them"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not near:
        hint += f", and one of huggingface.co would be hf-hub:{name}"
    raise UserError(f"no such file: {name}, and no published weights of that name; {hint}")


def _default_collection(stem: str) -> tuple[str, str]:
    """(folder, name) of a name that was given without a folder."""
    for folder in ("imagenet21k", "mixer", "lit"):
        if stem in _FOLDERS[folder]["names"]:
            return folder, stem
    if augreg.model_of(stem) in augreg.MODELS:
        return "augreg", augreg.model_of(stem)
    return ("augreg" if augreg.is_file_name(stem) else ""), stem


def names() -> list[str]:
    """Every name with a folder that is known to be published, AugReg's single files left out."""
    listed = [f"{folder}/{name}" for folder, f in _FOLDERS.items() for name in f["names"]]
    return [f"augreg/{model}" for model in augreg.MODELS] + listed


def sources(model: str) -> list[str]:
    """The names under which weights of an official model are published, e.g. of "ViT-B_16"."""
    short = augreg.model_of(model)
    listed = [f"augreg/{short}"] if short in augreg.MODELS else []
    for name in names():
        folder, _, stem = name.rpartition("/")
        # What ends a name is an image size; the folder left out is "mixer" too.
        if re.sub(r"-(224|384)$", "", stem) == model and folder not in (
            "augreg",
            "mixer/imagenet21k",
        ):
            listed.append(name)
    return listed


def origin(weights: Path) -> str | None:
    """Where a file was downloaded from, if it lies in a cache."""
    if found := huggingface.origin(weights):
        return f"huggingface.co/{found[0]}, commit {found[1]}"
    try:
        host, *rest = weights.relative_to(cache_folder()).parts
    except ValueError:
        return None
    return f"https://{host}/{'/'.join(rest)}" if rest and "%" not in host else None


def other_names(weights: Path) -> list[str]:
    """Under which other names the same weights are known, here and in timm."""
    place, config = origin(weights), huggingface.read_config(weights.parent) or {}
    tag = (config.get("pretrained_cfg") or {}).get("tag")
    timm = f"{config.get('architecture')}.{tag}"
    found = [f"timm/{name}" for name, same in _TIMM.items() if place == url_for(same)]
    return found + ([f"timm/{timm}"] if tag else []) + ([_TIMM[timm]] if timm in _TIMM else [])


def sidecar_files(url: str) -> tuple[str, ...]:
    """Addresses of the files that have to lie beside a checkpoint: a LiT bundle's vocabulary."""
    lit = _FOLDERS["lit"]
    match = re.fullmatch(re.escape(f"{STORE}/{lit['place']}/") + r"(.+)\.npz", url)
    if not match:
        return ()
    ending = "model" if match[1] in lit["sentencepiece"] else "txt"
    return (f"{url.removesuffix('npz')}{ending}",)


def fetch(
    url: str,
    *,
    cache_dir: str | os.PathLike | None = None,
    offline: bool | None = None,
    attempts: int | None = None,
    timeout: float | None = None,
) -> Path:
    """The cached copy of an address, downloaded if it isn't there yet.

    Published files don't change: a cached one is never asked for again; remove it to get it anew.

    Args:
      url: https or http.
      cache_dir, offline: see `resolve`.
      attempts, timeout: see `download.download`.

    Raises UserError if it isn't there and can't be downloaded.
    """
    path = cache_path(url, cache_dir)
    if os.path.isfile(path):
        return path
    mirror = os.environ.get("VIT_JAX_MIRROR", "").rstrip("/")
    if mirror and url.startswith(f"{STORE}/"):
        if not mirror.startswith(("https://", "http://")):
            raise UserError(
                f"VIT_JAX_MIRROR is {mirror!r}, expected an https:// or http:// address"
            )
        url = mirror + url.removeprefix(STORE)
    if _is_offline(offline):
        raise UserError(
            f"{path.name} is not in the cache, and downloads are switched off: fetch {url} by hand "
            f"and save it as {path}, or unset VIT_JAX_OFFLINE"
        )
    from vit_jax.checkpoints.download import download  # Slow to import.

    # Tables, words, configurations: a few megabytes.
    is_text = path.suffix in (".csv", ".txt", ".model", ".json")
    download(url, path, attempts=attempts, timeout=timeout, limit=_TEXT if is_text else None)
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
    return _url(STORE, place)


def _url(site: str, place: str) -> str:
    return f"{site}/{urllib.parse.quote(place, safe='/+=@,~')}"


def class_names(num_classes: int | None) -> tuple[str, ...] | None:
    """The names of a published head's classes, in the order of its outputs.

    Those of ImageNet come with the package. Those of ImageNet-21k are downloaded once; where that
    fails the log says so, and there are no names, which is no reason not to use the weights.

    Args:
      num_classes: the width of the head, or None.

    Returns:
      one name a class, all words of its WordNet synset: "tench, Tinca tinca"; or None for other
      heads.
    """
    if num_classes not in (1_000, 21_843):
        return None
    try:
        if num_classes == 1_000:
            text = (_DATA / "imagenet_labels.txt").read_text("utf-8")
        else:
            # One quick try: whoever loads a local file may not even have a network.
            text = fetch(IMAGENET21K, attempts=1, timeout=5).read_text("utf-8")
        found = tuple(line.strip().replace("_", " ") for line in text.splitlines())
        if len(found) != num_classes:
            raise UserError(
                f"{cache_path(IMAGENET21K)} has {len(found)} lines, expected {num_classes}: remove "
                "it, and it is fetched again"
            )
    except (UserError, OSError, UnicodeDecodeError) as e:
        _log.warning("the classes of ImageNet-21k go without names: %s", e)
        return None
    return found


def _is_offline(wish: bool | None = None) -> bool:
    if wish is not None:
        return wish
    return os.environ.get("VIT_JAX_OFFLINE", "").lower() not in ("", "0", "false", "no")
