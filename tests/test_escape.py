"""What comes from outside can't steer a terminal, break JSON or be computed by a spreadsheet."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_jax.escape import cell, printable, to_json

any_text = st.text(st.characters(exclude_categories=()))  # Lone surrogates, too.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("a\r\nb\u2028", r"a\r\nb\u2028"),
        ("\x9b31m", r"\x9b31m"),  # Steers a terminal as ESC [ does.
        ("cat\udcff", r"cat\udcff"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("Gänseblümchen 狗", "Gänseblümchen 狗"),
        ("at 1.00.00\u202fPM\u3000\u00a0.png", "at 1.00.00\u202fPM\u3000\u00a0.png"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_what_steers_or_cannot_be_seen_is_shown_by_its_code(text, shown):
    assert printable(text) == shown


@given(any_text)
def test_printable_text_is_one_line_that_can_be_encoded_and_stays_as_it_is(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    shown.encode()
    assert printable(shown) == shown


@given(values, st.booleans())
def test_json_is_valid_for_any_value(value, ascii_only):
    text = to_json(value, ensure_ascii=ascii_only)
    again = json.loads(text.encode(), parse_constant=pytest.fail)
    # No half of a pair of surrogates, neither as it is nor as a code.
    json.dumps(again, ensure_ascii=False).encode()


def test_json_of_what_it_knows_comes_back():
    value = {"a": [1, 0.1, True, None, "Gänse 狗 👩"], "b": {}}
    assert json.loads(to_json(value)) == value
    assert json.loads(to_json([float("nan"), float("inf"), (1, "x\udcff")])) == [
        *(None, None, [1, r"x\udcff"]),
    ]


@pytest.mark.parametrize(
    "text", ["=cmd()", "+1", "-1", "@sum(a)", "\uff1d1", "\uff0b1", "\uff0d1", "\uff20a"]
)
def test_a_cell_is_no_formula(text):
    assert cell(text) == "'" + text


def test_other_cells_stay_as_they_are():
    for text in ("cat", "a=b", "", "0.125", "1", "dog, wolf"):
        assert cell(text) == text
    assert cell("\t=1") == r"\t=1"
