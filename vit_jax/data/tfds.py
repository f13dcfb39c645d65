"""TensorFlow Datasets, read without TensorFlow: by name or from the folder of a prepared one.

Images are left encoded and decoded by us, and labels are read with them: opening a data set reads
none of its examples.
"""

import importlib.util
import logging
import mmap
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from vit_jax.data.sources import Source, Splits, unknown_dataset
from vit_jax.errors import UserError

_log = logging.getLogger(__name__)


def named_splits(dataset: str, data_dir: str, manual_dir: str) -> Splits:
    """The parts of a TFDS data set, which is prepared first if it isn't yet.

    Args:
      dataset: "name", "name/config", and either with ":1.2.3" for a version.
      data_dir, manual_dir: see `open_splits`.

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
    return _splits(dataset, builder or _prepare(dataset, where, manual_dir))


def prepared_splits(dataset: str) -> Splits:
    """The parts of a data set by its folder, DIR with dataset_info.json or DIR/1.0.0 with it."""
    import tensorflow_datasets as tfds

    path = os.path.expanduser(dataset)
    if not os.path.exists(os.path.join(path, "dataset_info.json")):
        versions = [name for name in os.listdir(path) if re.fullmatch(r"\d+\.\d+\.\d+", name)]
        path = os.path.join(path, max(versions, key=lambda v: tuple(map(int, v.split(".")))))
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:
        raise _failure(f"{dataset}: can't be opened as a prepared TFDS data set", error) from None
    return _splits(dataset, builder)


def _prepare(dataset: str, data_dir: str | None, manual_dir: str) -> Any:
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
    _hide_gpus()
    config = tfds.download.DownloadConfig(
        manual_dir=os.path.expanduser(manual_dir) or None, try_download_gcs=False
    )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare(download_config=config)
    except Exception as error:
        raise _failure(f"{dataset}: can't be prepared in {place}", error) from None
    return builder


def _hide_gpus() -> None:
    """TensorFlow must not take the device's memory from JAX."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")


def _failure(what: str, error: Exception) -> UserError:
    # TFDS explains itself in paragraphs; the first line that says something has to do.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    return UserError(f"{what} ({reason}); mend or replace it")


# Reading.


def _splits(dataset: str, builder: Any) -> Splits:
    info = builder.info
    names = [name for name, split in info.splits.items() if split.num_examples]
    if not names:
        raise UserError(f"{dataset}: {builder.data_dir} holds no examples; prepare it again")
    image, label = _columns(dataset, info)
    classes = getattr(info.features[label], "feature", info.features[label])  # of a sequence
    labels = tuple(classes.names or map(str, range(classes.num_classes)))
    multi_label = classes is not info.features[label]
    examples = _Examples(dataset, builder, names, image, label, multi_label)
    channels = info.features[image].shape[-1]

    def open_one(place: int) -> Source:
        examples.check(place)
        return Source(
            name=dataset,
            labels=labels,
            channels=1 if channels == 1 else 3,
            keys=range(examples.starts[place], examples.starts[place + 1]),
            label_ids=None,
            read_key=examples.read,
            describe_key=examples.describe,
            multi_label=multi_label,
            identity=partial(_identity, info),
        )

    return {name: partial(open_one, place) for place, name in enumerate(names)}


def _identity(info: Any) -> str:
    sizes = [(name, split.shard_lengths, split.num_bytes) for name, split in info.splits.items()]
    return f"{info.full_name} {sizes}"


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


class _Examples:
    """The examples of all splits one after the other; may be copied to other processes."""

    def __init__(
        self,
        dataset: str,
        builder: Any,
        names: Sequence[str],
        image: str,
        label: str,
        multi_label: bool,
    ):
        import tensorflow_datasets as tfds

        info = builder.info
        self._dataset, self._names = dataset, names
        self._image, self._label, self._multi_label = image, label, multi_label
        # What else there is, e.g. a mask, isn't parsed.
        self._features = tfds.features.FeaturesDict(
            {name: info.features[name] for name in (image, label)}
        )
        self._decoders = {image: tfds.decode.SkipDecoding()}
        lengths = [info.splits[name].num_examples for name in names]
        self.starts: list[int] = np.cumsum([0, *lengths]).tolist()
        self._builder = builder
        self._records: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": {}}

    def check(self, place: int) -> None:
        """Raises UserError if a file of a split is missing or, array_record, cut short."""
        from array_record.python.array_record_module import ArrayRecordReader

        info = self._builder.info
        split = info.splits[self._names[place]]
        for file, expected in zip(split.filepaths, split.shard_lengths, strict=True):
            path, what = os.fspath(file), f"{self._dataset}: {os.fspath(file)}"
            if not file.exists():
                raise UserError(f"{what} is missing; prepare the data set again")
            if info.file_format.value == "array_record":
                try:
                    found = ArrayRecordReader(path).num_records()
                except Exception as error:
                    raise _failure(f"{what} is truncated or damaged", error) from None
                if found != expected:
                    raise UserError(
                        f"{what} is truncated (found {found:,} examples of {expected:,}); prepare "
                        "the data set again"
                    )

    def read(self, key: int) -> tuple[bytes, Any]:
        """The image's file and its label, or an array of them."""
        place = bisect_right(self.starts, key) - 1
        try:
            record = self._open(place)[int(key) - self.starts[place]]
            example = self._features.deserialize_example_np(record, decoders=self._decoders)
        except Exception as error:
            raise _failure(f"{self.describe(key)}: can't be read", error) from None
        label = example[self._label]
        if not self._multi_label and label < 0:  # How TFDS marks a test set that keeps its secrets.
            raise UserError(f"{self.describe(key)}: has no label; choose another split")
        return bytes(example[self._image]), label

    def describe(self, key: int) -> str:
        """As "cifar10 test[12]"."""
        place = bisect_right(self.starts, key) - 1
        return f"{self._dataset} {self._names[place]}[{key - self.starts[place]}]"

    def _open(self, place: int) -> Any:
        """The records of a split by number."""
        if place not in self._records:  # Two threads may both do this: no harm.
            self._records[place] = self._open_records(self._builder.info.splits[self._names[place]])
        return self._records[place]

    def _open_records(self, split: Any) -> Any:
        import tensorflow_datasets as tfds

        kind = self._builder.info.file_format.value
        if kind == "tfrecord":
            return _TfRecords([os.fspath(f) for f in split.filepaths], split.shard_lengths)
        try:
            return self._builder.as_data_source(
                split=split.name, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as error:
            raise _failure(
                f"{self._dataset}: the {kind} files of {split.name!r} can't be opened", error
            ) from None


class _TfRecords:
    """Random access to tfrecord files: where records begin is looked up shard by shard.

    A record is its length (uint64), 4 bytes of checksum, the data, 4 bytes of checksum.
    """

    def __init__(self, files: list[str], lengths: list[int]):
        self._files = files
        self._starts = np.cumsum([0, *lengths]).tolist()
        self._offsets: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> bytes:
        shard = bisect_right(self._starts, index) - 1
        if shard not in self._offsets:
            self._offsets[shard] = self._scan(shard)
        begin, end = self._offsets[shard][index - self._starts[shard] :][:2].tolist()
        with open(self._files[shard], "rb") as file:
            file.seek(begin + 12)
            return file.read(end - begin - 16)

    def _scan(self, shard: int) -> np.ndarray:
        file, count = self._files[shard], self._starts[shard + 1] - self._starts[shard]
        offsets = [0]
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
            while len(offsets) <= count and offsets[-1] + 16 <= len(data):
                (length,) = struct.unpack_from("<Q", data, offsets[-1])
                offsets.append(offsets[-1] + 16 + length)
            if len(offsets) <= count or offsets[-1] > len(data):
                raise ValueError(f"{file} is cut short")
        return np.array(offsets, np.int64)
