"""The folder of a run: made once, gone on with only by the same configuration."""

import contextlib
import fcntl
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.files import atomic_write
from vit_jax.pretrained import WEIGHTS
from vit_jax.training.config import config_from_json, config_to_json, differing_fields

CONFIG = "config.json"  # What makes a folder a run's.
GIVEN = " (given in Python)"  # Ends the name of images that no name opens again.
IMAGES = "data.json"  # Fingerprints of the images, by what they are for.
LOCK = "lock"  # Held while a run goes on; names its process and host.
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
BEST_WEIGHTS = "weights_best.npz"
REPORT = "report.png"
PAGE = "report.html"

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike, config: ConfigDict) -> Iterator[Path]:
    """The folder of a run, made if it isn't there, and locked until the block ends.

    If the block ends before `claim_workdir`, nothing of this is left.

    Raises UserError if it is no folder, can't be made or written, another process trains in it, or
    it holds what another run left: then the fields that differ are named and nothing is changed.
    """
    if re.match(r"\w+:/", str(path)):
        raise UserError(
            f"the workdir {path} is no folder: mount the bucket (e.g. with gcsfuse) and name its "
            "folder here"
        )
    workdir = Path(path)
    made = [p for p in (workdir, *workdir.parents) if not os.path.exists(p)]
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
        with contextlib.suppress(OSError):  # Most often: they are no longer empty.
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes out. The system lets go of the lock however the process ends."""
    path = workdir / LOCK
    try:
        file = path.open("a+")
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
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        with contextlib.suppress(OSError):  # For `lock_holder` on other hosts; not all systems can.
            os.fsync(file.fileno())
        try:
            yield
        finally:
            if not (workdir / CONFIG).exists():
                path.unlink(missing_ok=True)


def check_named(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Raises UserError if the images of a run have no name by which to open them again."""
    if config.dataset.endswith(GIVEN):
        raise UserError(
            f"{workdir}: its images were given in Python and can't be opened again: the run "
            f"itself writes {PAGE} at its end; or give vit-jax evaluate a folder of images"
        )


def lock_holder(workdir: Path) -> str | None:
    """The process that trains in a folder as this host sees it, or did last; None for none."""
    try:
        return (workdir / LOCK).read_text().strip()
    except OSError:
        return None


def _check(workdir: Path, config: ConfigDict) -> None:
    if (workdir / CONFIG).exists():
        differing = differing_fields(read_config(workdir), config)
        if differing:
            raise UserError(
                f"{workdir} holds a run of another configuration ({'; '.join(differing)}): "
                "choose another workdir, or the same fields as then"
            )
        return
    results = (METRICS, CHECKPOINTS, WEIGHTS, BEST_WEIGHTS, REPORT, PAGE)
    if found := [name for name in results if (workdir / name).exists()]:
        raise UserError(
            f"{workdir} holds {', '.join(found)} but no {CONFIG}, and a run would overwrite that: "
            "choose another workdir"
        )


def claim_workdir(workdir: Path, config: ConfigDict, fingerprints: Mapping[str, str]) -> None:
    """Writes down whose folder this is and on which images, or checks that these are the same.

    Not before a run is about to begin: a mistake found earlier must not bar the folder to the same
    command without the mistake.

    Args:
      workdir, config: see `open_workdir`.
      fingerprints: of the images, {"train": ..., "test": ...}.

    Raises UserError if the files can't be written, or the images are not those of the run's
    beginning: it could not go on as if it had not stopped.
    """
    begun = (workdir / CONFIG).exists()
    if begun:
        try:
            before = json.loads((workdir / IMAGES).read_text())
            changed = [name for name in fingerprints if before.get(name) != fingerprints[name]]
        except (OSError, ValueError, AttributeError):
            _log.warning(
                "%s is lost or damaged and is written anew: whether these are the images that "
                "the run began with can't be checked",
                workdir / IMAGES,
            )
        else:
            if changed:
                raise UserError(
                    f"the {' and '.join(changed)} images of {config.dataset} have changed since "
                    f"the run in {workdir} began: put them back as they were, or choose another "
                    "workdir"
                )
            return
    with atomic_write(workdir / IMAGES) as out:
        out.write(json.dumps(dict(fingerprints), indent=1).encode() + b"\n")
    if not begun:  # Last: it is what makes a folder a run's.
        with atomic_write(workdir / CONFIG) as out:
            out.write(config_to_json(config).encode())


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The configuration of the run in a folder. Raises UserError if there is none or it is
    damaged."""
    file = Path(workdir) / CONFIG
    try:
        return config_from_json(file.read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{workdir} is no workdir of a training run: it holds no {CONFIG}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is damaged ({e}): choose another workdir") from e
