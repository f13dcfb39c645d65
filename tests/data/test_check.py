"""What `vit-jax data check` finds, and how it tells."""

import json
import os
import pty
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from vit_jax import cli
from vit_jax.data import check as checking
from vit_jax.data import open_source
from vit_jax.data.check import check
from vit_jax.data.source import Source
from vit_jax.errors import UserError


def image(seed, height=6, width=9):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture
def clean(tmp_path):
    """Ten images, no two alike."""
    for i in range(10):
        part, name = ("test" if i > 6 else "train"), "ab"[i % 2]
        save(tmp_path / "data" / part / name / f"{i}.png", image(i, height=6 + i))
    return tmp_path / "data"


@pytest.fixture
def dirty(clean):
    """The same with one of everything that can be wrong."""
    save(clean / "test" / "a" / "leak.png", image(0))
    save(clean / "train" / "b" / "contradiction.bmp", image(2, height=8))
    save(clean / "train" / "b" / "twice.bmp", image(3, height=9))
    save(clean / "train" / "a" / "grey.png", np.full((50, 20, 3), 7, np.uint8))
    (clean / "train" / "a" / "half.png").write_bytes(
        (clean / "train" / "a" / "0.png").read_bytes()[:100]
    )
    (clean / "train" / "b" / "nowhere.jpg").symlink_to("gone.jpg")
    return clean


def checked(root, **options):
    splits = {name: open_source(str(root), name) for name in ("train", "test")}
    return check(splits, **options)


def names(group):
    return [os.sep.join(p.name.split(os.sep)[-3:]) for p in group]


def test_clean_data_has_no_problem(clean):
    result = checked(clean)
    assert result.problems == result.identical == []
    train, test = result.splits["train"], result.splits["test"]
    assert (train.count, test.count) == (7, 3)
    assert train.class_counts.tolist() == [4, 3]
    assert test.class_counts.tolist() == [1, 2]
    assert sorted(train.sizes.tolist()) == [[6 + i, 9] for i in range(7)]
    assert train.channels == {3: 7}
    assert "Nothing was found" in checking.summary(result)


def test_everything_that_is_wrong_is_found_and_named(dirty):
    result = checked(dirty)
    train = result.splits["train"]
    assert [text.split(": ")[1] for text in train.unreadable] == [
        "truncated or damaged PNG file; replace or remove it",
        "can't be read (No such file or directory); expected an image file",
    ]
    assert [names(g) for g in result.leaks] == [["train/a/0.png", "test/a/leak.png"]]
    assert [names(g) for g in result.contradictions] == [
        ["train/a/2.png", "train/b/contradiction.bmp"]
    ]
    assert result.duplicates("train") == 2
    assert result.duplicates("test") == 0
    assert train.grey == 1
    assert train.count == 12
    assert train.class_counts.sum() == len(train.sizes) == 10
    assert result.problems == [
        "2 images of train can't be read (1 .png, 1 .jpg)",
        "1 image found in several splits",
        "1 image found under several classes",
    ]


def test_a_core_that_this_process_was_given_is_a_thread(monkeypatch):
    seen = set()

    def read(key):
        seen.add(threading.get_ident())
        time.sleep(0.001)
        return np.full((2, 2, 1), key % 251, np.uint8)

    source = Source("mine", ("a", "b"), 1, range(3000), np.zeros(3000, np.int32), read, str)
    monkeypatch.setattr("vit_jax.data.check.own_cores", lambda: 3)
    check({"train": source})
    assert len(seen) == 3


@pytest.mark.parametrize("threads", [1, 7])
def test_the_result_does_not_depend_on_threads(dirty, threads):
    one, other = checked(dirty, threads=threads), checked(dirty)
    assert checking.as_dict(one) == checking.as_dict(other)


def test_the_same_pixels_in_another_shape_are_another_image(tmp_path):
    pixels = image(0, height=4, width=6)
    for i, shape in enumerate([(4, 6, 3), (6, 4, 3), (8, 3, 3)]):
        save(tmp_path / "ab"[i % 2] / f"{i}.png", pixels.reshape(shape))
    assert check({"all": open_source(str(tmp_path), "train")}).identical == []


def test_a_class_without_training_images_is_a_problem():
    split = "train[:20]"
    source = Source(
        name="few",
        labels=("a", "b", "c"),
        channels=1,
        keys=range(4),
        label_ids=np.array([0, 0, 2, 2], np.int32),
        read_key=lambda key: np.full((2, 2, 1), 80 * key, np.uint8),
        describe_key="few[{}]".format,
    )
    assert check({split: source}).problems == ["train[:20] has no image of 'b'"]
    assert check({"test": source}).problems == []


def test_values_that_lie_in_a_sliver_are_a_problem(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 4096, (16, 16), dtype=np.uint16)
        save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", pixels)
    assert run(capsys, tmp_path / "data", "--out", tmp_path)[0] == 1
    text = (tmp_path / "check.txt").read_text()
    assert "of 65,535: set --config.levels='12 bit' if they have no more bits" in text
    assert "values      0 to 4,09" in text
    assert text.count(", uint16") == 2  # Of train and test.


def test_values_come_from_all_over_each_image():
    rows = np.arange(120, dtype=np.uint8)[:, None, None]
    pixels = np.ascontiguousarray(np.broadcast_to(rows, (120, 100, 12)))
    source = Source("m", ("a", "b"), 12, range(200), np.arange(200) % 2, lambda key: pixels, str)
    found = check({"train": source}).splits["train"].values
    assert len(found) <= 2 * checking._VALUES
    assert (found.min() < 20, found.max() >= 100) == (True, True)


def test_what_decoding_leaves_out_is_counted_and_damage_a_problem(clean, capsys):
    half = cv2.imencode(".jpg", image(9, 64, 64))[1].tobytes()
    (clean / "train" / "a" / "half.jpg").write_bytes(half[: len(half) // 2] + b"\xff\xd9")
    for name, count in (("more", 30), ("most", 31)):
        (clean / "train" / "a" / f"{name}.jpg").write_bytes(half[:-2] + bytes(count) + half[-2:])
    frames = [Image.fromarray(image(i, 64, 64)).convert("L") for i in (20, 21)]
    frames[0].save(clean / "train" / "b" / "two.gif", save_all=True, append_images=frames[1:])
    save(clean / "test" / "b" / "alpha.png", np.dstack([image(30), image(30)[..., 0]]))
    save(clean / "test" / "b" / "deep.png", image(31).astype(np.uint16) * 257)
    result = checked(clean)
    assert [text.split(": ")[1] for text in result.splits["train"].unreadable] == [
        "truncated or damaged JPEG file; replace or remove it"
    ]
    remarks = result.splits["train"].remarks
    assert remarks["of several pages or frames, of which the first is read"] == 1
    assert result.splits["test"].remarks == {"with transparency, which is dropped": 1}
    said = "of which libjpeg says: Corrupt JPEG data: ... extraneous bytes"
    assert any(p.startswith(f"2 images of train may be damaged, {said}") for p in result.problems)
    listed = checking.details(result, limit=1)
    assert f"Perhaps damaged\n  {clean}/train/a/more.jpg: {said}" in listed
    assert "... and 1 more" in listed
    assert len(checking.as_dict(result)["splits"]["train"]["damaged"]) == 2
    assert "test has images of several types, 1 of uint16 and 4 of uint8" in result.problems
    assert "1 image of several pages or frames, of which the first is read" in (
        checking.summary(result)
    )


def test_images_of_twelve_channels_are_checked_and_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(10):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.normal(size=(16, 16, 12)).astype(np.float32)
        pixels[0, 0, 0] = np.nan if i == 3 else 0
        np.save(tmp_path / "data" / "ab"[i % 2] / f"{i}.npy", pixels)
    result = check({"all": open_source(str(tmp_path / "data"), "train+test")})
    split = result.splits["all"]
    assert split.channels == {12: 9}
    assert split.types == {"float32": 9}
    assert [text.split(": ")[1] for text in split.unreadable] == ["holds NaN or infinite values"]
    drawing = checking.write_report(result, tmp_path / "out", "title")[1]
    assert np.asarray(Image.open(drawing)).std() > 1


def test_images_of_several_labels_are_counted_for_each():
    source = Source(
        name="several",
        labels=("a", "b"),
        channels=1,
        keys=range(4),
        label_ids=np.array([[0, 1], [0, -1], [-1, -1], [1, -1]], np.int32),
        read_key=lambda key: np.full((2, 2, 1), min(key, 2), np.uint8),
        describe_key="several[{}]".format,
        multi_label=True,
    )
    result = check({"train": source})
    assert result.splits["train"].class_counts.tolist() == [2, 2]
    assert [[p.label for p in group] for group in result.contradictions] == [["no class", "b"]]


def test_progress_ends_with_all_images(dirty):
    told = []
    checked(dirty, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (16, 16)
    assert told == sorted(told)


def test_memory_is_bounded(tmp_path):
    """400 images of 1 MB each take the room of a few."""
    code = (
        "import resource, numpy as np\n"
        "from vit_jax.data.check import check\n"
        "from vit_jax.data.source import Source\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "read = lambda key: np.full((500, 700, 3), key % 256, np.uint8)\n"
        "source = Source('s', ('a', 'b'), 3, range(400), np.zeros(400, np.int32), read, str)\n"
        "before = used()\n"
        "check({'train': source}, threads=4)\n"
        "print(used() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 60  # MB, of 400


def test_interrupting_ends_at_once(dirty):
    def stop(done, total):
        raise KeyboardInterrupt

    source = Source(
        name="slow",
        labels=("a", "b"),
        channels=1,
        keys=range(100_000),
        label_ids=np.zeros(100_000, np.int32),
        read_key=lambda key: np.zeros((100, 100, 1), np.uint8),
        describe_key=str,
    )
    with pytest.raises(KeyboardInterrupt):
        check({"train": source}, progress=stop)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]


def test_what_was_left_out_or_guessed_is_told(clean):
    (clean / "train").rename(clean / "Training")
    (clean / "Training" / "b").rename(clean / "Training" / "A")
    (clean / "test" / "b").rename(clean / "test" / "A")
    (clean / "extra").mkdir()
    for name in ("x.dcm", "x.txt"):
        (clean / "Training" / "a" / name).write_text("no image")
    (clean / "Training" / "a" / "hostile\x1b[31m.heic").write_bytes(b"none")
    result = checked(clean)
    where = f"left out in {clean}/Training"
    assert result.notes == ["Training is the split train", f"{where}: 1 (.txt)"]
    assert result.problems == [
        f"left out in {clean}: folders beside the splits, 'extra'",
        f"{where}, as they are no images that can be read: 1 (.dcm); convert or remove them",
        "classes 'A' and 'a' are nearly named alike: merge them if they are one",
        "1 image of train can't be read (1 .heic)",
    ]
    told = checking.summary(result) + checking.details(result)
    assert all(text in told for text in result.notes + result.problems)
    assert told.replace("\n", "").isprintable()
    found = checking.as_dict(result)
    assert (found["notes"], found["problems"]) == (result.notes, result.problems)
    assert found["splits"]["train"]["unreadable_kinds"] == {".heic": 1}


# The command.


def run(capsys, *arguments):
    status = cli.main(["data", "check", *map(str, arguments)])
    return status, capsys.readouterr()


def test_the_status_tells_whether_something_is_wrong(clean, tmp_path, capsys):
    status, printed = run(capsys, clean, "--out", tmp_path / "out")
    assert status == 0
    assert printed.err.splitlines()[-1] == "10 of 10 images read"
    (clean / "train" / "a" / "empty.jpg").touch()
    status, printed = run(capsys, clean, "--out", tmp_path / "out")
    assert status == 1
    assert "empty.jpg: empty file" in printed.out
    assert run(capsys, clean, "--split", "test", "--out", tmp_path / "out")[0] == 0
    status, printed = run(capsys, clean, "--split", "tset", "--out", tmp_path / "out")
    assert status == 2
    assert printed.err.startswith("vit-jax: unknown split 'tset'")


def test_the_report_names_all_images_and_is_drawn(dirty, tmp_path, capsys):
    status, printed = run(capsys, dirty, "--out", tmp_path / "new" / "out")
    assert status == 1
    text = (tmp_path / "new" / "out" / "check.txt").read_text()
    for name in ("half.png", "nowhere.jpg", "leak.png", "contradiction.bmp", "twice.bmp"):
        assert name in text
        assert name in printed.out
    image = np.asarray(Image.open(tmp_path / "new" / "out" / "check.png").convert("RGB"))
    assert image.shape == (860, 1200, 3)  # A line for each of the three problems.
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100


def test_copies_stay_together_in_the_table_that_is_written(tmp_path, capsys):
    """Where a fifth is held out by chance, and only there."""
    for i in range(20):
        for name in "ab":  # Each image is there twice, under two names.
            save(tmp_path / "data" / name / f"{i}.png", image(100 * ord(name) + i))
            save(tmp_path / "data" / name / f"copy of {i}.bmp", image(100 * ord(name) + i))
    out = tmp_path / "out"
    assert cli.main(["data", "check", str(tmp_path / "data"), f"--out={out}"]) == 1
    told = capsys.readouterr().out
    assert "groups.csv, which --out writes of a folder" in told
    assert str(out / "groups.csv") in told
    for seed in range(3):
        parts = [open_source(str(out / "groups.csv"), s, seed=seed) for s in ("train", "test")]
        train, test = ([part[i]["image"].tobytes() for i in range(len(part))] for part in parts)
        assert (len(train), len(test)) == (64, 16)
        assert not set(train) & set(test)
        assert np.bincount(parts[1].label_ids).tolist() == [8, 8]
    assert cli.main(["data", "check", str(out / "groups.csv")]) == 0
    (tmp_path / "data" / "train").mkdir()  # Splits of its own are nobody's chance.
    for name in "ab":
        (tmp_path / "data" / name).rename(tmp_path / "data" / "train" / name)
        save(tmp_path / "data" / "test" / name / "0.png", image(100 * ord(name)))
    assert cli.main(["data", "check", str(tmp_path / "data"), f"--out={tmp_path / 'new'}"]) == 1
    assert "column group" not in capsys.readouterr().out
    assert not (tmp_path / "new" / "groups.csv").exists()


@pytest.mark.parametrize("name", ["a;b", "nan", " a"])
def test_a_table_that_could_not_be_read_again_is_not_written(name, tmp_path, capsys):
    for i in range(10):
        for label in (name, "c"):
            save(tmp_path / "data" / label / f"{i}.png", image(i + 100 * (label == "c")))
            save(tmp_path / "data" / label / f"copy of {i}.bmp", image(i + 100 * (label == "c")))
    out = tmp_path / "out"
    assert cli.main(["data", "check", str(tmp_path / "data"), f"--out={out}"]) == 2
    said = capsys.readouterr().err
    assert f"groups.csv is not written, as no class of a table can be called {name!r}" in said
    assert sorted(os.listdir(out)) == ["check.png", "check.txt"]


def test_nothing_is_written_unasked(clean, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, printed = run(capsys, clean)
    assert status == 0
    assert "Written" not in printed.out
    assert os.listdir() == []


def test_the_terminal_shows_a_few_of_many_and_the_file_all(clean, tmp_path, capsys):
    for i in range(20):
        (clean / "train" / "a" / f"empty{i}.jpg").touch()
    _, printed = run(capsys, clean, "--out", tmp_path)
    assert printed.out.count(": empty file") == 5
    assert "... and 15 more" in printed.out
    assert (tmp_path / "check.txt").read_text().count(": empty file") == 20


def test_json_holds_all_of_it(dirty, tmp_path, capsys):
    status, printed = run(capsys, dirty, "--json", "--out", tmp_path)
    assert status == 1
    found = json.loads(printed.out)
    train = found["splits"]["train"]
    assert train["count"] == 12
    assert train["classes"] == {"a": 5, "b": 5}
    assert train["height"] == {"min": 6, "median": 9.0, "max": 50}
    assert len(train["unreadable"]) == 2
    assert len(found["identical"]) == 3
    assert found["identical"][0][0]["split"] == "train"


def test_each_split_is_read_once_by_its_own_name(clean, tmp_path, capsys):
    (clean / "test").rename(clean / "val")
    _, printed = run(capsys, clean, "--json", "--out", tmp_path)
    assert list(json.loads(printed.out)["splits"]) == ["train", "val"]


def test_data_without_a_readable_image_is_reported(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "data" / name / f"{i}.png").touch()
    status, printed = run(capsys, tmp_path / "data", "--out", tmp_path)
    assert status == 1
    assert "8 images of train can't be read" in printed.out
    assert "train has no image of 'a', 'b'" in printed.out
    assert json.loads(run(capsys, tmp_path / "data", "--json", "--out", tmp_path)[1].out)


@pytest.mark.filterwarnings("error")
def test_many_classes_sizes_and_odd_names_are_drawn(tmp_path):
    for i in range(60):
        save(tmp_path / "data" / f"$class_{i} 日本" / "x.png", image(i, 1 + 20 * i, 1 + i % 7))
    source = open_source(str(tmp_path / "data"), "train")
    result = check({f"train[{i}:]": source for i in range(8)})
    for path in checking.write_report(result, tmp_path / "out", "title $x$ _y"):
        assert os.path.getsize(path) > 1000


def test_a_report_that_cannot_be_written_is_a_user_error(clean, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: can't be written to .*; choose another folder"):
        checking.write_report(checked(clean), tmp_path / "file", "title")


def test_a_terminal_gets_a_bar(clean, tmp_path):
    leader, follower = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "vit_jax", "data", "check", clean, "--out", tmp_path],
        stdout=subprocess.PIPE,
        stderr=follower,
        check=False,
    )
    os.close(follower)
    assert done.returncode == 0
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "10/10" in shown
    assert "━" in shown
    assert "images read" not in shown


def test_the_digits_are_clean(tmp_path, capsys):
    assert run(capsys, "digits", "--out", tmp_path)[0] == 0


def test_real_duplicates_are_found(shared):
    splits = {n: open_source(str(shared / "images" / "flowers"), n) for n in ("train", "test")}
    result = check(splits)
    assert result.problems == []
    pairs = [tuple(p.name for p in group) for group in result.identical]
    assert len(pairs) == result.duplicates("train") == 2
    for one, other in pairs:
        np.testing.assert_array_equal(Image.open(one), Image.open(other))
