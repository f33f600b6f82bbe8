"""Numbers on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from examples.common import parse

ACCEPTED = [
    (parse.seed, "0", 0),
    (parse.seed, "4294967295", 2**32 - 1),
    (parse.count, "1", 1),
    (parse.positive, "1e-9", 1e-9),
    (parse.not_negative, "0", 0.0),
    (parse.share, "0.5", 0.5),
]
REFUSED = [
    *((parse.seed, text) for text in ("-1", "4294967296", "1.0", "", "9" * 5000, "\u0663\u0664" * 20)),
    *((parse.count, text) for text in ("0", "-1", "1000001", "x")),
    *((parse.positive, text) for text in ("0", "-1", "nan", "inf", "1e999", "x")),
    *((parse.not_negative, text) for text in ("-1e-9", "nan")),
    *((parse.share, text) for text in ("1", "-0.1", "nan")),
]


@pytest.mark.parametrize(("kind", "text", "number"), ACCEPTED)
def test_numbers_in_the_range(kind: Callable[[str], float], text: str, number: float) -> None:
    assert kind(text) == number


@pytest.mark.parametrize(("kind", "text"), REFUSED)
def test_other_texts_are_refused(kind: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"^must be .*; got '"):
        kind(text)
