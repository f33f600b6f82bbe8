"""Selection of the Triton cases that run without a GPU, where Triton kernels are interpreted, which is slow.

Commands that tests start can be interrupted, also if the tests themselves run in the background.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()  # by ../conftest.py

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts commands in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the Triton cases that are not marked as `interpreted`, if there is no GPU."""
    if not INTERPRETED:
        return
    deselected = [item for item in items if item.get_closest_marker("triton") and not is_marked_interpreted(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def is_marked_interpreted(item: pytest.Item) -> bool:
    """Returns whether a marker `interpreted` lists the parameters of a case.

    `@pytest.mark.interpreted` covers all cases of a test, and `@pytest.mark.interpreted(grid=[(13,)], masked=[True])`
    those whose `grid` and `masked` are among the listed values. Several markers add up.
    """
    for marker in item.iter_markers("interpreted"):
        if all(item.callspec.params[name] in values for name, values in marker.kwargs.items()):  # type: ignore[attr-defined]
            return True
    return False


@pytest.fixture
def fresh() -> Iterator[None]:
    """Starts and ends with empty caches of compilation."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
