"""CPU backend of `read_grid`. It calls the compiled C++ code in `cpp/`."""

from __future__ import annotations

import os
from array import array

import torch
from torch import Tensor

from perceiver_core.kernels.grid import cpp_library
from perceiver_core.kernels.grid.interface import GridGradients, GridInputs, GridOutputs, Upstream

_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


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
    """Call a function of the library. OpenMP is not used in a forked process, where its threads no longer exist."""
    content_queries, content = inputs.content_queries, inputs.content
    function = cpp_library.functions()[name, content.dtype]
    pointers = (None if x is None else x.data_ptr() for x in (*inputs, *others))  # 0 (null) for empty tensors
    axes = array("q", content.shape[2:])  # int64_t; the variable keeps the buffer alive during the call
    sizes = content.shape[0], *content_queries.shape, content.ndim - 2, axes.buffer_info()[0]
    if num_bytes := function(*sizes, *pointers, torch.get_num_threads(), not _is_forked):
        raise MemoryError(
            f"the {name} pass of a structured read over {tuple(content.shape[2:])} tokens could not allocate "
            f"{num_bytes / 1e6:.1f} MB of working memory. Free memory (smaller batches, fewer processes), or raise the "
            "limit on the memory of this process, and call it again"
        )
