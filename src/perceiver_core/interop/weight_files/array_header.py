"""Headers (shape and dtype) of the arrays in a file. They are checked before any array is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[np.generic]
DType: TypeAlias = np.dtype[np.generic]

LONGEST_NAME = 1000  # characters
NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")


class ArrayHeader(NamedTuple):
    """Shape and dtype of an array in a file, and a function that reads the array in native byte order."""

    shape: tuple[int, ...]
    dtype: DType  # with the byte order of the file
    read: Callable[[], Array]

    @property
    def num_bytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def as_tensor(self) -> Tensor:
        """Return a meta tensor with this shape and dtype."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype.name), device="meta")


def number_dtype(code: str) -> DType:
    """Check that a NumPy dtype code, such as `<f4`, stands for booleans or numbers, and return the dtype."""
    if not NUMBERS.fullmatch(code):
        raise ValueError(f"only arrays of numbers are read; one is of dtype {code[:20]!r}")
    return np.dtype(code)


def checked_shape(shape: object) -> tuple[int, ...]:
    """Check that `shape` is a tuple of at most 16 non-negative ints below 2**40, and return it."""
    if not isinstance(shape, tuple) or len(shape) > 16 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError("the shape of an array must be whole numbers, 16 at most, none of them negative")
    return shape
