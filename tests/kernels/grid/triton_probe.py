"""Probe whether Triton runs here: on a GPU, or interpreted, which not every Triton does with every NumPy."""

from __future__ import annotations

from functools import cache

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def count(out, n):
    for i in range(tl.program_id(0) * n, n):
        tl.store(out + i, i)


@cache
def why_triton_fails() -> str:
    """Returns the error of a kernel of three lines; empty if it runs."""
    out = torch.zeros(3, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        count[(1,)](out, 3)
    except Exception as error:
        return f"Triton {triton.__version__} does not run here: {error!r}"
    return "" if out.tolist() == [0.0, 1.0, 2.0] else "Triton does not count to three"
