"""report.html: what it says, in a real browser."""

import dataclasses

import numpy as np
import pytest

from tests.reports import confusion_of, curves, example, images_of, report_of, scores_of
from tests.test_page import EVIL
from vit_jax.evaluation.report import MAX_MISTAKES, write_report

FEW, MANY = 3, 30  # classes: a table, and an image whose cells can be asked


@pytest.fixture
def shown(tmp_path, browser):
    """Writes a report, opens it, and gives the browser."""

    def show(k=FEW, **changes):
        write_report(report_of(k, **changes), tmp_path / "report.html")
        browser.open(tmp_path / "report.html")
        return browser

    return show


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
    return browser.run(script, selector)


def rows_of(browser, name):
    return [row.split("\t") for row in texts(browser, f"[aria-label='{name}'] tbody tr")]


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": curves(), "examples": images_of(2, n=40)},
        {"scores": None, "examples": [], "labels": (), "note": "no weights yet"},
        {"labels": ["a" * 60, "b c " * 20], "examples": [example("a" * 60, "b", name="x" * 300)]},
        {"title": EVIL, "labels": [EVIL, "猫"], "examples": [example(EVIL, "\udcff", name=EVIL)]}
        | {"config": {EVIL: EVIL}, "environment": {EVIL: EVIL}, "note": EVIL},
    ],
    ids=["whole", "curves only", "long names", "hostile names"],
)
def test_pages_work_offline_by_night_and_on_a_phone(changes, tmp_path, browser):
    write_report(report_of(2, **changes), tmp_path / "report.html")
    browser.check(tmp_path / "report.html")


def test_each_label_has_its_figures_where_an_image_may_have_several(tmp_path, browser):
    likely = np.array([[0.9, 0.2, 0.7], [0.8, 0.6, 0.1], [0.3, 0.7, 0.2]])
    true = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    scores = dataclasses.replace(scores_of(confusion_of(3)), probabilities=likely, labels=true)
    fields = {"scores": scores, "labels": [EVIL, "cat", "none"], "multi_label": True}
    write_report(report_of(3, **fields), tmp_path / "report.html")
    browser.check(tmp_path / "report.html")
    assert rows_of(browser, "Labels") == [
        [EVIL, "2", "83.3%", "50.0%", "30.0%", "80.0%"],
        ["cat", "2", "100.0%", "100.0%", "60.0%", "100.0%"],
    ]
    (said,) = [text for text in texts(browser, "h2 + p") if text.startswith("Each label")]
    assert said.endswith("Labels that no image has, and that count in no mean: 1.")


def test_a_thousand_classes_fit_on_a_phone(tmp_path, browser):
    labels = [f"class {i}, {EVIL}" for i in range(1000)]
    write_report(report_of(1000, labels=labels), tmp_path / "report.html")
    browser.check(tmp_path / "report.html")


def test_ten_classes_and_the_settings_are_read_on_a_phone_without_scrolling(tmp_path, browser):
    fields = {"config": {"config.model.dropout_rate": 0.1}}
    labels = [str(i) for i in range(10)]
    write_report(report_of(10, labels=labels, **fields), tmp_path / "report.html")
    browser.open(tmp_path / "report.html", width=360)
    width = "const e = document.querySelector('.wide:has(.matrix)'); return e.%sWidth"
    assert browser.run(width % "scroll") == browser.run(width % "client")
    height = "return document.querySelector('.settings th').clientHeight"
    assert browser.run(height) < 40  # One line.


def test_all_parts_are_there(shown):
    browser = shown(metrics=curves(), examples=images_of(3, n=40), note="A word more.")
    assert texts(browser, "h2") == [
        *("Curves", "Confusion matrix", "Most frequent confusions", "Classes", "Calibration"),
        *("Mistakes: the 13 most confident of 1,360", "Configuration", "Environment"),
    ]
    names = browser.run("return [...document.querySelectorAll('svg')].map(e => e.ariaLabel)")
    assert [name.split(";")[0] for name in names] == [
        *(f"Curve: {name} by step" for name in ("loss", "accuracy", "learning rate", "throughput")),
        "Reliability diagram",
    ]
    drawn = browser.run("return [...document.querySelectorAll('svg text')].map(e => e.textContent)")
    assert drawn.count("step") == 4
    assert {"Loss (nats)", "Training: images a second", "confidence"} <= set(drawn)
    assert "A word more." in texts(browser, "p strong")
    assert texts(browser, "h2 + p + table tr")[0] == "batch\t8"
    assert "devices\t8 x abacus" in texts(browser, "table.settings tr")


def test_of_a_run_without_weights_there_are_curves_and_settings(shown):
    browser = shown(metrics=curves(), scores=None, labels=(), examples=[], note="No weights yet.")
    assert texts(browser, "h2") == ["Curves", "Configuration", "Environment"]


def test_the_summary_has_the_figures_of_the_scores(shown):
    counts = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    browser = shown(scores=scores_of(counts, probability=np.full(12, 0.95)))
    tiles = dict(zip(texts(browser, "dt"), texts(browser, "dd"), strict=True))
    assert tiles["top-1 accuracy"] == "75.0%"
    assert tiles["calibration error"] == "20.0%"
    assert tiles["test images"] == "12"
    assert rows_of(browser, "Calibration") == [["93\u2011100%", "12", "95.0%", "75.0%"]]


def test_of_few_classes_every_count_is_a_cell_of_a_table(shown):
    counts = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    browser = shown(labels=["cat", "dog", "emu"], scores=scores_of(counts))
    cells = "return [...document.querySelectorAll('.matrix tr')].map(r => [...r.cells].map(%s))"
    said = browser.run(cells % "c => c.innerText")
    assert said == [
        ["true", "cat", "dog", "emu"],
        ["cat", "6", "2", ""],
        ["dog", "", "", ""],
        ["emu", "1", "", "3"],
    ]
    assert rows_of(browser, "Most frequent confusions") == [
        ["cat", "dog", "2", "25.0%"],
        ["emu", "cat", "1", "25.0%"],
    ]


def test_classes_are_sorted_by_pressing_a_heading(shown):
    counts = np.array([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    browser = shown(labels=["cat", "dog", "emu"], scores=scores_of(counts))
    assert rows_of(browser, "Classes") == [
        ["cat", "8", "75.0%", "85.7%"],
        ["dog", "0", "-", "0.0%"],
        ["emu", "4", "75.0%", "100.0%"],
    ]
    browser.driver.find_elements("css selector", "th button")[3].click()
    assert [row[0] for row in rows_of(browser, "Classes")] == ["emu", "cat", "dog"]


def test_the_cells_of_many_classes_answer_the_pointer_and_the_arrow_keys(shown):
    from selenium.webdriver import ActionChains, Keys

    counts = confusion_of(MANY)
    labels = [f"n{i}" for i in range(MANY)]
    browser = shown(MANY, labels=labels, scores=scores_of(counts))

    def said(row, column):
        return (
            f"{counts[row, column]} of {counts[row].sum()} images of n{row} are said to be "
            f"n{column}."
        )

    image = browser.driver.find_element("css selector", ".cells img")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", image)
    side = image.size["width"] / MANY
    middle = ActionChains(browser.driver).move_to_element(image)
    middle.move_by_offset(round(side * 2.5), round(side * 5.5)).perform()
    assert texts(browser, "output") == [said(MANY // 2 + 5, MANY // 2 + 2)]
    browser.run("document.querySelector('.cells').focus()")
    browser.press(Keys.ARROW_LEFT)
    browser.press(Keys.ARROW_UP)
    assert texts(browser, "output") == [said(MANY // 2 + 4, MANY // 2 + 1)]


def test_classes_that_do_not_occur_are_counted_and_left_out(shown):
    counts = np.zeros((MANY, MANY), int)
    counts[3, 3], counts[3, 7] = 5, 1
    browser = shown(MANY, scores=scores_of(counts))
    assert [row[0] for row in rows_of(browser, "Classes")] == ["class 3", "class 7"]
    assert "28 classes have no image" in " ".join(texts(browser, "p"))
    assert "of 2 classes" in browser.run("return document.querySelector('.cells').ariaLabel")


def test_mistakes_are_shown_with_what_was_said_how_surely_and_the_file(shown):
    mistake = example("cat", "dog", 0.987, name="photos/1.jpg")
    browser = shown(examples=[mistake, example("cat", "cat")])
    assert texts(browser, ".images figure") == ["dog 98.7%, truly cat\nphotos/1.jpg"]
    assert browser.run("return document.querySelector('.images img').naturalWidth") == 32


def test_a_run_without_mistakes_says_so(shown):
    browser = shown(2, scores=scores_of(np.eye(2, dtype=int)), examples=[example("a", "a")])
    assert texts(browser, "h2 + p").count("None.") == 2


def test_of_many_mistakes_the_number_is_told(shown):
    scores = scores_of(np.array([[0, 40], [0, 0]]))
    browser = shown(2, scores=scores, examples=[example("a", "b")] * MAX_MISTAKES)
    assert "Mistakes: the 24 most confident of 40" in texts(browser, "h2")
