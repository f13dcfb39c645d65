"""report.png: drawn for any run, whole or not at all, and with nothing cut off."""

import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vit_jax.errors import UserError
from vit_jax.evaluation import report
from vit_jax.evaluation.report import training_report

SEED = 0


def curves(evaluations=5, steps=100):
    train = [
        {"step": s, "train/loss": 2.3 / s, "train/lr": 0.01 * (1 - s / steps)}
        for s in range(1, steps + 1)
    ]
    test = [
        {"step": steps * (i + 1) // evaluations, "test/loss": 1 / (i + 1), "test/top1": 0.1 * i}
        for i in range(evaluations)
    ]
    return train + test


def confusion_of(k, n=2000):
    rng = np.random.default_rng(SEED)
    matrix = np.zeros((k, k), np.int64)
    np.add.at(matrix, tuple(rng.integers(0, k, (2, n))), 1)
    np.add.at(matrix, (np.arange(k), np.arange(k)), 5)
    return matrix


def pictures_of(k, n=12, shape=(32, 32, 3)):
    rng = np.random.default_rng(SEED)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return [(image, i % k, (i * i) % k, 0.5) for i, image in enumerate(images)]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a report and returns its figure, after the file is written."""
    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(k=3, labels=None, **changes):
        arguments = {
            "metrics": [],
            "confusion": confusion_of(k),
            "labels": labels or [f"class {i}" for i in range(k)],
            "pictures": pictures_of(k, n=2),
            "title": "ViT-Ti_16 on something",
        }
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training_report(tmp_path / "report.png", **(arguments | changes))
        with Image.open(tmp_path / "report.png") as image:
            image.load()
            assert image.width > 1000
        return figures[-1]

    return draw


def axes_titled(figure, start):
    return [ax for ax in figure.findobj(lambda a: hasattr(a, "get_xaxis")) if title(ax, start)]


def title(ax, start=""):
    texts = [t for t in (ax.get_title(), ax.get_title(loc="left")) if t.startswith(start)]
    return next((t for t in texts if t), "")


def texts_of(figure):
    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]


def is_whole(figure):
    """Whether all that is drawn lies inside the picture."""
    drawn, frame = figure.get_tightbbox(), figure.bbox_inches
    return (
        frame.x0 <= drawn.x0 <= drawn.x1 <= frame.x1
        and frame.y0 <= drawn.y0 <= drawn.y1 <= frame.y1
    )


@pytest.mark.parametrize("k", [1, 10, 37, 1000])
def test_any_number_of_classes_is_drawn_with_no_text_cut_off(drawn, k):
    assert is_whole(drawn(k, metrics=curves()))


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [], "pictures": []},
        {"metrics": [{"step": 5, "train/loss": 0.0, "train/lr": 0.0}]},
        {"metrics": [{"step": 0, "test/top1": 1.0}], "confusion": np.zeros((3, 3), np.int64)},
        {"metrics": curves(evaluations=1), "title": "a long title " * 30},
        {"metrics": [{"step": 1, "train/loss": float("nan")}]},
        {"pictures": pictures_of(3, n=7), "labels": ["$x_1$", "50% \\frac", "two\nlines"]},
        {"pictures": pictures_of(3, n=2, shape=(300, 30, 3)), "labels": ["猫", "犬", "鳥"]},
        {"labels": ["golden retriever of the northern highlands"] * 3},
    ],
    ids="-".join,
)
def test_odd_runs_are_drawn_with_no_text_cut_off(drawn, changes):
    assert is_whole(drawn(3, **changes))


def test_curves_show_the_metrics_and_accuracy_in_percent(drawn):
    figure = drawn(metrics=curves(evaluations=5))
    (accuracy,) = axes_titled(figure, "Test accuracy")
    (line,) = accuracy.lines
    np.testing.assert_allclose(line.get_xydata(), [(20 * i + 20, 10 * i) for i in range(5)])
    assert title(accuracy) == "Test accuracy: 40.0% at the end"
    (loss,) = axes_titled(figure, "Loss")
    assert [line.get_label() for line in loss.lines] == ["train", "test"]
    assert axes_titled(figure, "Learning rate")


def test_the_best_accuracy_is_named_where_it_is_not_the_last(drawn):
    figure = drawn(metrics=[{"step": s, "test/top1": a} for s, a in ((10, 0.75), (2000, 0.5))])
    (accuracy,) = axes_titled(figure, "Test accuracy")
    assert title(accuracy) == "Test accuracy: 50.0% at the end, best 75.0% at step 10"


def test_a_run_without_evaluation_has_no_accuracy_panel(drawn):
    figure = drawn(metrics=[{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}])
    assert axes_titled(figure, "Loss")
    assert not axes_titled(figure, "Test accuracy")


def test_the_confusion_matrix_is_normalised_by_row_and_counted(drawn):
    counts = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    (ax,) = axes_titled(drawn(confusion=counts), "Confusion")
    shares = [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]]
    np.testing.assert_allclose(ax.images[0].get_array(), shares)
    assert [t.get_text() for t in ax.texts] == ["6", "2", "1", "3"]
    assert title(ax) == "Confusion matrix: 9 of 12 right (75.0%)"


def test_counts_stay_inside_their_cells(drawn):
    (ax,) = axes_titled(drawn(15, confusion=np.full((15, 15), 12345)), "Confusion")
    cell = ax.bbox.width / 15
    assert max(t.get_window_extent().width for t in ax.texts) < cell


def test_many_classes_have_names_that_do_not_touch(drawn):
    (ax,) = axes_titled(drawn(1000), "Confusion")
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert 20 < len(boxes) <= 40
    assert not ax.texts
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_captions_say_right_or_wrong_in_words_and_color(drawn):
    image = np.zeros((8, 8, 3), np.uint8)
    figure = drawn(
        labels=["cat", "dog", "emu"], pictures=[(image, 0, 0, 0.823), (image, 1, 0, 0.9)]
    )
    (right,), (wrong,) = axes_titled(figure, "cat (82%)"), axes_titled(figure, "cat, not dog")
    assert right.title.get_color() == report.RIGHT
    assert wrong.title.get_color() == report.WRONG


def test_captions_of_long_names_do_not_touch(drawn):
    labels = [f"{animal} of the northern highlands" for animal in ("retriever", "ptarmigan", "emu")]
    figure = drawn(labels=labels, pictures=pictures_of(3, n=6))
    captions = [ax.title for ax in axes_titled(figure, "") if "\n" in title(ax)]
    boxes = sorted((t.get_window_extent() for t in captions), key=lambda box: box.x0)
    assert len(boxes) == 6
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_tiny_pictures_are_magnified_without_smoothing_and_gray_ones_are_gray(drawn):
    figure = drawn(pictures=pictures_of(3, n=1, shape=(8, 8, 1)))
    (ax,) = axes_titled(figure, "class 0 (50%)")
    assert ax.images[0].get_interpolation() == "nearest"
    assert ax.images[0].get_cmap().name == "gray"
    assert ax.images[0].get_clim() == (0, 255)


def test_large_photos_are_shrunk_before_they_are_drawn(drawn):
    (ax,) = axes_titled(drawn(pictures=pictures_of(3, n=1, shape=(900, 1200, 1))), "class 0 (50%)")
    assert ax.images[0].get_array().shape == (384, 512)


def test_no_more_than_twelve_pictures_are_drawn(drawn):
    figure = drawn(pictures=pictures_of(3, n=40))
    assert sum("(50%)" in t or ", not" in t for t in texts_of(figure)) == 12


@pytest.mark.parametrize("shape", [(2, 2), (3,), (3, 4)])
def test_a_matrix_that_does_not_fit_the_labels_is_refused(tmp_path, shape):
    counts = np.zeros(shape, int)
    with pytest.raises(UserError, match=r"expected \(3, 3\)"):
        training_report(
            tmp_path / "r.png", metrics=[], confusion=counts, labels="abc", pictures=[], title=""
        )
    assert not list(tmp_path.iterdir())


def test_a_failed_drawing_leaves_the_old_report_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.png"
    path.write_bytes(b"old")

    def fail(figure, where, **_):
        where.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        training_report(
            path, metrics=[], confusion=np.eye(2, dtype=int), labels="ab", pictures=[], title=""
        )
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_real_photos_are_drawn(drawn, shared):
    files = sorted((shared / "images" / "flowers" / "test").glob("*/*"))[::20][:12]
    if not files:
        pytest.skip("needs the flower photos")
    pictures = [
        (np.asarray(Image.open(f).convert("RGB")), i % 3, 0, 0.9) for i, f in enumerate(files)
    ]
    assert is_whole(drawn(pictures=pictures))


def test_neither_matplotlib_is_imported_early_nor_pyplot_at_all(tmp_path):
    program = (
        "import pathlib, sys, numpy as np\n"
        "from vit_jax.evaluation.report import training_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"training_report(pathlib.Path({str(tmp_path / 'r.png')!r}), metrics=[], pictures=[],\n"
        "    confusion=np.eye(2, dtype=int), labels=['a', 'b'], title='')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
