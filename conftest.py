"""Settings that are read when the library is imported, and names that the examples of all docstrings use."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when kernels are imported

import perceiver_core as pc


@pytest.fixture(autouse=True)
def names_of_examples(doctest_namespace: dict[str, object]) -> None:
    """Makes `torch`, `nn` and `pc` known to docstring examples."""
    doctest_namespace.update(torch=torch, nn=nn, pc=pc)
