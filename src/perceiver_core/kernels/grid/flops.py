"""FLOPs of structured reads, for `torch.utils.flop_counter.FlopCounterMode` and tools that use it.

As for PyTorch's own operators, multiplications and additions are counted, but not the softmax. For each pair of a query
and a token, the score takes one dot product of content channels and one addition per axis. The weighted sums take as
many operations.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Shape = Sequence[int]


def _products(content_queries: Shape, content: Shape) -> tuple[int, int]:
    """Return the FLOPs of one dot product of content channels per pair, and of one addition per pair and axis."""
    (heads, queries, channels), (batch, _, *grid) = content_queries[1:], content
    pairs = batch * heads * queries * prod(grid)
    return 2 * pairs * channels, pairs * len(grid)


def forward_flops(content_queries: Shape, axis_queries: Shape, content: Shape, *_: Any, **__: Any) -> int:
    """Return the FLOPs of `read_grid`: scores, weighted sums of the content, and marginals of the weights."""
    by_content, by_axes = _products(content_queries, content)
    return 2 * (by_content + by_axes)


def backward_flops(content_queries: Shape, axis_queries: Shape, content: Shape, *others: Any, **_: Any) -> int:
    """Return the FLOPs of the backward pass: recomputed scores, their gradients, and the gradients of the inputs.

    The gradient of the content has two parts: one from the scores and one from the weighted sums.
    """
    by_content, by_axes = _products(content_queries, content)
    needs_token_gradients = others[-1]
    return 3 * (by_content + by_axes) + (2 * by_content if needs_token_gradients else 0)


def register() -> None:
    """Register the FLOPs of both operators with the counters that are active.

    It is called before each use of the operators. A registration at import would take 0.2 s, because the module with
    the counter imports Triton.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return
    if (counters := sys.modules.get("torch.utils.flop_counter")) is None:
        return
    operators = torch.ops.perceiver_core
    formulas = {operators.read_grid: forward_flops, operators.read_grid_backward: backward_flops}
    for operator, formula in formulas.items():
        if operator not in counters.flop_registry:
            counters.register_flop_formula(operator)(formula)
        for mode in _get_current_dispatch_mode_stack():  # its own registry is a copy
            registry = getattr(getattr(mode, "counter", mode), "flop_registry", {})
            registry.setdefault(operator, counters.flop_registry[operator])
