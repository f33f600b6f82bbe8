"""What a model's reads do: which path each takes, what that costs, and why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from perceiver_core.reads.costs import Cost, Machine, Request, Sizes
from perceiver_core.reads import Auto, Dense, Factored, Strategy, Structured, kernel_of, reads_of


@dataclass(frozen=True)
class ReadExplanation:
    """One read. Where several share what they read, it is explained once, for the queries of all of them.

    Args:
        read: its name in the model.
        sizes: who reads what; see `costs.Sizes`.
        strategy: the path that it takes.
        cost: what that path takes for the forward pass, predicted, on one thread or the whole GPU.
        why: what the other paths would take, or why they cannot.
    """

    read: str
    sizes: Sizes
    strategy: Strategy
    cost: Cost
    why: str


class ReadExplanations(tuple[ReadExplanation, ...]):
    """All reads of a model in the order in which they happen; printed, a table.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, num_reads=2, depth=1, num_heads=4, share=False)
        >>> [read.read for read in pc.explain_reads(encoder, torch.randn(2, 50, 10))]
        ['reads.0', 'reads.1']
    """

    def __str__(self) -> str:
        """A table with one row a read."""
        head = ("read", "queries", "tokens", "path", "GFLOP", "MB", "ms", "why")
        rows = [head, *(_row(read) for read in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
        lines = [
            "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def explain_reads(model: nn.Module, *inputs: Any, **named: Any) -> ReadExplanations:
    """Runs a model once and says which path each of its reads takes, what that costs, and why.

    A compiled model is explained as it runs without torch.compile, where a small input may take another path.

    FLOPs, bytes and milliseconds are those of the cost model: of the forward pass, and on as many threads as PyTorch
    uses, or one GPU. On CUDA it also says which of PyTorch's kernels a read by `Dense` has. `paths.set_strategy` makes
    reads take another path.

    Args:
        model: whatever holds reads: a `Perceiver`, an `Encoder`, your own.
        inputs: what it is called with.
        named: what it is called with by name.

    Returns:
        One entry a read; printed, a table.

    Raises:
        ValueError: a model that reads nothing.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> from perceiver_core import reads
        >>> image = pc.adapters.Image(num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=96))
        >>> encoder = pc.Encoder(image.dim, num_latents=256, dim=64, depth=1, num_heads=4)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Identity())
        >>> reads.set_strategy(model, reads.Factored())
        >>> [read] = pc.explain_reads(model, torch.rand(1, 3, 96, 64))
        >>> read.read, read.strategy, read.sizes.queries, read.sizes.axes
        ('encoder.reads.0', Factored(), 256, (96, 64))
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; explained as it runs without
    requests: list[tuple[str, Strategy, Request]] = []
    with _listening(model, requests), _statistics_at_rest(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        model(*inputs, **named)
    return ReadExplanations(_explained(*request) for request in requests)


@dataclass
class _Listener:
    """A path that takes another one, and remembers what it was asked."""

    name: str
    path: Strategy
    requests: list[tuple[str, Strategy, Request]]

    def read(self, request: Request) -> Any:
        self.requests.append((self.name, self.path, request))
        return self.path.read(request)

    def why_not(self, request: Request) -> str:
        return self.path.why_not(request)

    def cost(self, request: Request, costs: Machine) -> Cost:
        return self.path.cost(request, costs)


@contextmanager
def _listening(model: nn.Module, requests: list[tuple[str, Strategy, Request]]) -> Iterator[None]:
    reads = reads_of(model)
    taken = {name: read.strategy for name, read in reads.items()}
    try:
        for name, read in reads.items():
            read.strategy = _Listener(name, taken[name], requests)
        yield
    finally:
        for name, read in reads.items():
            read.strategy = taken[name]


@contextmanager
def _statistics_at_rest(model: nn.Module) -> Iterator[None]:
    """A look at a model in training must not move its running means."""
    moving = [part for part in model.modules() if part.training and hasattr(part, "running_mean")]
    try:
        for part in moving:
            part.training = False
        yield
    finally:
        for part in moving:
            part.training = True


def _explained(name: str, path: Strategy, request: Request) -> ReadExplanation:
    choice = path if isinstance(path, Auto) else Auto(strategies=[path])
    taken = choice.choose(request)
    others = [other for other in (Structured(), Factored(), Dense()) if other != taken]
    sizes = Sizes.of(request)
    costs = choice.costs_for(sizes.device)
    why = [_reason(other, request, costs, allowed=other in choice.of) for other in others]
    why = [*([] if choice is path else ["forced"]), *_kernel(taken, request), *why]
    return ReadExplanation(name, sizes, taken, taken.cost(request, costs), "; ".join(why))


def _kernel(path: Strategy, request: Request) -> list[str]:
    """Which kernel a path has on CUDA, where that depends on what it is given."""
    on_cuda = Sizes.of(request).device == "cuda" and not isinstance(path, Structured)
    kernel = kernel_of(request) if on_cuda else None
    return [] if kernel is None else [f"by the {kernel.name} kernel" + (f" ({kernel.why})" if kernel.why else "")]


def _reason(path: Strategy, request: Request, costs: Machine, *, allowed: bool) -> str:
    if reason := path.why_not(request):
        return f"{_name(path)} cannot: {reason}"
    if isinstance(path, Structured) and (missing := path.missing(request)):
        return f"{_name(path)} is not fast here: {missing}"
    took = _milliseconds(path.cost(request, costs), Sizes.of(request))
    return f"{_name(path)} {took} ms" + ("" if allowed else " (not allowed)")


def _row(read: ReadExplanation) -> tuple[str, ...]:
    s = read.sizes
    tokens = f"{s.batch} x {' x '.join(map(str, s.axes))} x ({s.channels} + {s.width - s.channels})"
    cost = (f"{read.cost.flops / 1e9:.3g}", f"{read.cost.bytes / 1e6:.3g}", _milliseconds(read.cost, s))
    return (read.read or "(itself)", str(s.queries), tokens, _name(read.strategy), *cost, read.why)


def _name(path: Strategy) -> str:
    return type(path).__name__


def _milliseconds(cost: Cost, sizes: Sizes) -> str:
    return f"{1000 * cost.seconds / sizes.threads:.3g}"
