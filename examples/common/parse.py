"""Types of numbers on the command line, for the argument `type` of argparse. Errors state the range."""

from __future__ import annotations

import argparse
import math

LARGEST_COUNT = 1_000_000


def seed(text: str) -> int:
    """Parse a seed: a whole number from 0 to 2^32 - 1, which all random generators accept."""
    return _whole(text, 0, 2**32 - 1)


def count(text: str) -> int:
    """Parse a number of things, from 1 to `LARGEST_COUNT`."""
    return _whole(text, 1, LARGEST_COUNT)


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    if not (number := _real(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text!r:.60}")
    return number


def not_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    if not (number := _real(text)) >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0; got {text!r:.60}")
    return number


def share(text: str) -> float:
    """Parse a number from 0 up to, but not including, 1."""
    if not 0 <= (number := _real(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1; got {text!r:.60}")
    return number


def _whole(text: str, lowest: int, highest: int) -> int:
    if not text.isdecimal() or len(text) > 20 or not lowest <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"must be a whole number from {lowest} to {highest:,}; got {text!r:.60}")
    return int(text)


def _real(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number; got {text!r:.60}")
    return number
