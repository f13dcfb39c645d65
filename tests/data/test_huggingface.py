"""Data sets of Hugging Face's library, where it is installed."""

import numpy as np
import pytest

from tests.images import listed, write_photos
from vit_jax.data import data_fingerprint, from_huggingface, open_source, read
from vit_jax.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=4, test=2)


def dataset_of(photos, split, label=None):
    files = listed(photos, split)
    names = ["bee", "cat", "dog"]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    labels = [f.parent.name for f in files]
    if label is not None:
        features["label"], labels = label, [[1, 2], [], *[[0]] * (len(files) - 2)]
    rows = {"image": [str(f) for f in files], "label": labels}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_an_object_is_read_as_its_files_are(photos):
    source = from_huggingface(dataset_of(photos, "train"))
    assert source.labels == ("bee", "cat", "dog")
    assert source.label_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(source[5]["image"], read(listed(photos, "train")[5]))


def test_lists_of_classes_are_several_labels(photos):
    several = datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))
    source = from_huggingface(dataset_of(photos, "train", several))
    assert source.multi_label
    assert [source[i]["label"].tolist() for i in range(3)] == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_what_was_saved_opens_by_its_path(photos, tmp_path):
    parts = {split: dataset_of(photos, split) for split in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    parts["train"].save_to_disk(tmp_path / "one")
    path = str(tmp_path / "parts")
    train, test = open_source(path, "train"), open_source(path, "test")
    assert (len(train), len(test)) == (12, 6)
    np.testing.assert_array_equal(test[4]["image"], read(listed(photos, "test")[4]))
    assert data_fingerprint(test) == data_fingerprint(open_source(path, "test"))
    assert len(open_source(path, "test+train[:5]")) == 11
    assert len(open_source(str(tmp_path / "one"), "test")) == 3


def test_images_without_a_label_matter_where_they_are_opened(photos, tmp_path):
    train, test = dataset_of(photos, "train"), dataset_of(photos, "test")
    for hidden in (-1, None):
        unknown = test.remove_columns("label").add_column("label", [hidden] * len(test))
        unknown = unknown.cast(test.features)
        with pytest.raises(UserError, match="6 images have no label"):
            from_huggingface(unknown)
        path = str(tmp_path / f"parts {hidden}")
        datasets.DatasetDict({"train": train, "test": unknown}).save_to_disk(path)
        assert len(open_source(path, "train")) == 12
        with pytest.raises(UserError, match="6 images have no label"):
            open_source(path, "test")


def test_labels_of_no_class_are_refused(photos):
    found = dataset_of(photos, "test")
    features = found.features
    other = found.remove_columns("label").add_column("label", [0, 1, 2, 3, 0, 1])
    info = datasets.DatasetInfo(features=features)
    with pytest.raises(UserError, match="labels up to 3, expected those of the 3 classes"):
        from_huggingface(datasets.Dataset(other.data.table.select(features), info=info))


def test_other_columns_are_named(photos):
    with pytest.raises(UserError, match="columns image, label, expected 'photo' of type Image"):
        from_huggingface(dataset_of(photos, "train"), image="photo")
