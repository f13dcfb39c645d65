"""Pages stand alone: what they hold can't break them, and nothing leaves them."""

import base64
import html
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from PIL import Image

from vit_jax import page
from vit_jax.errors import UserError

EVIL = """</script><script>console.error(1)</script><img src=x onerror="console.error(2)">"'&"""


def filled(template, **values):
    """A template's text."""
    macros = "{% from 'macros.html' import data, image, table %}"
    return page._environment().from_string(macros + template).render(values)


@given(st.text())
def test_escaped_text_has_no_markup_and_reads_as_before(text):
    escaped = filled("{{ text }}", text=text)
    assert not set("<>\"'\n\0") & set(escaped)
    escaped.encode()
    if text.isprintable():
        assert html.unescape(escaped) == text


def test_what_cannot_be_seen_is_shown_by_its_code():
    assert filled("{{ text }}", text="a\x00b\udcff\u202ec\n") == r"a\x00b\udcff\u202ec\n"


@given(st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=5))
def test_data_comes_back_and_can_not_end_its_element(value):
    element = filled("{{ data('name', value) }}", value=value)
    inside = element.removeprefix('<script type="application/json" id="name">')
    inside = inside.removesuffix("</script>")
    assert json.loads(inside) == value
    assert not set("<>&") & set(inside)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3, 5, 3), (3, 5, 4)])
def test_an_image_is_held_exactly(shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels[..., -1:] |= 1
    header, content = page.data_uri(pixels).split(",")
    (tmp_path / "image").write_bytes(base64.b64decode(content))
    assert header == "data:image/png;base64"
    np.testing.assert_array_equal(Image.open(tmp_path / "image"), np.squeeze(pixels))


def test_a_photo_is_small(tmp_path):
    photo = np.add.outer(np.arange(200), np.arange(300)).astype(np.uint8) // 2
    assert page.data_uri(photo, photo=True).startswith("data:image/jpeg;base64,")
    assert page.data_uri(photo[:50, :50], photo=True).startswith("data:image/png;base64,")


def test_only_pages_and_images_are_written():
    assert page.kind_of("a/b.HTML") == "html"
    with pytest.raises(UserError, match=r"write as page\.pdf: expected a name in \.html or \.png"):
        page.kind_of("page.pdf")


@pytest.fixture
def written(tmp_path):
    def write(body):
        path = tmp_path / "page.html"
        path.write_bytes(page.render("page", EVIL, body=Markup(body)))
        return path

    return write


def test_nothing_that_a_page_is_told_runs_or_is_fetched(written, browser):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    figure.subplots().set_title(EVIL, parse_math=False)
    parts = "{{ image(pixels, t) }}{{ figure | drawing(t) }}{{ table([t], [[t]], t, true) }}"
    values = {"pixels": np.zeros((400, 900), np.uint8), "figure": figure, "t": EVIL}
    path = written(filled(parts + "{{ data('d', t) }}", **values))
    browser.check(path)
    browser.open(path)
    assert browser.driver.title == EVIL
    assert browser.run("return document.querySelector('h1').innerText") == EVIL
    assert browser.run("return document.querySelector('td').innerText") == EVIL
    assert browser.run("return document.querySelector('img').alt") == EVIL
    assert browser.run("return JSON.parse(document.getElementById('d').textContent)") == EVIL


def test_what_slips_through_is_stopped_by_the_policy(written, browser):
    body = "<script>document.title = 'run'</script><img src='https://example.org/x.png' alt='x'>"
    browser.open(written(body))
    assert browser.driver.title == EVIL
    assert not [address for address in browser.requests() if address.startswith("http")]
    assert len(browser.complaints()) == 2


def test_headings_sort_by_value_with_what_is_missing_last(written, browser):
    from selenium.webdriver import Keys

    rows = [["b", 9, 0.5], ["a", 10000, float("nan")], ["c", 80, 0.25]]
    heads = ["name", "count", "share"]
    path = written(filled("{{ table(heads, rows, 't', true) }}", heads=heads, rows=rows))
    browser.open(path)

    def order():
        return browser.run("return [...document.querySelectorAll('tbody tr')].map(r=>r.innerText)")

    assert browser.tab_stops() == ["t", "name", "count", "share"]
    assert order() == ["b\t9\t50.0%", "a\t10,000\t-", "c\t80\t25.0%"]
    b, a, c = order()
    heads = browser.driver.find_elements("css selector", "th button")
    down, up = ([c, b, a], [a, c, b], [b, c, a]), ([a, b, c], [b, c, a], [c, b, a])
    for head, descending, ascending in zip(heads, down, up, strict=True):
        head.send_keys(Keys.ENTER)
        assert order() == descending
        assert browser.run("return document.querySelector('[aria-sort]').ariaSort") == "descending"
        head.send_keys(Keys.SPACE)
        assert order() == ascending
