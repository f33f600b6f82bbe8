"""Fixture that runs a test with every backend of `read_grid`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from perceiver_core.kernels.grid import cpp_library
from tests.kernels.grid.backends import use_backend
from tests.kernels.grid.compiled import built, cache, compilations, copies, script

__all__ = ["backend", "built", "cache", "compilations", "copies", "script"]

TRITON_MARKS = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("error::perceiver_core.kernels.grid.GridFallbackWarning"),  # the kernels must run
]


@pytest.fixture(params=["cpp", "eager", "slabs", pytest.param("triton", marks=TRITON_MARKS)])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "triton":
        pytest.importorskip("triton")
        from tests.kernels.grid.triton_probe import why_triton_fails

        if reason := why_triton_fails():
            pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "cpp" and not cpp_library.functions():
            pytest.skip("no compiler")
    with use_backend(request.param):
        yield
