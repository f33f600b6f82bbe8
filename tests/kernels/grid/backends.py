"""Choice of the backend of `read_grid` in tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from perceiver_core.kernels.grid import eager, operator, triton
from perceiver_core.kernels.grid.interface import GridGradients, GridInputs, GridOutputs, Upstream

all_backends = pytest.mark.usefixtures("backend")  # see conftest.py


class TritonOnCPUTensors:
    """Triton backend for tensors on the CPU: on a GPU if there is one, else interpreted."""

    @staticmethod
    def forward(inputs: GridInputs) -> GridOutputs:
        return tree_map(to_cpu, triton_or_eager(inputs).forward(tree_map(to_gpu, inputs)))

    @staticmethod
    def backward(inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
        arguments = tree_map(to_gpu, (inputs, upstream))
        return tree_map(to_cpu, triton_or_eager(inputs).backward(*arguments, needs_token_gradients))


def triton_or_eager(inputs: GridInputs) -> Any:
    """Returns the eager backend for more channels than the kernels take."""
    return triton if inputs.content.shape[1] <= triton.MAX_CHANNELS else eager


def to_gpu(x: Any) -> Any:
    return x.cuda() if isinstance(x, Tensor) and torch.cuda.is_available() else x


def to_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes `read_grid` use a backend: "cpp" if it compiles, "eager", "slabs" (eager in small slabs), or "triton"."""
    with pytest.MonkeyPatch.context() as patch:
        if name != "cpp":
            patch.setattr(operator, "_backend", lambda _: TritonOnCPUTensors if name == "triton" else eager)
        if name == "slabs":
            patch.setattr(eager, "MAX_SCORES", 23)
        yield
