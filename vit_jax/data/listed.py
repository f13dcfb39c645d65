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

BLANK = ""  # The key of an image of zeros, which can always be read.


def list_images(wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images that a person means, in their order.

    Args:
      wanted: paths of images, folders (all images in and below them), patterns such as
        "photos/**/*.jpg", and tables (FILE.csv, FILE.tsv, FILE.jsonl) with a column of paths.

    Returns:
      (paths, notes): what was left out or guessed, in words for a person. A path by itself is not
      looked at: reading it tells.

    Raises UserError for a folder, a pattern or a table without images.
    """
    paths: list[str] = []
    notes: list[str] = []
    for text in wanted:
        path = expand_user(text)
        found = [path]
        if tables.is_table(path) and (os.path.isfile(path) or is_bucket(path)):
            found = tables.listed_images(path, notes)
        elif os.path.isdir(path):
            left_out: Counter[str] = Counter()
            names = image_files.images_below(path, left_out)
            found = [os.path.join(path, name) for name in names]
            if left_out:
                notes.append(f"left out in {text}: {', '.join(image_files.counted(left_out))}")
        elif glob.has_magic(path) and not os.path.lexists(path):
            found = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
        if not found:
            raise UserError(f"{text}: no images there: name a folder or a pattern that has some")
        paths += found
    return paths, notes


def unlabelled(paths: Sequence[str], channels: int, preprocess: Preprocess) -> Source:
    """A source of the images at some paths, none of which has a label.

    The last of its images is a blank one, so that there is always one that can be read.
    """
    blank = preprocess.blank(channels)
    return Source(
        name="the images",
        labels=("none",),
        channels=channels,
        keys=image_files.packed([*paths, BLANK]),
        label_ids=np.full((len(paths) + 1, 1), -1, np.int32),
        read_key=partial(_content, blank),
        describe_key=str,
        multi_label=True,
    )


def _content(blank: np.ndarray, path: str) -> bytes | np.ndarray:
    return blank if path == BLANK else image_files.content_below("", path)
