"""CSV and JSONL tables of images."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.images import listed, write_photos
from vit_jax.data import data_fingerprint, eval_batches, open_source, parse, read, train_batches
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=6, test=3)


def lines_of(root, split):
    return [f"{f.relative_to(root)},{f.parent.name}" for f in listed(root, split)]


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def fails(message, dataset, split="train"):
    with pytest.raises(UserError, match=message) as error:
        open_source(dataset, split)
    assert "\n" not in str(error.value)


def test_a_table_holds_the_images_of_a_folder_in_the_order_of_its_lines(photos):
    lines = lines_of(photos, "train")
    source = open_source(write(photos / "all.csv", "path,label", *lines), "train+test")
    assert source.labels == ("bee", "cat", "dog")
    assert (len(source), source.multi_label) == (18, False)
    reverse = write(
        photos / "reverse.csv",
        "label,path",
        *(",".join(reversed(x.split(","))) for x in lines[::-1]),
    )
    backwards = open_source(reverse, "train+test")
    assert sorted(backwards.keys) == sorted(source.keys)
    example = open_source(
        write(photos / "s.csv", "path,label,split", *(f"{x},train" for x in lines)), "train"
    )[7]
    np.testing.assert_array_equal(example["image"], read(listed(photos, "train")[7]))
    assert example["label"] == 1


def test_without_splits_the_same_fifth_is_held_out_as_of_a_folder(photos):
    table = write(
        photos / "train" / "all.csv",
        "path,label",
        *(line.removeprefix("train/") for line in lines_of(photos, "train")),
    )
    for split in ("train", "test"):
        folder, csv = (
            open_source(str(photos / "train"), split, seed=3),
            open_source(table, split, seed=3),
        )
        assert list(csv.keys) == list(folder.keys)
        assert csv.label_ids.tolist() == folder.label_ids.tolist()
        assert data_fingerprint(csv) == data_fingerprint(folder)


def test_a_split_column_says_where_a_image_belongs(photos):
    lines = [f"{x},{s}" for s in ("train", "test") for x in lines_of(photos, s)]
    table = write(photos / "split.csv", "path,label,split", *lines)
    for split in ("train", "test"):
        folder, csv = open_source(str(photos), split), open_source(table, split)
        assert list(csv.keys) == list(folder.keys)
        assert csv.label_ids.tolist() == folder.label_ids.tolist()
    lines = [f"{x},validation" for x in lines_of(photos, "test")]
    table = write(photos / "validation.csv", "path,label,split", *lines)
    assert len(open_source(table, "test")) == 9
    fails("no 'train' images, only 'validation', 'test': add them, or", table, "train")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_train_and_test_may_be_tables_of_their_own(photos, tmp_path, kind):
    for split in ("train", "test"):
        rows = [(str(f), f.parent.name) for f in listed(photos, split)]
        if kind == "csv":
            write(tmp_path / f"{split}.csv", "path,label", *map(",".join, rows))
        else:
            write(
                tmp_path / f"{split}.jsonl",
                *(json.dumps({"path": p, "label": label}) for p, label in rows),
            )
    train, test = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "test")
    assert (len(train), len(test), train.labels) == (18, 9, test.labels)
    np.testing.assert_array_equal(test[4]["image"], read(listed(photos, "test")[4]))


@pytest.mark.parametrize(
    "lines",
    [
        ["path,label", "{0},cat;dog", "{1},dog", "{2},"],
        ["path,labels", "{0}, cat ; dog ;", "{1},dog", '{2},""'],
    ],
)
def test_several_labels_make_columns_of_0_and_1(photos, tmp_path, lines):
    files = listed(photos, "train")
    table = write(tmp_path / "several.csv", *(line.format(*files) for line in lines))
    source = open_source(table, "train+test")
    order = np.argsort([str(key) for key in source.keys])
    found = [source[i]["label"].tolist() for i in order]
    assert found == [[1, 1], [0, 1], [0, 0]]
    assert source.multi_label


def test_json_lines_may_hold_lists_of_labels_and_numbers(photos, tmp_path):
    files = [str(f) for f in listed(photos, "train")]
    rows = [
        {"path": files[0], "labels": ["b", "a"], "split": "train"},
        {"path": files[1], "label": 7, "split": "train"},
        {"path": files[2], "labels": [], "split": "train"},
    ]
    table = write(tmp_path / "x.jsonl", *map(json.dumps, rows), "")
    source = open_source(table, "train")
    assert source.labels == ("7", "a", "b")
    assert [source[i]["label"].tolist() for i in range(3)] == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_batches_of_several_labels_are_floats(photos, tmp_path):
    files = listed(photos, "train")
    rows = [f"{f},{f.parent.name};{'odd' if i % 2 else 'even'},train" for i, f in enumerate(files)]
    source = open_source(write(tmp_path / "t.csv", "path,labels,split", *rows), "train")
    ops = parse("resize(8)")
    expected = np.array([source[i]["label"] for i in range(18)])
    batches = list(eval_batches(source, ops, batch_size=7))
    labels = np.concatenate([b["label"] for b in batches])
    assert (labels.dtype, labels.shape) == (np.float32, (21, 5))
    np.testing.assert_array_equal(labels[:18], expected)
    assert not labels[18:].any()
    batch = next(train_batches(source, ops, batch_size=18, seed=0))
    assert sorted(map(tuple, batch["label"])) == sorted(map(tuple, expected))


def test_mistakes_are_named_with_their_line(photos, tmp_path):
    def table(*lines, name="t.csv"):
        return write(tmp_path / name, *lines)

    def split(*lines):
        return table("path,label,split", *lines)

    a, b, *_ = listed(photos, "train")
    fails(
        "t.csv line 3: there is no .*nowhere.jpg .and 1 more.",
        table("path,label", f"{a},x", "nowhere.jpg,y", "no/where.jpg,y"),
    )
    fails("t.csv line 3: no label", table("path,label", f"{a},x", f"{b},"))
    fails("t.csv line 3: no label", table("path,label", f"{a},x", f"{b}"))
    fails("t.csv line 2: no path", table("path,label", ",x"))
    fails("first line names the columns 'a, b', not path and label", table("a,b", "1,2"))
    fails("no images", table("path,label"))
    fails("only one class .'x'.*expected two", table("path,label", f"{a},x", f"{b},x"))
    fails(
        "t.csv line 4: class 'dgo' is not among the training classes.*mean 'dog'",
        split(f"{a},dog,train", f"{b},cat,train", f"{b},dgo,test"),
    )
    fails("t.csv line 3: no split", split(f"{a},dog,train", f"{b},cat,"))
    fails("can't be read", table("path,label", '"never ends,x'))
    fails("line 2 has 3 cells and the first 2: put quotes", table("path,label", f"{a},x,y"))
    assert len(open_source(table("path,label", f"{a},x,", f"{b},y, ,"), "train")) == 2
    (tmp_path / "latin.csv").write_bytes(b"path,label\n\xe9.jpg,x\n")
    fails("latin.csv: can't be read .*UTF-8", str(tmp_path / "latin.csv"))
    fails("x.jsonl line 1: no path", table("{broken", name="x.jsonl"))
    fails("x.jsonl line 1: no path", table("[1, 2]", name="x.jsonl"))
    row = json.dumps({"path": str(a), "labels": [{"not": "text"}]})
    fails("x.jsonl line 1: labels are", table(row, name="x.jsonl"))
    for path in ("p\0/a.jpg", "a\0.jpg", "\ud800/a.jpg"):
        row = json.dumps({"path": path, "label": "x"})
        fails("x.jsonl line 1: there is no ", table(row, name="x.jsonl"))
    fails("there is no such folder or file", str(tmp_path / "nowhere.csv"))


@given(st.text(max_size=60))
def test_any_text_is_a_table_or_a_user_error(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.csv", "a.jsonl"):
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(UserError):  # it names no image that is there
            open_source(str(folder / name), "train")


def test_a_large_table_is_light(tmp_path):
    count = 100_000
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").touch()
    rows = "".join(f"p/a.jpg,class {i % 1000},train\n" for i in range(count))
    (tmp_path / "many.csv").write_text("path,label,split\n" + rows)
    source = open_source(str(tmp_path / "many.csv"), "train")
    assert (len(source), len(source.labels)) == (count, 1000)
    assert source.keys.nbytes + source.label_ids.nbytes < 40 * count
