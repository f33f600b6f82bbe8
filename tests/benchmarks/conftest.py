"""What all tests of the benchmarks share."""

import pytest

from benchmarks import measurement


@pytest.fixture(autouse=True)
def quick_processes(monkeypatch):
    """A fork server without transformers starts sooner."""
    monkeypatch.setattr(measurement, "IMPORTS", ["torch", "perceiver_core"])
