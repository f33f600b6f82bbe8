"""Computation paths of a model: the strategy of its reads and the kernel of its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from perceiver_core import kernels, reads

PATH = ("strategy", "kernel")  # attributes that affect how a result is computed


@dataclass(frozen=True)
class Preferred:
    """Strategy that uses another strategy for the reads that it supports, and `Dense` for all others."""

    strategy: Any

    def why_not(self, context: Any) -> str:
        return ""

    def cost(self, sizes: Any, machine: Any) -> Any:
        return self.strategy.cost(sizes, machine)

    def prepare(self, context: Any) -> Any:
        return (reads.Dense() if self.strategy.why_not(context) else self.strategy).prepare(context)


@contextmanager
def path(model: nn.Module, strategy: Any, kernel: Any) -> Iterator[None]:
    """Context manager that sets the strategy of all reads and the kernel of all softmax attention."""
    before = [(part, name, vars(part)[name]) for part in model.modules() for name in PATH if name in vars(part)]
    for part, name, own in before:
        if name == "strategy":
            part.strategy = Preferred(strategy)
        elif own in (kernels.fastest, kernels.sdpa, kernels.reference):
            part.kernel = kernel
        elif own is kernels.add_zero_attn:
            part.kernel = partial(own, kernel=kernel)
    try:
        yield
    finally:
        for part, name, own in before:
            setattr(part, name, own)
