"""Arrays that a file holds: what they are, before any of them is made."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST = 8 * 2**30  # bytes of a file; the largest that is published, the language model, has 0.8e9
LETTERS = 1000  # of a name
NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")


class Held(NamedTuple):
    """An array in a file.

    Args:
        shape: its shape.
        dtype: its numbers, in the byte order of the file.
        read: what makes it, in the machine's byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], NDArray[Any]]


def number(code: str) -> np.dtype[Any]:
    """The dtype of numbers that NumPy calls by a code, `<f4`.

    Raises:
        ValueError: anything else, objects and text above all.
    """
    if not NUMBERS.fullmatch(code):
        raise ValueError(f"only arrays of numbers are read; one is of dtype {code[:20]!r}")
    return np.dtype(code)


def size_of(shape: Any, dtype: np.dtype[Any]) -> int:
    """How many bytes an array takes.

    Raises:
        ValueError: no shape.
    """
    if not isinstance(shape, tuple) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError("the shape of an array must be whole numbers, 16 at most, none of them negative")
    return math.prod(shape) * dtype.itemsize


def check_file(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        ValueError: it is empty, or too large to be weights of a Perceiver.
    """
    size = path.stat().st_size
    if not 0 < size <= LARGEST:
        raise ValueError(f"{path} must hold a published Perceiver IO, at most {LARGEST} bytes; it has {size}")
    return size
