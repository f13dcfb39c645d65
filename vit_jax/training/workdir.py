"""The folder of a run: made once, gone on with only by the same configuration."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax.checkpoints import atomic_file
from vit_jax.errors import UserError
from vit_jax.training.config import config_from_json, config_to_json, differing_fields

CONFIG = "config.json"
PICTURES = "data.json"  # Fingerprints of the pictures, by what they are for.


def open_workdir(path: str | os.PathLike, config: ConfigDict) -> Path:
    """Makes the folder of a run, or checks that the run in it has this configuration.

    Raises UserError if it can't be made, or holds a run of another configuration: then the fields
    that differ are named and nothing is changed.
    """
    workdir = Path(path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError as e:
        raise UserError(f"the workdir {workdir} is a file: choose a folder") from e
    except OSError as e:
        raise UserError(
            f"can't make the workdir {workdir}: {e.strerror}: choose another place"
        ) from e
    if (workdir / CONFIG).exists():
        differing = differing_fields(read_config(workdir), config)
        if differing:
            raise UserError(
                f"{workdir} holds a run of another configuration ({'; '.join(differing)}): "
                "choose another workdir, or the same fields as then"
            )
    if not os.access(workdir, os.W_OK):
        raise UserError(f"the workdir {workdir} can't be written: choose another place")
    return workdir


def claim_workdir(workdir: Path, config: ConfigDict, fingerprints: Mapping[str, str]) -> None:
    """Writes down whose folder this is and on which pictures, or checks that these are the same.

    Not before a run is about to begin: a mistake found earlier must not bar the folder to the same
    command without the mistake.

    Args:
      workdir, config: see `open_workdir`.
      fingerprints: of the pictures, {"train": ..., "test": ...}.

    Raises UserError if the files can't be written, or the pictures are not those of the run's
    beginning: it could not go on as if it had not stopped.
    """
    if (workdir / CONFIG).exists():
        try:
            before = json.loads((workdir / PICTURES).read_text())
        except (OSError, ValueError) as e:
            raise UserError(f"{workdir / PICTURES} can't be read: choose another workdir") from e
        changed = [name for name in fingerprints if before.get(name) != fingerprints[name]]
        if changed:
            raise UserError(
                f"the {' and '.join(changed)} pictures of {config.dataset} have changed since the "
                f"run in {workdir} began: put them back as they were, or choose another workdir"
            )
        return
    try:
        # The configuration last: it is what makes a folder a run's.
        with atomic_file(workdir / PICTURES) as out:
            out.write(json.dumps(dict(fingerprints), indent=1).encode() + b"\n")
        with atomic_file(workdir / CONFIG) as out:
            out.write(config_to_json(config).encode())
    except OSError as e:
        raise UserError(
            f"can't write in the workdir {workdir}: {e.strerror}: choose another place"
        ) from e


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
