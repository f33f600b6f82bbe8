"""The Triton backend without its kernels: availability, fallback to plain PyTorch, no synchronization. Needs no GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from perceiver_core.kernels.grid import GridFallbackWarning, eager, missing_kernel, triton, triton_launch
from perceiver_core.kernels.grid.interface import GridInputs, Upstream
from perceiver_core.kernels.grid.triton_launch import NoKernelError

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_failures", {})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reports an NVIDIA GPU of the Hopper generation, and Triton."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton, "_has_triton", lambda: True)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel can be built."""

    def raise_error(*_: object) -> None:
        raise NoKernelError("out of shared memory")

    monkeypatch.setattr(triton, "launch_over_queries", raise_error)


def make_inputs(device: str, *grid: int, masked: bool = True) -> GridInputs:
    torch.manual_seed(0)
    shapes = (2, 3, 5, 4), (2, 3, 5, sum(grid)), (2, 4, *grid), (2, *grid)
    tensors = [torch.rand(shape).to(device) for shape in shapes]
    return GridInputs(*tensors, (torch.rand(2, *grid) < 0.5).to(device) if masked else None)


def test_the_reason_why_kernels_are_unavailable(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_kernel(CUDA, 3) == "" == missing_kernel(CUDA, triton.MAX_CHANNELS)
    assert "no compiled loop for mps" in missing_kernel(torch.device("mps"), 3)
    assert f"{triton.MAX_CHANNELS} do" in missing_kernel(CUDA, triton.MAX_CHANNELS + 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in missing_kernel(CUDA, 3)
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD's
    assert "NVIDIA" in missing_kernel(CUDA, 3)
    monkeypatch.setattr(triton, "_has_triton", lambda: False)
    assert missing_kernel(CUDA, 3) == "Triton is not installed"


def test_without_kernels_reads_use_plain_pytorch_with_a_warning(hopper: None, no_kernels: None) -> None:
    inputs = make_inputs("cpu", 3, 7)
    with pytest.warns(
        GridFallbackWarning, match="plain PyTorch, slowly: no kernel could be built: out of shared memory"
    ):
        outputs = triton.forward(inputs)
    expected = eager.forward(inputs)
    torch.testing.assert_close(tuple(outputs), tuple(expected), rtol=0.0, atol=0.0)
    upstream = Upstream(outputs.base, outputs.total, outputs.content, outputs.marginals, outputs.total)
    with pytest.warns(GridFallbackWarning, match="out of shared memory"):
        gradients = triton.backward(inputs, upstream, True)
    expected_gradients = eager.backward(inputs, upstream, True)
    torch.testing.assert_close(tuple(gradients), tuple(expected_gradients), rtol=0.0, atol=0.0)
    triton._failures[CUDA] = triton._failures.pop(torch.device("cpu"))
    assert "out of shared memory" in missing_kernel(CUDA, 3)


@pytest.mark.filterwarnings("error::perceiver_core.kernels.grid.GridFallbackWarning")
def test_where_the_warning_is_an_error_every_read_without_kernels_raises_it(no_kernels: None) -> None:
    """Otherwise all tests after the first would pass without the kernels."""
    for _ in range(2):
        with pytest.raises(GridFallbackWarning, match="out of shared memory"):
            triton.forward(make_inputs("cpu", 3, 7))


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(triton, "launch_over_queries", raise_error)
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="illegal memory access"):
        triton.forward(make_inputs("cpu", 3, 7))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that would run, none of which does."""
    names: list[str] = []
    monkeypatch.setattr(triton_launch, "run_kernel", lambda kernel, *_: names.append(kernel))
    yield names


@pytest.mark.parametrize("grid", [(7,), (3, 20), (2, 3, 5), (2, 20, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_no_value_is_read_on_the_cpu(grid: tuple[int, ...], masked: bool, launches: list[str]) -> None:
    """Tensors without values work, so the CPU never waits for a GPU."""
    inputs = make_inputs("meta", *grid, masked=masked)
    read, marginals, base, total = triton.forward(inputs)
    assert read.shape == (2, 3, 5, 4) and marginals.shape == (2, 3, 5, sum(grid)) and base.shape == (2, 3, 5)
    gradients = triton.backward(inputs, Upstream(base, total, read, marginals, total), True)
    assert [x.shape for x in gradients] == [x.shape for x in inputs[:4]]
    assert launches == ["forward", "backward_queries", "backward_tokens"]
