"""Data sets in a bucket."""

import io
import itertools

import cv2
import numpy as np
import pytest

from vit_jax import data, files
from vit_jax.errors import UserError


@pytest.fixture
def table(bucket, rng=np.random.default_rng(0)):  # noqa: B008
    """A table of 12 images in a bucket."""
    rows = ["path,label,split"]
    for i in range(12):
        image = rng.integers(0, 256, (8, 8, 3), np.uint8)
        (bucket / "images" / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
        rows.append(f"images/{i}.png,{'cat' if i % 2 else 'dog'},{'test' if i > 8 else 'train'}")
    (bucket / "table.csv").write_text("\n".join(rows))
    return bucket / "table.csv"


def test_images_of_a_table_in_a_bucket_are_read_there(table):
    train, test = (data.open_source(str(table), split) for split in ("train", "test"))
    assert (len(train), len(test), train.labels) == (9, 3, ("cat", "dog"))
    stored = (table.parent / "images" / "10.png").read_bytes()
    assert test.stored(1) == (stored, 1)
    assert test.describe(1) == f"{table.parent}/images/10.png"
    (table.parent / "images" / "10.png").unlink()
    with pytest.raises(UserError, match=r"images/10.png: can't be read \(FileNotFoundError\)"):
        test[1]
    with pytest.raises(UserError, match=r"table.csv line 12: there is no gs://.*/images/10.png"):
        data.open_source(str(table), "test")


def test_an_object_that_is_too_large_is_refused_before_it_is_read(table, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_OBJECT", 500)
    size = len((table.parent / "images" / "10.png").read_bytes())
    (table.parent / "images" / "10.png").write_bytes(b"\x89PNG" + bytes(600))
    assert size < 500
    test = data.open_source(str(table), "test")
    with pytest.raises(UserError, match=r"images/10.png: can't be read \(larger than 500 bytes\)"):
        test[1]


def test_a_prepared_data_set_in_a_bucket_is_the_same_by_its_folder_and_by_its_name(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "shapes" / "1.0.0"
    data.prepare_tfds("digits", str(local))
    for file in local.iterdir():
        (bucket / "shapes" / "1.0.0" / file.name).write_bytes(file.read_bytes())
    mine = data.open_source(str(local), "train")
    for name, where in ((f"{bucket}/shapes", ""), ("shapes", str(bucket))):
        source = data.open_source(name, "train", data_dir=where)
        assert data.data_fingerprint(source) == data.data_fingerprint(mine)
        for i in (0, 7):
            assert np.array_equal(source[i]["image"], mine[i]["image"])


def test_arrays_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    file = io.BytesIO()
    np.savez(file, images=np.zeros((10, 4, 4), np.uint8), labels=np.arange(10) % 2)
    (bucket / "a.npz").write_bytes(file.getvalue())
    assert len(data.open_source(f"{bucket}/a.npz", "train+test")) == 10


def test_what_is_no_data_set_is_told(bucket):
    with pytest.raises(UserError, match="is not there: of buckets, tables"):
        data.open_source(f"{bucket}/none", "train")
    (bucket / "train" / "cat" / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds train: of buckets, tables"):
        data.open_source(str(bucket), "train")
    with pytest.raises(UserError, match=f"cifar10 isn't prepared in {bucket}: prepare it in"):
        data.open_source("cifar10", "train", data_dir=str(bucket))


def test_processes_read_a_table_in_a_bucket(table):
    source = data.open_source(str(table), "train")
    ops = data.parse("value_range(0, 1)")
    batches = [
        [batch["image"] for batch in itertools.islice(read, 3)]
        for workers in (0, 2)
        for read in [
            data.train_batches(
                source, ops, batch_size=4, seed=0, workers=data.choose_readers(source, workers)
            )
        ]
    ]
    assert np.array_equal(*batches)
