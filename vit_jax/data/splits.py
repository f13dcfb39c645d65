"""Data sets by name or path, their splits, and parts of splits.

To add a kind of source, write a function that gives `{split name: function that opens it}`, and
call it in `open_splits`.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

import numpy as np

from vit_jax.buckets import local_copy
from vit_jax.data import arrays, image_files, tables, tfds
from vit_jax.data.source import Source, Splits, remarks
from vit_jax.errors import UserError
from vit_jax.files import as_path, expand_user, is_bucket, list_folder

# By which the kind of a folder is known.
SAVED = {"dataset_dict.json", "state.json"}
_log = logging.getLogger(__name__)
PREPARED = re.compile(r"dataset_info\.json|\d+\.\d+\.\d+")


def open_source(
    dataset: str, split: str, *, seed: int = 0, data_dir: str = "", manual_dir: str = ""
) -> Source:
    """Opens a part of a data set.

    Args:
      dataset: see `open_splits`.
      split: "train", "test", "train[:98%]", "train[100:200]", "even_splits(train, 4)[0]",
        "train+test", ... Percentages are rounded to the nearest image, so "train[:98%]" and
        "train[98%:]" share none and miss none.
      seed, data_dir, manual_dir: see `open_splits`.

    Raises:
      UserError: unknown data set or split, or one that isn't as `open_splits` says.
    """
    splits = open_splits(dataset, seed, data_dir, manual_dir)
    opened: dict[str, Source] = {}
    chosen = [_open_part(dataset, part, split, splits, opened) for part in split.split("+")]
    if len(chosen) == 1:
        return chosen[0]
    ids = [source.label_ids for source in chosen if source.label_ids is not None]
    return replace(
        chosen[0],
        keys=[key for source in chosen for key in source.keys],
        label_ids=np.concatenate(ids) if ids else None,
        notes=tuple(dict.fromkeys(text for source in chosen for text in source.notes)),
        doubts=tuple(dict.fromkeys(text for source in chosen for text in source.doubts)),
    )


def open_splits(dataset: str, seed: int = 0, data_dir: str = "", manual_dir: str = "") -> Splits:
    """The splits of a data set by name, each to be opened by a call.

    "test" is also there where only "validation" or "val" is.

    Args:
      dataset: "digits"; a folder DIR/{train,test}/<class>/* or DIR/<class>/*; a table FILE.csv,
        FILE.tsv or FILE.jsonl, or a folder with train.csv and test.csv; a TFDS name such as
        "cifar10" or "name/config:version", or the folder of a prepared TFDS data set; FILE.npz; a
        folder that Hugging Face's `save_to_disk` wrote.
      seed: chooses the fifth that becomes the test split of what has no splits of its own.
      data_dir: where TFDS keeps its data sets, by default ~/tensorflow_datasets.
      manual_dir: where TFDS finds what had to be downloaded by hand.
    """
    path = expand_user(dataset)
    if is_bucket(dataset):
        splits = _bucket_splits(dataset, seed)
    elif is_known(dataset):
        splits = _digits()
    elif path.lower().endswith(".npz") and os.path.isfile(path):
        splits = arrays.array_splits(dataset, seed)
    elif tables.is_table(path) and os.path.isfile(path):
        splits = tables.table_splits(dataset, seed)
    elif os.path.isdir(path):
        try:
            names = set(os.listdir(path))
        except OSError as error:
            raise UserError(f"{dataset}: can't be opened ({error.strerror})") from None
        if names & SAVED:
            splits = arrays.saved_splits(dataset, seed)
        elif any(PREPARED.fullmatch(name) for name in names):
            splits = tfds.prepared_splits(dataset)
        elif tables.split_tables(names):
            splits = tables.table_splits(dataset, seed)
        else:
            splits = image_files.folder_splits(dataset, seed)
    elif os.path.exists(path):
        raise UserError(
            f"{dataset}: can't be opened, expected a folder, {', '.join(tables.TABLES)} or .npz; "
            "give one of them"
        )
    elif re.fullmatch(r"[a-zA-Z]\w*(/[\w.+-]+)?(:\d+\.\d+\.\d+)?", dataset):
        splits = tfds.named_splits(dataset, data_dir, manual_dir)
    else:
        raise tfds.unknown_dataset(dataset, ())
    held_out = [name for name in ("validation", "val") if name in splits]
    if held_out:
        splits.setdefault("test", splits[held_out[0]])
    return splits


def _bucket_splits(dataset: str, seed: int) -> Splits:
    """Of a bucket, images of a table are read one by one; large files are copied here."""
    path, names = as_path(dataset), set()
    with contextlib.suppress(FileNotFoundError):
        names |= set(list_folder(dataset))
    if tables.is_table(dataset) or tables.split_tables(names):
        return tables.table_splits(dataset, seed)
    if path.suffix.lower() == ".npz":
        return arrays.array_splits(str(local_copy(dataset)), seed)
    if names & SAVED:
        return arrays.saved_splits(str(local_copy(dataset)), seed)
    if any(PREPARED.fullmatch(name) for name in names):
        return tfds.prepared_splits(dataset)
    found = f"holds {', '.join(sorted(names)[:3])}" if names else "is not there"
    raise UserError(
        f"{dataset} {found}: of buckets, tables (.csv, .tsv, .jsonl), .npz files and prepared data "
        "sets are read; write a table of the images, or prepare them with vit-jax data prepare"
    )


def open_all(
    dataset: str, seed: int = 0, data_dir: str = "", manual_dir: str = ""
) -> dict[str, Source]:
    """Every split, once: "test" may be another name of "validation". Args: as `open_splits`."""
    names: dict[Callable[[], Source], str] = {}
    for name, opens in open_splits(dataset, seed, data_dir, manual_dir).items():
        names.setdefault(opens, name)
    return {name: opens() for opens, name in names.items()}


def prepare_tfds(
    dataset: str,
    destination: str,
    *,
    seed: int = 0,
    data_dir: str = "",
    manual_dir: str = "",
    corrupt: str = "error",
) -> dict[str, int]:
    """Writes all splits that aren't empty into a folder, as a TFDS data set of array_record files.

    Images that are files stay what they are, byte by byte (each is decoded once to see that it
    can be); pixels become PNG. Classes, splits and the order of the images are kept. The folder is
    there when all is written, and never half.

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
    if os.path.exists(os.path.expanduser(destination)):
        raise UserError(f"{destination} is there already; remove it or choose another folder")
    sources = open_all(dataset, seed, data_dir, manual_dir)
    for text in remarks(*sources.values()):
        _log.warning("%s: %s", dataset, text)
    return tfds.write_splits(sources, destination, corrupt)


def is_known(dataset: str) -> bool:
    """Whether a data set is known by this name, so that it isn't a folder."""
    return dataset == "digits"


def _digits() -> Splits:
    """The digits that come with the package; see digits.md."""
    path = resources.files("vit_jax.data") / "digits.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
        images, labels, test = found["images"], found["labels"], found["test"]
    pixels = np.round(images * (255 / 16)).astype(np.uint8)[..., None]
    pixels.setflags(write=False)
    whole = Source(
        name="digits",
        labels=tuple("0123456789"),
        channels=1,
        keys=range(len(pixels)),
        label_ids=labels.astype(np.int32),
        read_key=pixels.__getitem__,
        describe_key="digits[{}]".format,
    )
    return {
        "train": lambda: whole.take(np.flatnonzero(~test)),
        "test": lambda: whole.take(np.flatnonzero(test)),
    }


_SLICE = r"(\w+)\s*(?:\[\s*(?:(-?\d{1,18})(%?))?\s*:\s*(?:(-?\d{1,18})(%?))?\s*\])?"
_PART = re.compile(rf"\s*{_SLICE}\s*")
_EVEN = re.compile(rf"\s*even_splits\(\s*({_SLICE})\s*,\s*(\d{{1,9}})\s*\)\s*\[(\d{{1,9}})\]\s*")


def _open_part(
    dataset: str, text: str, split: str, splits: Splits, opened: dict[str, Source]
) -> Source:
    """The part of a split that `text`, one summand of `split`, names; `opened` is kept up."""
    even = _EVEN.fullmatch(text)
    part = _PART.fullmatch(even[1] if even else text)
    count, place = (int(even[7]), int(even[8])) if even else (1, 0)
    known, first = ", ".join(map(repr, splits)), next(iter(splits))
    if part and part[1] in ("train", "test") and part[1] not in splits:
        is_folder = os.path.isdir(os.path.expanduser(dataset))
        missing = f"the folder {os.path.join(dataset, part[1])}" if is_folder else "them"
        raise UserError(
            f"{dataset} has no {part[1]!r} images, only {known}: add {missing}, or choose splits "
            f"of what is there, like '{first}[:80%]' to train on and '{first}[80%:]' to test on"
        )
    if part is None or part[1] not in splits or place >= count:
        raise UserError(
            f"unknown split {split!r}: {dataset} has {known}; parts are written like "
            "'train[:98%]', 'train[100:200]' or 'even_splits(train, 4)[0]', sums like "
            "'train[:10%]+train[90%:]'"
        )
    if part[1] not in opened:
        opened[part[1]] = source = splits[part[1]]()
        own = next(name for name, opens in splits.items() if opens is splits[part[1]])
        if own != part[1]:
            note = f"no test split of its own: the split {own} is taken for it"
            opened[part[1]] = replace(source, notes=(*source.notes, note))
    whole = opened[part[1]]
    start, stop = (_boundary(part[i], part[i + 1], len(whole)) for i in (2, 4))
    indices = range(len(whole))[start:stop]
    # As TFDS cuts them: of what can't be shared out evenly, the first parts get one more each.
    share, more = divmod(len(indices), count)
    begin = place * share + min(place, more)
    indices = indices[begin : begin + share + (place < more)]
    # Of a folder with an image or two a class there is nothing to hold out, nor to miss.
    if not indices and ("+" not in split or len(whole)):
        raise UserError(
            f"split {text.strip()!r} is empty: {part[1]!r} has {len(whole)} images; "
            "choose a larger part, or add images"
        )
    return whole.take(indices) if len(indices) < len(whole) else whole


def _boundary(number: str | None, percent: str | None, length: int) -> int | None:
    if number is None:
        return None
    return round(int(number) * length / 100) if percent else int(number)
