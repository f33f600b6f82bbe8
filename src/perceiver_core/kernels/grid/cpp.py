"""CPU backend of `read_grid`. It calls the compiled C++ code in `cpp/`."""

from __future__ import annotations

import os
from array import array

import torch
from torch import Tensor

from perceiver_core.kernels.grid import cpp_library
from perceiver_core.kernels.grid.interface import GridGradients, GridInputs, GridOutputs, Upstream

_has_started_threads = False


def _use_one_thread() -> None:
    """Limit PyTorch to one thread in a forked process if its parent has used several.

    The threads of OpenMP do not exist in the child. Parallel operators, also those of PyTorch, would wait for them
    forever.
    """
    if _has_started_threads:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread)


def forward(inputs: GridInputs) -> GridOutputs:
    """Compute the forward pass.

    Raises:
        MemoryError: If there is no memory for the working memory of a thread.
    """
    content_queries, axis_queries, content, _, _ = inputs
    rows = content.shape[0], *content_queries.shape[1:3]
    read = content.new_empty(*rows, content_queries.shape[-1])
    marginals = content.new_empty(*rows, axis_queries.shape[-1])
    base, total = content.new_empty(rows), content.new_empty(rows)
    outputs = GridOutputs(read, marginals, base, total)
    _call("forward", inputs, outputs)
    return outputs


def backward(inputs: GridInputs, upstream: Upstream, needs_token_gradients: bool) -> GridGradients:
    """Compute the gradients.

    Raises:
        MemoryError: If there is no memory for the working memory of a thread.
    """
    content_queries, axis_queries, content, scale, _ = inputs
    d_content, d_scale = (torch.empty_like(x) if needs_token_gradients else x.new_empty(0) for x in (content, scale))
    gradients = GridGradients(torch.empty_like(content_queries), torch.empty_like(axis_queries), d_content, d_scale)
    _call("backward", inputs, (*upstream, *gradients))
    return gradients


def _call(name: str, inputs: GridInputs, others: tuple[Tensor, ...]) -> None:
    """Call a function of the library."""
    global _has_started_threads
    content_queries, content, threads = inputs.content_queries, inputs.content, torch.get_num_threads()
    _has_started_threads |= threads > 1
    function = cpp_library.functions()[name, content.dtype]
    pointers = (None if x is None else x.data_ptr() for x in (*inputs, *others))  # 0 (null) for empty tensors
    axes = array("q", content.shape[2:])  # int64_t; the variable keeps the buffer alive during the call
    sizes = content.shape[0], *content_queries.shape, content.ndim - 2, axes.buffer_info()[0]
    if num_bytes := function(*sizes, *pointers, threads):
        raise MemoryError(
            f"the {name} pass of a structured read over {tuple(content.shape[2:])} tokens could not allocate "
            f"{num_bytes / 1e6:.1f} MB of working memory. Free memory (smaller batches, fewer processes), or raise the "
            "limit on the memory of this process, and call it again"
        )
