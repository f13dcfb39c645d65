"""TFDS data sets on disk, written by TFDS and read without TensorFlow."""

import importlib.util
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.images import listed, write_photos
from vit_jax.data import data_fingerprint, eval_batches, open_source, parse, read
from vit_jax.errors import UserError

LABELS = ["bee", "cat", "dog"]


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder as a user would write it: images by their paths, and more than we need."""

    name = "photos"
    VERSION = tfds.core.Version("2.1.0")
    root = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(),
                    "mask": tfds.features.Image(shape=(None, None, 1)),
                    "label": tfds.features.ClassLabel(names=LABELS),
                    "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=LABELS)),
                }
            ),
            supervised_keys=self.supervised_keys,
            disable_shuffling=True,
        )

    supervised_keys = ("image", "label")

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        for i, file in enumerate(listed(self.root, split)):
            yield i, self.example(i, file)

    def example(self, i, file):
        label = file.parent.name
        mask = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
        return {
            "id": file.name,
            "image": str(file),
            "mask": mask,
            "label": label,
            "labels": [label],
        }


def build(builder, root, data_dir):
    builder.root = root
    made = builder(data_dir=data_dir, file_format="array_record")
    made.download_and_prepare()
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=6, test=3)


@pytest.fixture(scope="module")
def data_dir(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    build(Photos, photos, folder)
    return folder


@pytest.fixture
def copy(data_dir, tmp_path):
    return shutil.copytree(data_dir / "photos" / "2.1.0", tmp_path / "copy")


def fails(message, dataset, split="train", **places):
    with pytest.raises(UserError, match=message) as error:
        open_source(dataset, split, **places)
    assert "\n" not in str(error.value)


def test_a_data_set_opens_by_name_version_or_folder(data_dir, photos):
    folder = open_source(str(photos), "test")
    for dataset in (
        *("photos", "photos:2.1.0"),
        *(str(data_dir / "photos"), str(data_dir / "photos" / "2.1.0")),
    ):
        source = open_source(dataset, "test", data_dir=str(data_dir))
        assert (source.labels, source.channels, len(source)) == (tuple(LABELS), 3, 9)
        for i in range(9):
            np.testing.assert_array_equal(source[i]["image"], folder[i]["image"])
            assert source[i]["label"] == folder[i]["label"]
        assert source.describe(3) == f"{dataset} test[3]"


def test_the_newest_version_of_a_folder_is_taken(data_dir, tmp_path):
    for version in ("2.1.0", "2.10.0"):
        shutil.copytree(data_dir / "photos" / "2.1.0", tmp_path / version)
    info = tmp_path / "2.10.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("2.1.0", "2.10.0"))
    newest = open_source(str(tmp_path), "test")
    assert data_fingerprint(newest) != data_fingerprint(
        open_source(str(tmp_path / "2.1.0"), "test")
    )


@pytest.mark.parametrize(
    "split",
    [
        "train", "train[:50%]", "train[37%:]", "train[-7:]", "train[3:9]", "train[:98%]",
        "train[:10%]+train[90%:]", "train+test", "test[1:]+train[:2]",
    ],
)  # fmt: skip
def test_splits_are_those_of_tfds(data_dir, split):
    path = str(data_dir / "photos" / "2.1.0")
    theirs = tfds.builder_from_directory(path).as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    ours = open_source(path, split)
    assert len(ours) == len(theirs)
    assert [ours.stored(i)[0] for i in range(len(ours))] == [x["image"] for x in theirs]


@pytest.mark.parametrize("part", ["train", "train[:17]", "train[2:]"])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_even_splits_are_those_of_tfds(data_dir, part, count):
    path = str(data_dir / "photos" / "2.1.0")
    builder = tfds.builder_from_directory(path)
    for i, theirs in enumerate(tfds.even_splits(part, count)):
        ours = open_source(path, f"even_splits({part}, {count})[{i}]")
        records = builder.as_data_source(
            split=theirs, decoders={"image": tfds.decode.SkipDecoding()}
        )
        assert [ours.stored(k)[0] for k in range(len(ours))] == [x["image"] for x in records]


def test_opening_reads_no_example_and_needs_no_tensorflow(data_dir):
    code = (
        "import sys, vit_jax.data as d\n"
        f"s = d.open_source('photos', 'train', data_dir={str(data_dir)!r})\n"
        "assert s.label_ids is None and d.data_fingerprint(s)\n"
        "assert s[3]['image'].shape[2] == 3\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_and_other_processes_read_the_same(data_dir):
    source = open_source("photos", "train", data_dir=str(data_dir))
    alone = [source[i]["image"].tobytes() for i in range(18)]
    source = open_source("photos", "train", data_dir=str(data_dir))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i % 18]["image"].tobytes(), range(180))) == alone * 10
    copied = pickle.loads(pickle.dumps(source))
    assert [copied[i]["image"].tobytes() for i in range(18)] == alone


def test_a_sequence_of_classes_is_several_labels(photos, tmp_path):
    class Several(Photos, skip_registration=True):
        name = "several"
        supervised_keys = ("image", "labels")

        def example(self, i, file):
            return super().example(i, file) | {"labels": LABELS[: i % 4]}

    build(Several, photos, tmp_path)
    source = open_source("several", "train", data_dir=str(tmp_path))
    assert source.multi_label
    rows = [source[i]["label"].tolist() for i in range(4)]
    assert rows == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    (batch,) = eval_batches(source, parse("resize(8)"), batch_size=18)
    np.testing.assert_array_equal(batch["label"][:4], rows)


def test_a_split_without_labels_can_not_be_used(photos, tmp_path):
    class Secret(Photos, skip_registration=True):
        name = "secret"

        def example(self, i, file):
            return super().example(i, file) | {"label": -1}

    build(Secret, photos, tmp_path)
    with pytest.raises(UserError, match=r"secret test\[2\]: has no label; choose another split"):
        open_source("secret", "test", data_dir=str(tmp_path))[2]


def test_labels_and_classes_that_can_not_be_are_refused(copy):
    info = json.loads((copy / "features.json").read_text())
    label = info["featuresDict"]["features"]["label"]["classLabel"]
    (copy / "label.labels.txt").unlink()
    for count, message in ((10**9, "labels count to 999,999,999 for 27 images"), (1, "only one")):
        label["numClasses"] = str(count)
        (copy / "features.json").write_text(json.dumps(info))
        fails(message, str(copy))
    label["numClasses"] = "2"
    (copy / "features.json").write_text(json.dumps(info))
    source = open_source(str(copy), "train")
    assert source[6]["label"] == 1
    with pytest.raises(UserError, match=r"train\[17\]: has the label 2, expected less than 2"):
        source[17]


def test_mistakes_are_named(data_dir, tmp_path):
    fails(
        "unknown split 'val': photos has 'train', 'test'",
        "photos",
        "val",
        data_dir=str(data_dir),
    )
    fails("unknown dataset 'mnits'.*did you mean 'mnist'", "mnits", data_dir=str(data_dir))
    fails("unknown dataset 'a/b/c'", "a/b/c")
    (tmp_path / "dataset_info.json").write_text("{")
    fails("can't be opened as a prepared TFDS data set", str(tmp_path))


@pytest.mark.skipif(bool(importlib.util.find_spec("tensorflow")), reason="TensorFlow is there")
def test_what_is_not_prepared_says_how(tmp_path):
    message = (
        f"cifar10 isn't prepared in {tmp_path}.*needs TensorFlow: run pip install 'vit_jax.tf.'"
    )
    fails(message, "cifar10", data_dir=str(tmp_path))
    assert not os.listdir(tmp_path)


def test_truncated_and_missing_files_are_named(copy):
    (file,) = copy.glob("*-train.array_record-*")
    whole = file.read_bytes()
    for size in (0, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        fails(
            r"photos-train.array_record-00000-of-00001 is truncated \(found 0 examples of 18\)",
            str(copy),
        )
    assert len(open_source(str(copy), "test")) == 9
    file.unlink()
    fails("photos-train.array_record-00000-of-00001 is missing", str(copy))


def test_damage_in_the_middle_is_reported_for_its_images(copy):
    (file,) = copy.glob("*-train.array_record-*")
    content = bytearray(file.read_bytes())
    content[5000:5100] = bytes(100)
    file.write_bytes(content)
    source = open_source(str(copy), "train")
    errors = {}
    for i in range(18):
        try:
            source[i]
        except UserError as error:
            errors[i] = str(error)
    assert 0 < len(errors) < 4
    assert all(f"copy train[{i}]: " in e and "\n" not in e for i, e in errors.items())
    (batch,) = eval_batches(source, parse("resize(8)"), batch_size=18, corrupt="skip")
    assert np.flatnonzero(~batch["mask"]).tolist() == sorted(errors)


def as_tfrecord(folder):
    """Rewrites a prepared data set in the old format, whose records are framed by checksums."""
    builder = tfds.builder_from_directory(str(folder))
    for split, info in builder.info.splits.items():
        records = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        frames = [struct.pack("<Q", len(r)) + b"crc_" + r + b"crc_" for r in records]
        (old,) = info.filepaths
        old.unlink()
        (folder / old.name.replace("array_record", "tfrecord")).write_bytes(b"".join(frames))
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
    path.write_text(json.dumps(info))


def test_old_tfrecord_files_are_read_in_any_order(copy, photos):
    as_tfrecord(copy)
    source = open_source(str(copy), "train")
    files = listed(photos, "train")
    for i in (17, 3, 0, 9):
        np.testing.assert_array_equal(source[i]["image"], read(files[i]))
    assert source[17]["label"] == 2
    (file,) = copy.glob("*-train.tfrecord-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="tfrecord-00000-of-00001 is cut short"):
        open_source(str(copy), "train")[0]


# Stock data sets, which only TensorFlow prepares.

PREPARE = """
import hashlib, os, sys
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
manual, data_dir, file_format = sys.argv[1:]
# What the builder would download lies in manual_dir, and has another checksum.
archive = os.path.join(manual, "cifar-10-binary.tar.gz")
digest = hashlib.sha256(open(archive, "rb").read()).hexdigest()
info = UrlInfo(size=os.path.getsize(archive), checksum=digest, filename=os.path.basename(archive))
tfds.builder_cls("cifar10").url_infos = {
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz": info
}
if file_format == "array_record":
    from vit_jax.data import open_source
    open_source("cifar10", "train", data_dir=data_dir, manual_dir=manual)
else:
    config = tfds.download.DownloadConfig(manual_dir=manual)
    tfds.builder("cifar10", data_dir=data_dir).download_and_prepare(download_config=config)
loaded = {"tfrecord": tfds.load}.get(file_format, lambda *_, **__: ())
for example in loaded("cifar10", split="test[:3]", data_dir=data_dir):
    print(example["image"].numpy().tobytes().hex(), int(example["label"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_the_stock_cifar10_builder_prepares_and_is_read(shared, tmp_path, file_format):
    from tests.cifar import write_archive

    pixels, labels = write_archive(shared / "images" / "cifar10", tmp_path)
    data_dir = str(tmp_path / "tfds")
    command = [sys.executable, "-c", PREPARE, str(tmp_path), data_dir, file_format]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    source = open_source("cifar10", "train", data_dir=data_dir)
    assert (len(source), source.labels[:2]) == (len(pixels), ("airplane", "automobile"))
    # TFDS shuffles what it writes.
    found = {
        (e["image"].tobytes(), e["label"]) for e in map(source.__getitem__, range(len(source)))
    }
    assert found == {(p.tobytes(), label) for p, label in zip(pixels, labels, strict=True)}
    test = open_source("cifar10", "test", data_dir=data_dir)
    theirs = [line.split() for line in out.splitlines() if " " in line and len(line) > 6000]
    assert len(theirs) == (3 if file_format == "tfrecord" else 0)
    for i, (image, label) in enumerate(theirs):
        assert (test[i]["image"].tobytes().hex(), test[i]["label"]) == (image, int(label))
