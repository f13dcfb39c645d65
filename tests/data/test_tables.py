"""CSV and JSONL tables of images."""

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.images import listed, write_photos
from vit_jax.data import (
    data_fingerprint,
    eval_batches,
    open_source,
    parse,
    read,
    remarks,
    tables,
    train_batches,
)
from vit_jax.data.source import Source, held_out_splits
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


# Tables of other programs.


@pytest.mark.parametrize(
    ("name", "head", "delimiter", "encoding"),
    [
        *(("excel.csv", "path;label", ";", "utf-16"), ("tabs.csv", "path\tlabel", "\t", "utf-8")),
        *(("t.tsv", "label\tpath", "\t", "utf-16-le"), ("big.csv", "path,label", ",", "utf-16")),
        *(
            ("keras.csv", "Filename,Label", ",", "utf-8-sig"),
            ("q.csv", '"path";"label"', ";", "utf-8"),
        ),
    ],
)
def test_tables_of_other_programs_are_read(photos, name, head, delimiter, encoding):
    files = [f.relative_to(photos) for f in listed(photos, "train")]
    plain = write(photos / "plain.csv", "path,label", *lines_of(photos, "train"))
    columns = [
        (f.parent.name, f) if head.startswith("label") else (f, f.parent.name) for f in files
    ]
    text = "\r\n".join([head, *(f"{a}{delimiter}{b}" for a, b in columns), ""])
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (photos / name).write_bytes((mark + text).encode(encoding))
    source, expected = (open_source(str(p), "train") for p in (photos / name, plain))
    assert data_fingerprint(source) == data_fingerprint(expected)
    assert source.labels == ("bee", "cat", "dog")


def test_what_columns_are_taken_for_and_which_are_not_used_is_said(photos):
    rows = (f"{i},{line},7" for i, line in enumerate(lines_of(photos, "train")))
    source = open_source(write(photos / "p.csv", ",Image,Class,age", *rows), "train")
    assert remarks(source) == [
        "of p.csv the column 'Image' is taken for the path",
        "of p.csv the column 'Class' is taken for the label",
        "of p.csv columns are not used: '', 'age'",
        "no test split of its own: a fifth of the images is held out for testing",
    ]


@pytest.mark.parametrize(("one", "zero"), [("1", "0"), ("1.0", "0.0")])
def test_a_column_for_each_class_is_read_as_labels(photos, one, zero):
    files = listed(photos, "train")
    names = ("dog", "bee", "cat", "MEL")
    rows = [
        ",".join([str(f), *(one if n == f.parent.name else zero for n in names)]) for f in files
    ]
    source = open_source(write(photos / "hot.csv", f"image,{','.join(names)}", *rows), "train+test")
    assert (source.labels, source.multi_label) == (("bee", "cat", "dog"), False)
    assert all(
        source.describe(i).split("/")[-2] == source.labels[source[i]["label"]] for i in range(18)
    )
    assert "of hot.csv no image is of 'MEL'" in remarks(source)
    several = write(
        photos / "several.csv",
        "image,a,b,split",
        f"{files[0]},1,1,train",
        f"{files[1]},0,1,train",
        f"{files[2]},0,0,train",
    )
    source = open_source(several, "train")
    assert [source[i]["label"].tolist() for i in range(3)] == [[1, 1], [0, 1], [0, 0]]
    odd = write(photos / "odd.csv", "path,a,age", f"{files[0]},1,34")
    fails("no column is called label, and 'age' in line 2 is '34', not 0 or 1", odd)
    for rest in (",1", ",1,", ",, 1"):
        short = write(photos / "short.csv", "path,a,b", f"{files[0]},0,1", f"{files[1]}{rest}")
        fails("'[ab]' in line 3 is '', not 0 or 1", short)


def test_images_are_found_by_names_that_are_spelled_another_way(photos, tmp_path):
    for i, name in enumerate(("0001.jpg", "0002.JPEG", "caf\u00e9.png", "Upper.JPG")):
        folder = tmp_path / "Br\u00e4u" if i % 2 else tmp_path
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(listed(photos, "train")[i].read_bytes())
    folder = unicodedata.normalize("NFD", "br\u00e4u")
    rows = ["0001,a", f"{folder}\\0002,b", "cafe\u0301.png,a", f"{folder}/upper.jpg,b"]
    source = open_source(write(tmp_path / "t.csv", "id,label", *rows), "train+test")
    found = ["0001.jpg", "Br\u00e4u/0002.JPEG", "Br\u00e4u/Upper.JPG", "caf\u00e9.png"]
    assert sorted(source.keys) == found
    assert all(source[i]["image"].shape[2] == 3 for i in range(4))
    assert remarks(source)[1] == "4 images have another name than in the table, as 0001.jpg (0001)"
    (tmp_path / "0001.png").touch()
    fails(
        r"t.csv line 2: 0001 may be 0001.jpg or 0001.png; write it in full", str(tmp_path / "t.csv")
    )
    numbers = [json.dumps({"image_id": 2, "label": "x"}), json.dumps({"image_id": 3, "label": "y"})]
    (tmp_path / "2.jpg").touch()
    (tmp_path / "3.jpg").touch()
    assert len(open_source(write(tmp_path / "n.jsonl", *numbers), "train+test")) == 2


def test_splits_of_tables_are_known_by_their_usual_names(photos, tmp_path):
    rows = [f"{f},{f.parent.name}" for f in listed(photos, "train")]
    write(tmp_path / "Training.csv", "path,label", *rows[::2])
    write(tmp_path / "valid.csv", "path,label", *rows[1::2])
    assert [len(open_source(str(tmp_path), split)) for split in ("train", "test")] == [9, 9]
    (tmp_path / "train.jsonl").touch()
    fails("Training.csv and train.jsonl are both the table of the split 'train'", str(tmp_path))
    names = ["TRAIN", "Testing"]
    split = [f"{row},{names[i % 2]}" for i, row in enumerate(rows)]
    one = write(tmp_path / "one.csv", "path,label,Split", *split)
    assert [len(open_source(one, split)) for split in ("train", "test")] == [9, 9]


# What stays together.


def test_rows_of_the_same_image_stay_together(photos):
    lines = lines_of(photos, "train")
    rows = [line for i, line in enumerate(lines) for _ in range(1 + 2 * (i % 4 == 0))]
    rows[1] = f"./train/../{rows[1]}"
    table = write(photos / "repeated.csv", "path,label", *rows)
    train, test = (open_source(table, split) for split in ("train", "test"))
    images = [{p.removeprefix("./train/../") for p in source.keys} for source in (train, test)]
    assert not images[0] & images[1]
    assert len(train) + len(test) == len(rows) == 28
    assert 4 <= len(test) <= 8
    assert "10 rows name an image again; the rows of one stay together" in remarks(train)
    other = write(photos / "differ.csv", "path,label", *lines, lines[0].replace(",bee", ",cat"))
    assert "1 rows name an image again with another label" in " ".join(
        remarks(open_source(other, "train"))
    )
    across = write(
        photos / "across.csv",
        "path,label,split",
        *(f"{x},train" for x in lines),
        f"{lines[0]},test",
    )
    assert f"in several splits are the images or groups '{lines[0][:-4]}'" in remarks(
        open_source(across, "train")
    )


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=30, max_size=60),
    st.integers(0, 99),
)
def test_images_of_a_group_stay_together(groups, seed):
    source = Source(
        "g",
        ("a", "b", "c"),
        3,
        range(len(groups)),
        np.array([c for _, c in groups], np.int32),
        str,
        str,
    )
    splits = held_out_splits(lambda: source, seed, [f"patient {g}" for g, _ in groups])
    train, test = (splits[name]().keys.tolist() for name in ("train", "test"))
    assert sorted(train + test) == list(range(len(groups)))
    assert not {groups[i][0] for i in train} & {groups[i][0] for i in test}
    assert len(test) <= 0.4 * len(groups) + 2
    largest = max(sum(g == group for g, _ in groups) for group in range(10))
    assert len(test) >= 0.2 * len(groups) - largest - 2


def test_groups_of_one_image_are_held_out_as_images_are(photos):
    lines = lines_of(photos, "train")
    plain = write(photos / "plain.csv", "path,label", *lines)
    alone = write(
        photos / "alone.csv", "path,label,group", *(f"{x},{x.split(',')[0]}" for x in lines)
    )
    for split in ("train", "test"):
        one, other = (open_source(table, split, seed=5) for table in (plain, alone))
        assert data_fingerprint(one) == data_fingerprint(other)
    patients = [f"{x},{i % 6}" for i, x in enumerate(lines)]
    table = write(photos / "patients.csv", "path,label,group", *patients)
    group = {row.split(",")[0]: row[-1] for row in patients}
    train, test = ({group[key] for key in open_source(table, s).keys} for s in ("train", "test"))
    assert test
    assert not train & test


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
    for missing in ("nan", "NaN", "<NA>"):
        table_ = table("path,label", f"{a},x", f"{b},{missing}")
        fails(f"t.csv line 3: the label is '{missing}', as programs write that", table_)
    fails(
        "x.jsonl line 1: the label is 'nan'",
        table(json.dumps({"path": str(a), "label": float("nan")}), name="x.jsonl"),
    )
    fails(
        "x.jsonl line 1: labels are",
        table(json.dumps({"path": str(a), "label": {}}), name="x.jsonl"),
    )
    fails("first line names a column 'label' twice", table("path,label,label", f"{a},x,y"))
    fails(
        "line 2 has 3 cells and the first 2: put quotes around what has a ';' in",
        table("path;label", f"{a};x;y"),
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


def test_groups_that_differ_and_labels_that_may_be_missing_are_doubts(photos):
    lines = lines_of(photos, "train")
    rows = [f"{line},g{i // 2}" for i, line in enumerate(lines)]
    table = write(photos / "groups.csv", "path,label,group", *rows, f"{lines[0]},g5")
    said = "1 rows name an image again with another group, of which the first counts"
    assert any(said in text for text in remarks(open_source(table, "train")))
    named = [f"{line.split(',')[0]},{('NA', 'None', 'cat')[i % 3]}" for i, line in enumerate(lines)]
    table = write(photos / "missing.csv", "path,label", *named)
    said = "of missing.csv the classes 'NA', 'None' may be how a program writes"
    assert any(said in text for text in remarks(open_source(table, "train")))


def test_groups_may_be_any_text(photos):
    rows = [
        {"path": path, "label": label, "group": "\ud800" if i < 3 else f"g\t{i}"}
        for i, (path, label) in enumerate(x.split(",") for x in lines_of(photos, "train"))
    ]
    table = write(photos / "odd.jsonl", *map(json.dumps, rows))
    assert len(open_source(table, "train")) + len(open_source(table, "test")) == len(rows)


@given(
    st.text(max_size=60),
    st.sampled_from(["", "path,label\n", "id;a;b\n", "Image\tclass\tgroup\n", '{"path": "']),
    st.sampled_from(["utf-8", "utf-16", "utf-16-le"]),
)
def test_any_text_is_a_table_or_a_user_error(tmp_path_factory, text, head, encoding):
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.csv", "a.jsonl", "a.tsv"):
        (folder / name).write_text(head + text, encoding=encoding, errors="surrogatepass")
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


def test_paths_without_endings_are_looked_up_and_not_searched_for(photos, tmp_path, monkeypatch):
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    count = 2_000
    (image, *_) = listed(photos, "train")
    names = [f"{i}.jpg" for i in range(count)]
    (tmp_path / names[0]).write_bytes(image.read_bytes())
    monkeypatch.setattr(tables, "list_folder", lambda folder: map(Name, names))
    table = write(tmp_path / "labels.csv", "path,label", *(f"{i},{i % 2}" for i in range(count)))
    assert len(open_source(table, "train")) == count - count // 5
    assert compared < 10 * count  # Each with each would be four millions.
