"""TensorFlow Datasets, read and written without TensorFlow.

Images are left encoded and decoded by us, and labels are read with them: opening a data set reads
none of its examples.
"""

import contextlib
import difflib
import importlib.util
import io
import itertools
import logging
import mmap
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from vit_jax.buckets import local_copy
from vit_jax.data.source import Numbering, Source, Splits, numbered_classes
from vit_jax.errors import UserError
from vit_jax.files import is_bucket, list_folder

_log = logging.getLogger(__name__)


def named_splits(dataset: str, data_dir: str, manual_dir: str) -> Splits:
    """The splits of a TFDS data set, which is prepared first if it isn't yet.

    Args:
      dataset: "name", "name/config", and either with ":1.2.3" for a version.
      data_dir, manual_dir: see `splits.open_splits`.

    Raises UserError if TFDS has no such data set, or it isn't prepared and can't be here.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    where = os.path.expanduser(data_dir) or None
    try:
        builder = builder_from_files(dataset, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        builder = None
    except Exception as error:
        raise _failure(f"{dataset}: can't be opened", error) from None
    if is_bucket(where or ""):
        if not builder:
            raise UserError(
                f"{dataset} isn't prepared in {where}: prepare it in a folder and copy that there"
            )
        return prepared_splits(str(builder.data_path))
    return _splits(dataset, builder or _download(dataset, where, manual_dir))


def prepared_splits(dataset: str) -> Splits:
    """The splits of a data set by its folder, DIR with dataset_info.json or DIR/1.0.0 with it."""
    import tensorflow_datasets as tfds

    path = os.path.expanduser(dataset)
    names = list_folder(path)
    if "dataset_info.json" not in names:
        versions = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
        path = os.path.join(path, max(versions, key=lambda v: tuple(map(int, v.split(".")))))
    if is_bucket(path):  # Which array_record can't read.
        path = str(local_copy(path))
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:
        raise _failure(f"{dataset}: can't be opened as a prepared TFDS data set", error) from None
    return _splits(dataset, builder)


def unknown_dataset(dataset: str, names: Sequence[str]) -> UserError:
    """The error for a data set that is neither there nor among the `names` of TFDS."""
    close = difflib.get_close_matches(dataset, ["digits", *names], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UserError(
        f"unknown dataset {dataset!r}: there is no such folder or file, and neither 'digits' nor "
        f"TFDS has that name; give the path of a folder of images, a .csv, .jsonl or .npz{hint}"
    )


def _download(dataset: str, data_dir: str | None, manual_dir: str) -> Any:
    """Downloads and prepares a stock data set. Its builder needs TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder_cls(dataset.partition(":")[0].partition("/")[0])
    except tfds.core.DatasetNotFoundError:
        raise unknown_dataset(dataset, tfds.list_builders(with_community_datasets=False)) from None
    except Exception as error:  # Its code wants what isn't installed.
        raise _failure(f"{dataset}: TFDS can't load its builder", error) from None
    place = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"{dataset} isn't prepared in {place}, and preparing it needs TensorFlow: run "
            "pip install 'vit_jax[tf]' and then the same command again, or give the "
            "config.tfds_data_dir that holds it"
        )
    _log.warning("Preparing %s in %s", dataset, place)
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # It must not take the device's memory from JAX.
    config = tfds.download.DownloadConfig(
        manual_dir=os.path.expanduser(manual_dir) or None, try_download_gcs=False
    )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=config)
    except Exception as error:
        raise _failure(f"{dataset}: can't be prepared in {place}", error) from None
    return builder


def _failure(what: str, error: Exception) -> UserError:
    # TFDS explains itself in paragraphs; the first line that says something has to do.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return UserError(f"{what} ({reason}); mend or replace it")


# Reading.


def _splits(dataset: str, builder: Any) -> Splits:
    info = builder.info
    lengths = {name: split.num_examples for name, split in info.splits.items()}
    lengths = {name: length for name, length in lengths.items() if length}
    if not lengths:
        raise UserError(f"{dataset}: {builder.data_dir} holds no examples; prepare it again")
    image, label = _columns(dataset, info)
    classes = getattr(info.features[label], "feature", info.features[label])  # Of a sequence.
    if classes.int2str(0) == "0":  # It has no names, perhaps, but makes them for any number.
        numbered_classes(dataset, classes.num_classes, sum(lengths.values()))
    names = tuple(classes.names)
    numbering = Numbering(dataset, lengths)
    examples = _Examples(builder, numbering, image, label, len(names))
    sizes = [(name, split.shard_lengths, split.num_bytes) for name, split in info.splits.items()]

    def open_one(split: str) -> Source:
        _check_files(dataset, info, split)
        return Source(
            name=dataset,
            labels=names,
            channels=1 if info.features[image].shape[-1] == 1 else 3,
            keys=numbering.keys(split),
            label_ids=None,
            read_key=examples.read,
            describe_key=numbering.describe,
            multi_label=classes is not info.features[label],
            identity=partial(str, f"{info.full_name} {sizes}"),
        )

    return {split: partial(open_one, split) for split in lengths}


def _columns(dataset: str, info: Any) -> tuple[str, str]:
    """The names of the image and of its label or labels among the features."""
    import tensorflow_datasets as tfds

    features = dict(info.features.items())

    def is_classes(name: str) -> bool:
        feature = features.get(name)
        return isinstance(getattr(feature, "feature", feature), tfds.features.ClassLabel)

    pair = info.supervised_keys or ()
    images = [n for n in (*pair[:1], "image") if isinstance(features.get(n), tfds.features.Image)]
    labels = [n for n in (*pair[1:2], "label", "labels") if isinstance(n, str) and is_classes(n)]
    if not images or not labels:
        raise UserError(
            f"{dataset}: holds {', '.join(features)}, expected an 'image' and a 'label' or "
            "'labels' that are classes; this data set isn't one of labelled images"
        )
    return images[0], labels[0]


def _check_files(dataset: str, info: Any, split: str) -> None:
    """Raises UserError if a file of a split is missing or, array_record, cut short."""
    from array_record.python.array_record_module import ArrayRecordReader

    files = zip(info.splits[split].filepaths, info.splits[split].shard_lengths, strict=True)
    for file, expected in files:
        what = f"{dataset}: {os.fspath(file)}"
        if not file.exists():
            raise UserError(f"{what} is missing; prepare the data set again")
        if info.file_format.value == "array_record":
            try:
                found = ArrayRecordReader(os.fspath(file)).num_records()
            except Exception as error:
                raise _failure(f"{what} is truncated or damaged", error) from None
            if found != expected:
                raise UserError(
                    f"{what} is truncated (found {found:,} examples of {expected:,}); prepare "
                    "the data set again"
                )


class _Examples:
    """The examples of all splits by their numbers; may be copied to other processes."""

    def __init__(self, builder: Any, numbering: Numbering, image: str, label: str, classes: int):
        import tensorflow_datasets as tfds

        self._builder, self._numbering = builder, numbering
        self._image, self._label, self._classes = image, label, classes
        # What else there is, e.g. a mask, isn't parsed.
        self._features = tfds.features.FeaturesDict(
            {name: builder.info.features[name] for name in (image, label)}
        )
        self._decoders = {image: tfds.decode.SkipDecoding()}
        self._records: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": {}}

    def read(self, key: int) -> tuple[bytes, Any]:
        """The image's file and its label, or an array of them."""
        split, place = self._numbering.find(key)
        what = self._numbering.describe(key)
        try:
            if split not in self._records:  # Two threads may both do this: no harm.
                self._records[split] = self._open_records(split)
            record = self._records[split][place]
            example = self._features.deserialize_example_np(record, decoders=self._decoders)
        except Exception as error:
            raise _failure(f"{what}: can't be read", error) from None
        label = example[self._label]
        if np.ndim(label) == 0 and label < 0:  # How TFDS marks a test set that keeps its secrets.
            raise UserError(f"{what}: has no label; choose another split")
        if np.size(label) and np.max(label) >= self._classes:
            raise UserError(
                f"{what}: has the label {np.max(label)}, expected less than {self._classes}, the "
                "number of classes; prepare the data set again"
            )
        return bytes(example[self._image]), label

    def _open_records(self, split: str) -> Any:
        """The records of a split by number."""
        import tensorflow_datasets as tfds

        info = self._builder.info
        kind = info.file_format.value
        if kind == "tfrecord":
            files = [os.fspath(file) for file in info.splits[split].filepaths]
            return _TfRecords(files, info.splits[split].shard_lengths)
        try:
            return self._builder.as_data_source(
                split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as error:
            name = self._numbering.name
            raise _failure(
                f"{name}: the {kind} files of {split!r} can't be opened", error
            ) from None


class _TfRecords:
    """Random access to tfrecord files: where records begin is looked up shard by shard.

    A record is its length (uint64), 4 bytes of checksum, the data, 4 bytes of checksum.
    """

    def __init__(self, files: list[str], lengths: list[int]):
        self._numbering = Numbering("", dict(zip(files, lengths, strict=True)))
        self._offsets: dict[str, np.ndarray] = {}

    def __getitem__(self, index: int) -> bytes:
        file, place = self._numbering.find(index)
        if file not in self._offsets:
            self._offsets[file] = self._scan(file)
        begin, end = self._offsets[file][place : place + 2].tolist()
        with open(file, "rb") as opened:
            opened.seek(begin + 12)
            return opened.read(end - begin - 16)

    def _scan(self, file: str) -> np.ndarray:
        count, offsets = len(self._numbering.keys(file)), [0]
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
            while len(offsets) <= count and offsets[-1] + 16 <= len(data):
                (length,) = struct.unpack_from("<Q", data, offsets[-1])
                offsets.append(offsets[-1] + 16 + length)
            if len(offsets) <= count or offsets[-1] > len(data):
                raise ValueError(f"{file} is cut short")
        return np.array(offsets, np.int64)


# Writing.


def write_splits(sources: Mapping[str, Source], destination: str, corrupt: str) -> dict[str, int]:
    """Writes splits as a data set; see `splits.prepare_tfds`."""
    import tensorflow_datasets as tfds

    target = os.path.abspath(os.path.expanduser(destination))
    parent, name = os.path.split(target)
    try:
        os.makedirs(parent, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{name}.", dir=parent)
    except OSError as error:
        raise UserError(
            f"{destination}: can't be made ({error.strerror}); choose another folder"
        ) from None
    try:
        # A name that TFDS takes, after the folder's.
        name = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower()
        name = name if name[:1].isalpha() else f"images_{name}".rstrip("_")
        builder = _builder(sources, name, temporary, corrupt)
        tfds.disable_progress_bar()
        # TFDS would tell of the temporary folder, on stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        os.rename(builder.data_dir, target)
        return {split: info.num_examples for split, info in builder.info.splits.items()}
    finally:
        tfds.enable_progress_bar()
        shutil.rmtree(temporary, ignore_errors=True)


def _builder(sources: Mapping[str, Source], name: str, data_dir: str, corrupt: str) -> Any:
    import cv2
    import tensorflow_datasets as tfds
    from rich.console import Console
    from rich.progress import track

    screen = Console(stderr=True)
    one = next(iter(sources.values()))
    if one.channels not in (1, 3):
        raise UserError(
            f"{one.name}: images of {one.channels} channels, expected 1 or 3: a TFDS data set has "
            "no place for others; train on them as they are"
        )
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
            for index in range(len(source)):
                try:
                    stored, ids = source.stored(index)
                    pixels = source.decode(stored, index)
                except UserError as error:
                    if corrupt != "skip":
                        raise
                    _log.warning("Skipping %s", error)
                    continue
                if pixels.dtype not in (np.uint8, np.uint16):
                    raise UserError(
                        f"{source.describe(index)} is of {pixels.dtype}, expected 8 or 16 bits, "
                        "as PNG has them; train on such images as they are"
                    )
                if not isinstance(stored, bytes):
                    order = np.ascontiguousarray(pixels[..., ::-1])  # OpenCV's is blue, green, red.
                    stored = cv2.imencode(".png", order)[1].tobytes()
                found = [int(i) for i in ids if i >= 0] if source.multi_label else int(ids)
                yield index, {"image": stored, label: found}

    Builder.name = name
    return Builder(data_dir=data_dir, file_format="array_record")
