import csv
import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from vit_jax.checkpoints import augreg
from vit_jax.errors import UserError

COLUMNS = (
    *("name", "ds", "lr", "aug", "wd", "do", "sd", "best_val", "final_val", "final_test"),
    *("adapt_ds", "adapt_lr", "adapt_steps", "adapt_resolution", "adapt_final_val"),
    *("adapt_final_test", "params", "infer_samples_per_sec", "filename", "adapt_filename"),
)


def made_rows() -> list[dict]:
    """A small table with the columns of the real one."""
    rows = []
    models = [
        ("Ti/16", "Ti_16", 5_526_346),
        ("B/16", "B_16", 86_567_656),
        ("R+Ti/16", "R_Ti_16", 6),
    ]
    pretrained = itertools.product(models, ["i21k", "i1k"], ["none", "medium1"], [0.03, 0.1])
    for number, ((name, stem, params), ds, aug, wd) in enumerate(pretrained):
        file = f"{stem}-{ds}-300ep-lr_0.001-aug_{aug}-wd_{wd}-do_0.0-sd_0.0"
        score = round(0.3 + number * 7 % 24 / 100, 4)
        first = [name, ds, 0.001, aug, wd, 0.0, 0.0, score + 0.01, score, score - 0.01]
        for adapt, res in [("imagenet2012", 224), ("imagenet2012", 384), ("cifar100", 224)]:
            adapted = f"{file}--{adapt}-steps_20k-lr_0.03-res_{res}"
            test = round(0.7 + (number * 5 + res) % 24 / 100, 4)
            cells = [*first, adapt, 0.03, 20000, res, test, test, params, 797.8, file, adapted]
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    last = dict.fromkeys(COLUMNS, "") | {"name": "S/16", "ds": "i21k", "aug": "none"}
    return [*rows, last | {"final_val": 0.4, "filename": "S_16-i21k-1ep-x"}]


def write_index(path, rows) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["", *COLUMNS], restval=0)  # A column without a name, too.
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def rows(tmp_path):
    write_index(tmp_path / "index.csv", made_rows())
    return augreg.read_index(tmp_path / "index.csv")


def test_the_table_is_read_with_its_types(rows):
    expected = [{k: None if v == "" else v for k, v in row.items()} for row in made_rows()]
    assert rows == expected
    types = {"name": str, "wd": float, "final_val": float, "params": int, "adapt_resolution": int}
    assert {column: type(rows[0][column]) for column in types} == types


def test_nan_is_nothing(tmp_path):
    (tmp_path / "i.csv").write_text("name,ds,final_val,filename\nB/16,i21k,nan,f\nB/16,i1k,.5,f\n")
    assert [row["final_val"] for row in augreg.read_index(tmp_path / "i.csv")] == [None, 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no AugReg index: no column name, found nothing"),
        (b"a,b\n1,2\n", "no column name, found a, b"),
        (b"name,ds,final_val,filename\n1,2\n", "line 2 has 2 cells, expected 4"),
        (b"name,ds,final_val,filename,ds\n1,2,3,4,5\n", "a column twice"),
        (b"\xff\xfe\x00", "can't be read as a table"),
    ],
)
def test_what_is_no_table_is_said(tmp_path, content, message):
    (tmp_path / "index.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        augreg.read_index(tmp_path / "index.csv")


@pytest.mark.parametrize("model", ["Ti_16", "B_16", "R_Ti_16"])
def test_recommended_is_the_best_on_imagenet21k(rows, model):
    best = max(
        (row["final_val"], row["filename"])
        for row in rows
        if row["ds"] == "i21k" and row["filename"].startswith(f"{model}-")
    )
    assert augreg.recommended(rows, model) == best[1]


def test_a_model_that_is_not_there_is_said(rows):
    with pytest.raises(UserError, match="no L_16 pre-trained"):
        augreg.recommended(rows, "L_16")


@pytest.mark.parametrize(
    ("official", "short"),
    [("ViT-B_16", "B_16"), ("R+ViT-Ti_16", "R_Ti_16"), ("R26+ViT-S_32", "R26_S_32")],
)
def test_model_names_are_those_of_the_files(official, short):
    assert augreg.model_of(official) == short
    assert augreg.is_file_name(f"{short}-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0")


@pytest.mark.parametrize("name", ["B_16", "S_16-gap-norep", "B_16-i21k-300ep-../x", "X_16-a-1ep-b"])
def test_other_names_are_no_file_names(name):
    assert not augreg.is_file_name(name)


# Each holds for some rows and not for others; Python itself is the reference.
QUERIES = [
    "name == 'B/16' and ds == 'i21k'",
    "name=='B/16' or not ds=='i21k'",
    "wd < 0.1",
    "0.02 < wd <= 0.03 and final_val >= 0.4",
    "adapt_ds in ('cifar100', 'x') and adapt_resolution != 384",
    "name not in ['B/16', 'Ti/16']",
    "'medium' in aug",
    "aug > 'medium1'",
    "final_val > -1 and (params < 1e7 or wd == 0.1)",
    "adapt_ds != 'cifar100'",
]


@pytest.mark.parametrize("text", QUERIES)
def test_queries_choose_what_python_would(rows, text):
    whole = [row for row in rows if None not in row.values()]
    expected = [row for row in whole if eval(text, {}, dict(row))]
    assert augreg.query(whole, text) == expected
    assert 0 < len(expected) < len(whole)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("wd < 1", False),
        ("wd > -1", False),
        ("wd == None", True),
        ("adapt_ds != 'cifar100'", True),
        ("'x' in adapt_ds", False),
        ("adapt_ds in 'cifar100'", False),
        ("adapt_ds not in 'cifar100'", True),
        ("adapt_ds in (None, 'x')", True),
        ("'x' not in adapt_ds", True),
    ],
)
def test_what_is_missing_is_neither_above_nor_below_anything(rows, text, holds):
    last = rows[-1]
    assert last["wd"] is None
    assert (augreg.query([last], text) == [last]) == holds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nam == 'B/16'", "no column 'nam': did you mean name"),
        ("zzz == 1", "no column 'zzz': known: name, ds"),
        ("name = 'B/16'", "can't be understood"),
        ("name == ", "can't be understood"),
        ("", "can't be understood"),
        ("__import__('os').system('true')", "can't contain"),
        ("name.__class__ == 1", "can't contain 'name.__class__'"),
        ("[c for c in name]", "can't contain"),
        ("name[0] == 'B'", "can't contain"),
        ("(lambda: 1)() == 1", "can't contain"),
        ("wd + 1 == 2", "can't contain"),
        ("name is None", "can't contain"),
        ("f'{name}' == 'B/16'", "can't contain"),
        ("wd < '0.1'", "texts stand in quotes"),
        ("1 in wd", "texts stand in quotes"),
        ("b'x' == name", "can't contain"),
        ("not " * 700 + "wd == 0.1 == ", "can't be understood"),
        ("not " * 100_000 + "wd", "can't be understood|nested"),
        ("((((" * 1000, "can't be understood"),
    ],
)
def test_anything_else_is_refused_in_one_line(rows, text, message):
    with pytest.raises(UserError, match=message) as caught:
        augreg.query(rows[:1], text)
    assert "\n" not in str(caught.value)


@given(st.text("nameds='B/16' andorti()[],<>!0.", max_size=40) | st.text(max_size=20))
@example("\x00")
@example("name == '\ud800'")
def test_any_text_is_a_query_or_a_mistake(text):
    row = {"name": "B/16", "ds": "i21k", "wd": 0.1}
    try:
        chosen = augreg.query([row], text)
    except UserError:
        return
    assert chosen in ([], [row])


def test_sorting_is_highest_first_with_the_missing_last(rows):
    found = [row["wd"] for row in augreg.sort(rows, "wd")]
    assert found == [*sorted(found[:-1], reverse=True), None]
    with pytest.raises(UserError, match="did you mean final_val"):
        augreg.sort(rows, "fnal_val")
