"""The message of a user's mistake is one line, whatever it quotes."""

import pickle

import pytest

from vit_jax import UserError
from vit_jax.errors import error_chain


def test_line_breaks_and_control_characters_are_escaped():
    error = UserError("no file 'a\nb\x1b[2J\u2028c': give another name")

    assert str(error) == r"no file 'a\nb\x1b[2J\u2028c': give another name"


def test_letters_of_any_language_are_left_alone():
    assert str(UserError("Blumen/Gänseblümchen 狗.jpg")) == "Blumen/Gänseblümchen 狗.jpg"


def test_the_middle_of_an_endless_message_is_left_out():
    message = str(UserError(f"{'a' * 10**6} can't be read: mend it"))

    assert message.startswith("aaa")
    assert message.endswith("a can't be read: mend it")
    assert len(message) < 11_000


def test_it_is_a_value_error_that_travels_between_processes():
    error = pickle.loads(pickle.dumps(UserError("a\nb")))

    assert str(error) == r"a\nb"
    with pytest.raises(ValueError, match=r"^x$"):
        raise UserError("x")


def test_the_chain_of_an_error_ends_where_it_goes_in_a_circle():
    first, second = ValueError("first"), OSError("second")
    first.__context__, second.__cause__ = second, first
    assert error_chain(first) == [first, second]
    assert error_chain(None) == []
