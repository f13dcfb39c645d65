"""The page of HTML is looked around in, in a real browser."""

import base64
import dataclasses
import json
import re
from itertools import pairwise

import cv2
import numpy as np
import pytest
from matplotlib.text import Text

from vit_jax import explain
from vit_jax.errors import UserError
from vit_jax.explain import pages
from vit_jax.explain.pages import choose_layers

NAME = """<b>"it's" & co.png"""


def opened(browser, path, **window):
    """Opens a page, and waits until its images are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.open(path, **window)
    said = "return [...document.querySelectorAll('[role=status]')].every(e => e.innerText)"
    WebDriverWait(browser.driver, 30).until(lambda _: browser.run(said))


def test_what_fits_is_the_mean_of_each_block_then_the_heads_of_the_last():
    whole = [(b, h) for b in range(3) for h in (None, 0, 1)]
    assert choose_layers(3, 2, 9) == choose_layers(3, 2, 100) == whole
    assert choose_layers(3, 2, 8) == [
        (0, None),
        (1, None),
        (1, 0),
        (1, 1),
        (2, None),
        (2, 0),
        (2, 1),
    ]
    assert choose_layers(3, 2, 5) == [(0, None), (1, None), (2, None), (2, 0), (2, 1)]
    assert choose_layers(3, 2, 4) == [(0, None), (1, None), (2, None)]
    assert choose_layers(24, 16, 3) == [(0, None), (12, None), (23, None)]
    assert choose_layers(24, 16, 0) == [(23, None)]
    assert choose_layers(2, 1, 9) == [(0, None), (1, None)]  # One head is its mean.


@pytest.fixture(scope="module")
def written(network, tmp_path_factory):
    """(weights, images, page)."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 90)), (NAME, (90, 60))):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, (*size, 3), np.uint8))
    vit, images = network("token"), [folder / "a.png", folder / NAME]
    path = folder / "page.html"
    path.write_bytes(explain.page_html(vit, list(explain.explanations(vit, images))))
    return vit, images, path


def test_the_page_holds_the_attention_that_was_computed(written):
    vit, images, path = written
    found = re.search(r'<script [^>]*id="attention1">(.*?)</script>', path.read_text("utf-8"))
    known = json.loads(found[1])
    levels = np.frombuffer(base64.b64decode(known["weights"]), np.uint8).reshape(-1, 31, 31)
    weights = levels / 255 * np.array(known["top"]).reshape(-1, 31, 1)
    maps = explain.attention_maps(vit, images[1:])[0]
    assert len(known["layers"]) == len(weights) == 2 * (1 + 2)
    for (block, head), found in zip(known["layers"], weights, strict=True):
        expected = maps[block].mean(axis=0) if head is None else maps[block, head]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_registers_are_not_called_the_class_token(written, network, browser, tmp_path):
    vit, page = network("gap", num_registers=2), tmp_path / "page.html"
    assert vit.model.num_prefix_tokens == 2
    explained = list(explain.explanations(vit, written[1][:1]))
    page.write_bytes(explain.page_html(vit, explained))
    opened(browser, page)
    said = browser.run("return document.querySelector('[role=status]').innerText")
    attention = explain.attention_maps(vit, written[1][:1])[0, -1].mean(axis=0)
    assert re.match(r"The patch in row \d+, column \d+ attends to row ", said)
    shares = {f"{100 * row[:2].sum():.{1 if row[:2].sum() < 0.0995 else 0}f}%" for row in attention}
    assert re.search(r"; all registers together \((.*?)\)\.$", said)[1] in shares
    assert "class token" not in said
    assert browser.run("return document.querySelector('.viewer button').hidden")


def test_the_page_stands_alone_and_can_be_used_by_all(written, browser):
    path = written[2]
    browser.check(path)
    opened(browser, path)
    assert {"Attention on a.png", f"Attention on {NAME}", "Block", "Head", "Class token"} <= set(
        browser.tab_stops()
    )


def test_pointing_and_sliding_change_what_is_shown(written, browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    opened(browser, written[2])
    driver = browser.driver
    viewer = driver.find_elements(By.CLASS_NAME, "viewer")[1]
    canvas = viewer.find_element(By.TAG_NAME, "canvas")
    block, head = viewer.find_elements(By.TAG_NAME, "input")
    seen = []

    def changed() -> str:
        """What is said, after both it and the image have become what they have not been yet."""
        image = browser.run("return arguments[0].toDataURL()", canvas)
        said = viewer.find_element(By.CSS_SELECTOR, "[role=status]").text
        assert (image, said) not in seen
        seen.append((image, said))
        return said

    assert changed().startswith("The class token attends to row ")
    ActionChains(driver).move_to_element(canvas).perform()
    assert changed().startswith("The patch in row 3, column 4 attends to row ")
    ActionChains(driver).move_to_element_with_offset(canvas, 0, -200).click().perform()
    changed()
    for key in (Keys.ARROW_UP, Keys.ARROW_LEFT):
        canvas.send_keys(key)
        changed()
    for slider, keys in ((head, (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)), (block, (Keys.ARROW_LEFT,))):
        for key in keys:
            slider.send_keys(key)
            changed()
    assert block.get_attribute("aria-valuetext") == "Block 1"
    assert head.get_attribute("aria-valuetext") == "Head 2"
    viewer.find_element(By.TAG_NAME, "button").click()
    assert changed().startswith("The class token")
    assert browser.complaints() == []


@pytest.mark.slow
@pytest.mark.ci
def test_every_kind_of_network_has_a_page(network, written, browser, tmp_path):
    for kind in ("unpooled", "MAP", "LiT"):
        vit = network(kind)
        classes = ["a cat", "a dog"] if kind == "LiT" else None
        explained = list(explain.explanations(vit, written[1][:1], classes))
        (tmp_path / f"{kind}.html").write_bytes(explain.page_html(vit, explained))
        opened(browser, tmp_path / f"{kind}.html")
        assert browser.complaints() == []
        said = browser.run("return document.querySelector('[role=status]').innerText")
        assert said.startswith("The class token" if kind == "LiT" else "The patch in row 3")
    assert [label for label, _ in explained[0].relevance] == ["a cat", "a dog"]
    assert sum(p for _, p in explained[0].classes) == pytest.approx(1)


def test_explanations_hold_no_more_than_a_page_has_room_for(network, tmp_path, monkeypatch):
    vit, room = network("token"), 2 * 31**2  # Of each image two of the six layers.
    monkeypatch.setattr(pages, "MAX_BYTES", 3 * room)
    photo = np.random.default_rng(0).integers(0, 256, (900, 2000, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    for e in explain.explanations(vit, [tmp_path / "a.png"] * 3):
        assert e.attention["layers"] == [(0, None), (1, None)]
        assert len(base64.b64decode(e.attention["weights"])) == room
        assert e.view.image.shape == (180, 400, 3)
        # The grid lies where it lay: but for the border it fills the image.
        np.testing.assert_allclose(e.view.box, (0, 0, 1, 24 / 27), atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(300, 60), (60, 300)])
def test_the_whole_of_a_tall_or_wide_image_fits_the_window(
    network, browser, tmp_path, height, width
):
    vit = dataclasses.replace(network("MAP"), labels=None)
    photo = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), photo)
    explained = list(explain.explanations(vit, [tmp_path / "a.png"]))
    (tmp_path / "page.html").write_bytes(explain.page_html(vit, explained))
    for window in ((1200, 900), (360, 640)):
        opened(browser, tmp_path / "page.html", width=window[0], height=window[1])
        box = browser.run("return document.querySelector('canvas').getBoundingClientRect()")
        assert box["height"] <= 0.81 * window[1]
        assert box["height"] / box["width"] == pytest.approx(height / width, rel=0.02)
    # Names of classes have room in print.
    figure = explain.page_figure(vit, explained)
    figure.draw_without_rendering()
    names = [t for t in figure.findobj(Text) if "%  " in t.get_text()]
    boxes = [t.get_window_extent() for t in names]
    assert len(boxes) == 5
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))


def test_more_images_than_a_png_can_hold_are_refused(network, written):
    vit, images, _ = written
    explained = list(explain.explanations(vit, images[:1]))
    with pytest.raises(UserError, match=r"200 images make a page of \d+,\d+ pixels, and a PNG"):
        explain.page_figure(vit, explained * 200)


def test_the_page_to_print_is_whole(network, written):
    vit = dataclasses.replace(network("MAP"), labels=None)
    figure = explain.page_figure(vit, list(explain.explanations(vit, written[1])))
    drawn, frame = figure.get_tightbbox(), figure.bbox_inches
    assert frame.x0 <= drawn.x0 <= drawn.x1 <= frame.x1
    assert frame.y0 <= drawn.y0 <= drawn.y1 <= frame.y1
    titles = {t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))}
    assert {"a.png", NAME, "attention rollout", "block 2, head 2", "pooling, head 2"} <= titles
