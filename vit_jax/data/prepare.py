"""Writing any source as a TFDS data set of array_record files, without TensorFlow."""

import contextlib
import io
import itertools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from vit_jax.data.sources import Source, open_splits
from vit_jax.errors import UserError

_log = logging.getLogger(__name__)


def prepare_tfds(
    dataset: str,
    destination: str,
    *,
    seed: int = 0,
    data_dir: str = "",
    manual_dir: str = "",
    corrupt: str = "error",
) -> dict[str, int]:
    """Writes all splits that aren't empty into a folder, all at once or not at all.

    Images that are files stay what they are, byte by byte (each is decoded once to see that it
    can be); pixels become PNG. Classes, splits and the order of the images are kept.

    Args:
      dataset, seed, data_dir, manual_dir: see `open_splits`.
      destination: the folder to make. `open_source(destination, split)` opens it, and so does
        `tfds.builder_from_directory`.
      corrupt: "error" stops at an image that can't be read, "skip" warns and leaves it out.

    Returns:
      how many images each split has.

    Raises UserError if the destination is there already or can't be written, or the source can't be
    read.
    """
    target = os.path.abspath(os.path.expanduser(destination))
    if os.path.exists(target):
        raise UserError(f"{destination} is there already; remove it or choose another folder")
    splits = open_splits(dataset, seed, data_dir, manual_dir)
    sources = {name: opens() for name, opens in _distinct(splits)}
    parent = os.path.dirname(target)
    try:
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}.", dir=parent)
    except OSError as error:
        raise UserError(
            f"{destination}: can't be made ({error.strerror}); choose another folder"
        ) from None
    try:
        builder = _builder(sources, _dataset_name(target), temporary, corrupt)
        # TFDS would tell of the temporary folder, on stdout.
        with contextlib.redirect_stdout(io.StringIO()), _without_bars():
            builder.download_and_prepare()
        os.rename(builder.data_dir, target)
        return {name: split.num_examples for name, split in builder.info.splits.items()}
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _distinct(splits: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each split once: "test" may be another name of "validation"."""
    seen: list[Any] = []
    for name, opens in splits.items():
        if not any(opens is other for other in seen):
            seen.append(opens)
            yield name, opens


def _dataset_name(target: str) -> str:
    """A name that TFDS takes, after the folder's."""
    name = re.sub(r"\W+", "_", os.path.basename(target), flags=re.ASCII).strip("_").lower()
    return name if name[:1].isalpha() else f"images_{name}".rstrip("_")


def _builder(sources: dict[str, Source], name: str, data_dir: str, corrupt: str) -> Any:
    import tensorflow_datasets as tfds
    from rich.console import Console
    from rich.progress import track

    screen = Console(stderr=True)
    one = next(iter(sources.values()))
    classes = tfds.features.ClassLabel(names=list(one.labels))
    label = "labels" if one.multi_label else "label"
    features = {
        "image": tfds.features.Image(shape=(None, None, one.channels)),
        label: tfds.features.Sequence(classes) if one.multi_label else classes,
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"Labelled images, from {one.name}.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", label),
                disable_shuffling=True,  # The order of the source is kept.
            )

        def _split_generators(self, dl_manager):
            # TFDS takes no empty split: each has to give a first example.
            started = {s: self._generate_examples(source) for s, source in sources.items()}
            found = {
                split: track(
                    itertools.chain([first], rest),
                    split,
                    total=len(sources[split]),
                    console=screen,
                    disable=not screen.is_terminal,
                )
                for split, rest in started.items()
                if (first := next(rest, None))
            }
            if not found:
                raise UserError(f"{one.name}: no image that can be read; add some")
            return found

        def _generate_examples(self, source):
            return _examples(source, label, corrupt)

    Builder.name = name
    return Builder(data_dir=data_dir, file_format="array_record")


def _examples(source: Source, label: str, corrupt: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in range(len(source)):
        try:
            stored, ids = source.stored(index)
            pixels = source.decode(stored, index)
        except UserError as error:
            if corrupt != "skip":
                raise
            _log.warning("Skipping %s", error)
            continue
        labels = [int(i) for i in ids if i >= 0] if source.multi_label else int(ids)
        yield index, {"image": stored if isinstance(stored, bytes) else _png(pixels), label: labels}


def _png(pixels: np.ndarray) -> bytes:
    import cv2

    order = np.ascontiguousarray(pixels[..., ::-1])  # OpenCV's is blue, green, red.
    return cv2.imencode(".png", order)[1].tobytes()
