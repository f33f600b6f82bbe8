"""Report on the reads (cross-attentions) of a model: strategies, predicted costs, and reasons for the choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from perceiver_core import checks
from perceiver_core.argument_errors import checked
from perceiver_core.kernels import fastest, sdpa
from perceiver_core.kernels.sdpa import kernel_for
from perceiver_core.reads import Auto, Cost, Decision, Dense, Factored, ReadContext, Sizes, Strategy, Structured
from perceiver_core.reads.strategy import listening


@dataclass(frozen=True)
class ReadExplanation:
    """Strategy and predicted cost of one read (cross-attention). Reads that share keys and values are reported as one.

    Args:
        read: Qualified name of the read's module; empty if the read is the model itself.
        sizes: Sizes of the read; see `reads.Sizes`. The queries of reads that share keys and values are added up.
        strategy: Strategy that computes the read.
        cost: Predicted cost of the forward pass. `cost.seconds` is the time on one CPU thread or on a whole GPU.
        why: Reasons for the choice. For each other strategy, they give the predicted time, or say why the strategy is
            slow or cannot compute the read. "forced" means that the read has a fixed strategy instead of `reads.Auto`.
    """

    read: str
    sizes: Sizes
    strategy: Strategy
    cost: Cost
    why: str


class ReadExplanations(tuple[ReadExplanation, ...]):
    """Tuple with one `ReadExplanation` per read of a model, in execution order. It prints as a table.

    Example:
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, num_reads=2, depth=1, num_heads=4, share=False)
        >>> [read.read for read in pc.explain_reads(encoder, torch.randn(2, 50, 10))]
        ['reads.0', 'reads.1']
    """

    def __str__(self) -> str:
        """Return a table with one row per read."""
        head = ("read", "queries", "tokens", "strategy", "GFLOP", "MB", "ms", "why")
        rows = [head, *(_row(read) for read in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
        lines = [
            "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


@checked
def explain_reads(model: nn.Module, *inputs: object, **options: object) -> ReadExplanations:
    """Run a model once, and report the strategy of each read (cross-attention), with predicted costs and reasons.

    FLOPs, bytes and milliseconds are predictions of the cost model for the forward pass on one GPU, or on the current
    number of CPU threads. On CUDA, the report also names the PyTorch attention kernel of reads with the `Dense` or
    `Factored` strategy. Use `reads.set_strategy` to change the strategy. A compiled model is run without torch.compile.
    With torch.compile, a small input may use a different strategy, because the choice is then based on typical sizes
    instead of actual sizes.

    Args:
        model: Module with reads, such as a `Perceiver`, an `Encoder`, a `Decoder`, or a custom module.
        inputs: Positional arguments of the model's `forward`.
        options: Keyword arguments of the model's `forward`.

    Returns:
        One `ReadExplanation` per read, in a tuple that prints as a table.

    Raises:
        ValueError: If the model calls no reads.

    Example:
        >>> positions = pc.positions.Fourier(num_axes=2, num_bands=64, max_resolution=96)
        >>> image = pc.adapters.Image(3, positions=positions)
        >>> encoder = pc.Encoder(image.dim, num_latents=256, dim=64, depth=1, num_heads=4)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Identity())
        >>> pc.reads.set_strategy(model, pc.reads.Factored())
        >>> [read] = pc.explain_reads(model, torch.rand(1, 3, 96, 64))
        >>> read.read, read.strategy, read.sizes.num_queries, read.sizes.axes
        ('encoder.reads.0', Factored(), 256, (96, 64))
    """
    model = getattr(model, "_orig_mod", model)  # unwraps a module from torch.compile
    names = {id(part): name.rpartition(".")[0] for name, part in model.named_modules()}
    reads: list[ReadExplanation] = []

    def explain(context: ReadContext) -> None:
        reads.append(_explanation(names.get(id(context.attention), ""), context))

    eager = torch.compiler.set_stance("force_eager")  # also for parts that are compiled
    with eager, listening(explain), frozen_state(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        model(*inputs, **options)
    if not reads:
        raise ValueError(
            f"model must call reads (CrossAttend), which have a strategy; {type(model).__name__} called none"
        )
    return ReadExplanations(reads)


@contextmanager
def frozen_state(model: nn.Module) -> Iterator[None]:
    """Context manager that keeps running statistics of norms unchanged and restores the modules' random generators."""
    moving = [part for part in model.modules() if part.training and hasattr(part, "running_mean")]
    generators = [g for part in model.modules() if isinstance(g := getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        for part in moving:
            part.training = False
        yield
    finally:
        for part in moving:
            part.training = True
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _explanation(name: str, context: ReadContext) -> ReadExplanation:
    strategy = context.source.strategy
    choice = strategy if isinstance(strategy, Auto) else Auto(strategies=[strategy])
    decision = choice.choose(context)
    reasons = [] if choice is strategy else ["forced"]
    reasons += _kernel_note(decision.strategy, context)
    for other in (Structured(), Factored(), Dense()):
        if other != decision.strategy:
            reasons.append(_reason(other, context, decision, allowed=other in choice.strategies))
    return ReadExplanation(name, decision.sizes, decision.strategy, decision.cost, "; ".join(reasons))


def _reason(strategy: Strategy, context: ReadContext, decision: Decision, *, allowed: bool) -> str:
    if reason := strategy.why_not(context):
        return f"{_name(strategy)} cannot: {reason}"
    if isinstance(strategy, Structured) and (missing := strategy.missing(context)):
        return f"{_name(strategy)} is slow here: {missing}"
    cost = strategy.cost(decision.sizes, decision.machine)
    return f"{_name(strategy)} {_milliseconds(cost, decision.sizes)} ms" + ("" if allowed else " (not allowed)")


def _kernel_note(strategy: Strategy, context: ReadContext) -> list[str]:
    """Return a list with the name of PyTorch's attention kernel for a read on CUDA. Otherwise, return an empty list."""
    attention, source = context
    device = source.content().device
    if device.type != "cuda" or isinstance(strategy, Structured) or attention.kernel not in (fastest, sdpa):
        return []
    key_dim, value_dim = (part.out_features // attention.num_kv_heads for part in (attention.key, attention.value))
    kernel = kernel_for(key_dim, value_dim, checks.product_dtype(source.content()), device, source.whole_mask())
    return [f"by the {kernel.name} kernel" + (f" ({kernel.why})" if kernel.why else "")]


def _row(read: ReadExplanation) -> tuple[str, ...]:
    s = read.sizes
    tokens = f"{s.batch} x {' x '.join(map(str, s.axes))} x ({s.num_channels} + {s.token_dim - s.num_channels})"
    cost = (f"{read.cost.flops / 1e9:.3g}", f"{read.cost.bytes / 1e6:.3g}", _milliseconds(read.cost, s))
    return (read.read or "(itself)", str(s.num_queries), tokens, _name(read.strategy), *cost, read.why)


def _name(strategy: Strategy) -> str:
    return type(strategy).__name__


def _milliseconds(cost: Cost, sizes: Sizes) -> str:
    return f"{1000 * cost.seconds / sizes.num_threads():.3g}"
