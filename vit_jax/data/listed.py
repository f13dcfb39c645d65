"""Images without labels, as many as there are: of files, folders, patterns and tables."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from vit_jax.data import image_files, tables
from vit_jax.data.preprocess import Preprocess
from vit_jax.data.source import Source
from vit_jax.errors import UserError
from vit_jax.files import expand_user, is_bucket

_BLANK = "\0"  # The key of an image of zeros: no path has this character.


def list_images(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images that a person means, in their order.

    Args:
      wanted: paths of images, folders (all images in and below them), patterns such as
        "photos/**/*.jpg", and tables (FILE.csv, FILE.tsv, FILE.jsonl) with a column of paths.

    Returns:
      (paths, notes): what was left out or guessed, in words for a person. A path by itself, or in a
      table, is not looked at: reading it tells.

    Raises UserError for a folder, a pattern or a table without images.
    """
    paths: list[str] = []
    notes: list[str] = []
    for text in wanted:
        path, left_out = expand_user(text), Counter[str]()
        found = [path]
        if not path:
            raise UserError("the path of an image is empty: is a variable of your shell not set?")
        if tables.is_table(path) and (os.path.isfile(path) or is_bucket(path)):
            found = tables.listed_images(path, notes)
        elif os.path.isdir(path):
            names = image_files.images_below(path, left_out)
            found = [os.path.join(path, name) for name in names]
        elif glob.has_magic(path) and not os.path.lexists(path):
            found = []
            for match in sorted(glob.iglob(path, recursive=True)):
                if os.path.isdir(match):
                    left_out["folders"] += "**" not in path  # Else what is in them matches, too.
                elif kind := image_files.other_kind(match):
                    left_out[kind] += 1
                else:
                    found.append(match)
        told = ", ".join(image_files.counted(+left_out))
        if not found:
            raise UserError(
                f"{text}: no images there{f' (but {told})' if told else ''}; name a folder or a "
                "pattern that has some"
            )
        notes += [f"left out of {text}: {told}"] * bool(told)
        paths += found
    return paths, notes


def unlabelled(
    paths: Sequence[str], channels: int, preprocess: Preprocess, image_size: tuple[int, int]
) -> Source:
    """A source of the images at some paths, none of which has a label.

    The last of its images is a blank one, so that there is always one that can be read; where
    preprocessing gives images no size, it is of `image_size`.
    """
    blank = preprocess.blank(channels)
    if preprocess.output_size is None:
        blank = np.zeros((*image_size, channels), blank.dtype)
    return Source(
        name="the images",
        labels=("none",),
        channels=channels,
        keys=image_files.packed([*paths, _BLANK]),
        label_ids=np.full((len(paths) + 1, 1), -1, np.int32),
        read_key=partial(_content, blank),
        describe_key=_name,
        multi_label=True,
    )


def _content(blank: np.ndarray, path: str) -> bytes | np.ndarray:
    return blank if path == _BLANK else image_files.content_below("", path)


def _name(path: str) -> str:
    return "an image of the network's size" if path == _BLANK else path
