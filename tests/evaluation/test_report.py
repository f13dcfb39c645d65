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

from tests.reports import curves, example, images_of, report_of, scores_of
from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.evaluation.report import PIXELS, RIGHT, WRONG, choose_examples, write_report


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws a report and returns its figure, after the file is written."""
    figures = []
    savefig = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(k=3, **changes):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            write_report(report_of(k, **changes), tmp_path / "report.png")
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
    """Whether all that is drawn lies inside the image."""
    drawn, frame = figure.get_tightbbox(), figure.bbox_inches.padded(1e-6)
    return (
        frame.x0 <= drawn.x0 <= drawn.x1 <= frame.x1
        and frame.y0 <= drawn.y0 <= drawn.y1 <= frame.y1
    )


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("k", [1, 10, 37, 1000])
def test_any_number_of_classes_is_drawn_with_no_text_cut_off(drawn, k):
    assert is_whole(drawn(k, metrics=curves()))


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [], "examples": []},
        {"scores": None, "examples": [], "labels": (), "note": "no weights yet " * 20},
        {"metrics": curves(), "config": {f"config.{i}": "x" * i for i in range(99)}},
        {"metrics": [{"step": 5, "train/loss": 0.0, "train/lr": 0.0}]},
        {"metrics": [{"step": 0, "test/top1": 1.0}], "scores": scores_of(np.zeros((3, 3), int))},
        {"metrics": curves(evaluations=1), "title": "a long title " * 30},
        {"metrics": [{"step": 1, "train/loss": float("nan")}]},
        {"examples": images_of(3, n=7), "labels": ["$x_1$", "50% \\frac", "two\nlines"]},
        {"examples": images_of(3, n=2, shape=(300, 30, 3)), "labels": ["猫", "犬", "鳥"]},
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
    (ax,) = axes_titled(drawn(scores=scores_of(counts)), "Confusion")
    shares = [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]]
    np.testing.assert_allclose(ax.images[0].get_array(), shares)
    assert [t.get_text() for t in ax.texts] == ["6", "2", "1", "3"]
    assert title(ax) == "Confusion matrix: 9 of 12 right (75.0%)"


def test_counts_stay_inside_their_cells(drawn):
    (ax,) = axes_titled(drawn(15, scores=scores_of(np.full((15, 15), 12345))), "Confusion")
    cell = ax.bbox.width / 15
    assert max(t.get_window_extent().width for t in ax.texts) < cell


def test_many_classes_have_names_that_do_not_touch(drawn):
    (ax,) = axes_titled(drawn(1000), "Confusion")
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert 20 < len(boxes) <= 40
    assert not ax.texts
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_captions_say_right_or_wrong_in_words_and_color(drawn):
    found = drawn(examples=[example("cat", "cat", 0.823), example("dog", "cat", 0.9)])
    (right,), (wrong,) = axes_titled(found, "cat (82%)"), axes_titled(found, "cat (90%), not dog")
    assert right.title.get_color() == RIGHT
    assert wrong.title.get_color() == WRONG


def test_captions_of_long_names_do_not_touch(drawn):
    labels = [f"{animal} of the northern highlands" for animal in ("retriever", "ptarmigan", "emu")]
    figure = drawn(examples=[example(labels[i], labels[i - 1]) for i in (0, 1, 2, 0, 1, 2)])
    captions = [ax.title for ax in axes_titled(figure, "") if "\n" in title(ax)]
    boxes = sorted((t.get_window_extent() for t in captions), key=lambda box: box.x0)
    assert len(boxes) == 6
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_tiny_images_are_magnified_without_smoothing_and_gray_ones_are_gray(drawn):
    figure = drawn(examples=images_of(3, n=1, shape=(8, 8, 1)))
    (ax,) = axes_titled(figure, "class 0 (50%)")
    assert ax.images[0].get_interpolation() == "nearest"
    assert ax.images[0].get_cmap().name == "gray"
    assert ax.images[0].get_clim() == (0, 255)


def test_no_more_than_twelve_images_are_drawn_half_of_them_mistakes(drawn):
    figure = drawn(examples=images_of(3, n=40))
    captions = [t for t in texts_of(figure) if "(50%)" in t]
    assert [", not" in t for t in captions] == [True] * 6 + [False] * 6


def test_classes_are_drawn_with_the_least_recall_first(drawn):
    counts = np.array([[6, 2, 0], [4, 0, 0], [1, 0, 3]])
    (ax,) = axes_titled(drawn(labels=["cat", "dog", "emu"], scores=scores_of(counts)), "Classes")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dog", "cat", "emu"]
    recall, precision = (line.get_xdata() for line in ax.lines)
    np.testing.assert_allclose(recall, [0, 0.75, 0.75])
    np.testing.assert_allclose(precision, [0, 6 / 11, 1])


def test_the_calibration_is_drawn_with_its_error(drawn):
    counts = np.array([[6, 2], [0, 0]])
    scores = scores_of(counts, probability=np.full(8, 0.9))
    (ax,) = axes_titled(drawn(2, scores=scores), "Calibration: expected error 15.0%")
    heights = [bar.get_height() for bar in ax.patches]
    np.testing.assert_allclose(heights, [0] * 13 + [0.75, 0])


class Images:
    """Images that are numbers: of a class each, or of several."""

    labels = ("a", "b", "c")

    def __init__(self, truth, multi_label=False, shape=(2, 2, 1)):
        self.truth, self.multi_label, self.shape = truth, multi_label, shape

    def __getitem__(self, index):
        return {"image": np.full(self.shape, index, np.uint8), "label": self.truth[index]}

    def describe(self, index):
        return f"{index}.jpg"


def test_the_most_confident_mistakes_come_first():
    scores = scores_of(np.array([[50, 30, 0], [0, 0, 0], [0, 0, 9]]))
    probability = np.linspace(0.3, 0.9, 89)
    scores = scores_of(scores.confusion, probability=probability)
    chosen = choose_examples(scores, Images(scores.truth))
    wrong = [e for e in chosen if not e.right]
    assert [e.name for e in wrong] == [f"{i}.jpg" for i in range(79, 79 - 24, -1)]
    assert {(e.truth, e.prediction) for e in wrong} == {("a", "b")}
    assert [e.image[0, 0, 0] for e in wrong] == list(range(79, 79 - 24, -1))
    assert wrong[0].probability == probability[79]
    right = chosen[24:]
    assert len(right) == 6
    assert right[0].name == "0.jpg"
    assert right[-1].name == "88.jpg"


def test_all_classes_of_a_image_are_named_and_without_one_nothing_is_a_mistake():
    scores = scores_of(np.array([[0, 1], [0, 1]]), truth=[0, -1])
    labels = np.float32([[1, 0, 1], [0, 0, 0]])
    (mistake,) = choose_examples(scores, Images(labels, multi_label=True))
    assert (mistake.truth, mistake.prediction, mistake.right) == ("a, c", "b", False)


def test_large_photos_are_shrunk():
    scores = scores_of(np.array([[1, 1], [0, 0]]))
    for chosen in choose_examples(scores, Images(scores.truth, shape=(900, 1200, 3))):
        assert chosen.image.shape == (PIXELS * 3 // 4, PIXELS, 3)


def test_a_full_disk_leaves_the_old_report_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "report.png"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=r"report\.png can't be written"):
        write_report(report_of(2), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_real_photos_are_drawn(drawn, shared):
    source = data.open_source(str(shared / "images" / "flowers"), "test").take(range(0, 200, 20))
    scores = scores_of(np.eye(5, dtype=int) + 1)
    found = drawn(5, labels=source.labels, examples=choose_examples(scores, source.take([0] * 30)))
    assert is_whole(found)


def test_neither_matplotlib_is_imported_early_nor_pyplot_at_all(tmp_path):
    program = (
        "import sys\n"
        "from vit_jax.evaluation.report import write_report\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from tests.reports import report_of\n"
        "for kind in ('png', 'html'):\n"
        f"    write_report(report_of(2), {str(tmp_path / 'report.')!r} + kind)\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_names_that_no_font_can_draw_do_not_stop_a_report(drawn):
    evil = "\x1b[2J\udcff\u202e"
    figure = drawn(2, labels=[evil, "b"], title=evil, examples=[example(evil, "b", name=evil)])
    assert r"\x1b[2J\udcff\u202e" in texts_of(figure)
