"""State that packages keep in the process, reset between tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def accelerate_settings() -> Iterator[None]:
    """Forgets the settings of accelerate, which Trainer of transformers uses too: later ones may not differ."""
    forget()
    yield
    forget()


def forget() -> None:
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
