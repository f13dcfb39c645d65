import csv
import json

import pytest

from vit_jax.checkpoints import hub
from vit_jax.cli import main
from vit_jax.models import list_models
from vit_jax.models.lit import LIT_VARIANTS

COLUMNS = (
    *("name", "ds", "lr", "aug", "wd", "do", "sd", "best_val", "final_val", "final_test"),
    *("adapt_ds", "adapt_lr", "adapt_steps", "adapt_resolution", "adapt_final_val"),
    *("adapt_final_test", "params", "infer_samples_per_sec", "filename", "adapt_filename"),
)


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """A made table in the cache: 2 models x 2 data sets x 4 decays, each fine-tuned three times."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv("VIT_JAX_OFFLINE", "1")
    path = hub.cache_path(hub.AUGREG_INDEX)
    path.parent.mkdir(parents=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval=0)
        writer.writeheader()
        for name in ("Ti/16", "B/16"):
            for ds in ("i21k", "i1k"):
                for decay in range(4):
                    stem = f"{name.replace('/', '_')}-{ds}-300ep-wd_{decay}"
                    for number, adapt in enumerate(("imagenet2012", "cifar100", "pets")):
                        writer.writerow(
                            {
                                "name": name,
                                "ds": ds,
                                "wd": decay,
                                "aug": "none",
                                "final_val": 0.4 + decay / 100,
                                "adapt_ds": adapt,
                                "adapt_resolution": 224,
                                "filename": stem,
                                "adapt_final_val": 0.7 if (ds, decay) == ("i21k", 1) else 0.6,
                                "adapt_final_test": 0.9 - decay / 10 + number / 100,
                                "adapt_filename": f"{stem}--{adapt}-res_224",
                            }
                        )
    return path


def run(capsys, *args: str) -> tuple[int, str, str]:
    status = main(["models", *args])
    out, err = capsys.readouterr()
    return status, out, err


def test_pretrained_checkpoints_are_listed_once_best_first(capsys):
    query = "name=='B/16' and ds=='i21k'"
    status, out, _ = run(capsys, "--augreg", query, "--sort", "final_val", "--top", "3", "--json")
    assert status == 0
    rows = json.loads(out)
    assert [row["filename"] for row in rows] == [f"B_16-i21k-300ep-wd_{d}" for d in (3, 2, 1)]
    assert not any(column.startswith("adapt_") for column in rows[0])


def test_fine_tuned_ones_are_listed_if_the_query_or_the_order_asks_for_them(capsys):
    _, out, _ = run(capsys, "--augreg", "adapt_ds=='pets' and ds=='i1k'", "--json")
    assert len(json.loads(out)) == 8
    _, out, _ = run(capsys, "--augreg", "--sort", "adapt_final_test", "--top", "2", "--json")
    assert [row["adapt_ds"] for row in json.loads(out)] == ["pets", "pets"]


def test_the_table_shows_files_and_the_column_it_is_sorted_by(capsys):
    _, out, _ = run(capsys, "--augreg", "name=='Ti/16'", "--sort", "wd", "--top", "2")
    header, first, second, last, recommended, best = out.splitlines()
    assert recommended == "augreg/Ti_16, recommended: Ti_16-i21k-300ep-wd_3"
    assert best == (
        "augreg/Ti_16+imagenet2012, best after fine-tuning: "
        "Ti_16-i21k-300ep-wd_1--imagenet2012-res_224 (0.7 on its held-out part)"
    )
    assert header.split() == ["name", "ds", "final_val", "final_test", "wd", "filename"]
    assert first.split() == ["Ti/16", "i21k", "0.43", "0", "3", "Ti_16-i21k-300ep-wd_3"]
    assert second.endswith("Ti_16-i1k-300ep-wd_3")
    assert last.startswith("2 checkpoints")


def test_nothing_found_is_said(capsys):
    assert run(capsys, "--augreg", "name=='X'") == (0, "no AugReg checkpoint fits the query\n", "")
    assert json.loads(run(capsys, "--augreg", "name=='X'", "--json")[1]) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--augreg", "nme=='X'"], "no column 'nme': did you mean name"),
        (["--augreg", "name"], None),
        (["--augreg", "--sort", "final_vla"], "did you mean final_val"),
        (["--augreg", "--top", "0"], "argument --top: '0' is no whole number of at least 1"),
        (["--sort", "final_val"], "--sort and --top are for --augreg"),
        (["--top", "5"], "--sort and --top are for --augreg"),
    ],
)
def test_mistakes_are_one_line(capsys, args, message):
    status, _, err = run(capsys, *args)
    assert (status, err.count("\n")) == ((2, 1) if message else (0, 0))
    assert (message or "") in err


def test_without_the_table_the_address_is_told(capsys, index):
    index.unlink()
    status, _, err = run(capsys, "--augreg")
    assert status == 2
    assert "/vit_models/augreg/index.csv by hand" in err


def test_every_model_is_listed_with_its_cost_and_sources(capsys, monkeypatch):
    few = ["ViT-Ti_16", "ViT-B_16", "Mixer-B_32"]
    monkeypatch.setattr("vit_jax.models.list_models", lambda: few)
    _, out, _ = run(capsys)
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:9]] == [*few, *LIT_VARIANTS]
    assert lines[2].split()[1:4] == ["86.6", "M", "35.1"]
    assert lines[2].endswith("augreg, imagenet21k, imagenet21k+imagenet2012, sam")
    rows = json.loads(run(capsys, "--json")[1])
    assert [row["name"] for row in rows] == [*few, *LIT_VARIANTS]
    assert rows[0]["parameters"] == 5_717_416
    assert rows[0]["tokens"] == 197
    assert "augreg/Ti_16" in rows[0]["sources"]


@pytest.mark.slow
def test_the_whole_list_can_be_counted(capsys):
    rows = json.loads(run(capsys, "--json")[1])
    assert [row["name"] for row in rows] == [*list_models(), *LIT_VARIANTS]
    assert all(row["flops"] > 0 for row in rows)


@pytest.mark.slow
def test_parameters_are_those_of_the_official_models(capsys, shared):
    rows = json.loads(run(capsys, "--json")[1])
    found = {row["name"]: row["parameters"] for row in rows}
    files = sorted((shared / "official" / "manifests").glob("*iT*.json"))
    files += sorted((shared / "official" / "manifests").glob("Mixer*.json"))
    for file in files:
        counts = json.loads(file.read_text())["n_params"]
        assert found[file.stem] in counts.values(), file.stem
