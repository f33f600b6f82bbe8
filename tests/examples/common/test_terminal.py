"""Names of files are escaped before they reach a terminal."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.common.terminal import printable, quoted

pytestmark = pytest.mark.no_shape_checks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("knee 1.png", "knee 1.png"),
        ("a\nb\r\t\x00", r"a\nb\r\t\x00"),
        ("\x1b[2J\x7f\x9b1A", r"\x1b[2J\x7f\x9b1A"),
        ("\u202egnp\u2066\u200b\ufeff\u2028", r"\u202egnp\u2066\u200b\ufeff\u2028"),
        ("é\U0001f9b5", r"\xe9\U0001f9b5"),
        (os.fsdecode(b"\xff"), r"\udcff" if os.name != "nt" else r"\ufffd"),
        (r"C:\knees", r"C:\knees"),
    ],
)
def test_all_but_printable_ascii_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text(st.characters(exclude_categories=())))
def test_the_result_is_printable_ascii_and_stays_the_same(text: str) -> None:
    escaped = printable(text)
    assert escaped.isascii()
    assert escaped.isprintable()
    assert printable(escaped) == escaped


def test_paths_and_errors_are_converted() -> None:
    assert printable(ValueError("a\nb")) == r"a\nb"


def test_long_values_are_shortened() -> None:
    assert quoted("a\n" * 1000) == repr("a\n" * 150 + "...")
    assert quoted("é") == r"'\xe9'"
