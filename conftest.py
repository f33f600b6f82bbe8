"""Names that the examples of all docstrings use without importing them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def names_of_examples(doctest_namespace: dict[str, object]) -> None:
    """Makes `torch`, `nn` and `pc` known to docstring examples."""
    import torch  # here, since tests/conftest.py sets variables that are read at the import
    from torch import nn

    import perceiver_core as pc

    doctest_namespace.update(torch=torch, nn=nn, pc=pc)
