"""Default strategy for reads (cross-attentions): run the candidate strategy with the shortest predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from perceiver_core.reads.dense import Dense
from perceiver_core.reads.factored import Factored
from perceiver_core.reads.machine import DEFAULTS, MEASURED_CPU, Cost, Machine
from perceiver_core.reads.strategy import Memory, ReadContext, Sizes, Source, Strategy, unable
from perceiver_core.reads.structured import Structured
from perceiver_core.registry import register

LAST = 1e6  # seconds added to the cost of strategies of last resort; see `Auto`
MATERIALIZED_BYTES = 2**30  # on the CPU, `Dense` is a last resort if it would allocate more


class Decision(NamedTuple):
    """Strategy that `Auto` selects for a read, the sizes of the read, and the machine constants.

    Args:
        strategy: Selected strategy.
        sizes: Sizes of the read, or typical sizes under torch.compile (see `Sizes.of`).
        machine: Machine constants used to predict costs.

    Example:
        >>> context = pc.CrossAttend(32, 10).read_context(torch.randn(2, 50, 10), num_queries=7)
        >>> decision = pc.reads.Auto().choose(context)
        >>> decision.strategy, decision.sizes.num_queries, decision.cost.seconds > 0
        (Dense(), 7, True)
    """

    strategy: Strategy
    sizes: Sizes
    machine: Machine

    @property
    def cost(self) -> Cost:
        """Predicted cost of the selected strategy."""
        return self.strategy.cost(self.sizes, self.machine)


@partial(register, name="reads.Auto")
@dataclass(frozen=True)
class Auto:
    """Strategy that runs each read (cross-attention) with the candidate that has the shortest predicted time.

    Some candidates are a last resort, used only if no other candidate supports the read:

    - `Structured` if its compiled kernel is unavailable, because it is slow without the kernel.
    - On the CPU: `Dense` if tokens, normalized tokens, keys and values would together take more than 1 GiB.
    - On a CUDA GPU: all candidates except `Structured` and `Dense`.
    - On other devices: all candidates except `Dense`.

    Args:
        strategies: Candidate strategies.
        machine: Constants of the cost model (default: `reads.machine.DEFAULTS` for the input's device).

    Raises:
        TypeError: If an element of `strategies` is not an instance of a strategy class.
        ValueError: If `strategies` is empty.

    Example:
        >>> read = pc.CrossAttend(32, 10, strategy=pc.reads.Auto([pc.reads.Factored(), pc.reads.Dense()]))
        >>> read.strategy.strategies
        [Factored(), Dense()]
    """

    strategies: Sequence[Strategy] = (Structured(), Factored(), Dense())
    machine: Machine | None = None

    def __post_init__(self) -> None:
        if not self.strategies:
            raise ValueError("strategies must name at least one; got none. reads.Dense() computes every read")
        for strategy in self.strategies:
            check_strategy(strategy)

    def why_not(self, context: ReadContext) -> str:
        """Return the reasons why no candidate supports a read, or an empty string if at least one supports it."""
        if not self.strategies[-1].why_not(context):  # usually Dense, which supports every read
            return ""
        reasons = [strategy.why_not(context) for strategy in self.strategies]
        return "" if "" in reasons else "; ".join(reasons)

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Return the cost of the candidate with the shortest predicted time."""
        return min((strategy.cost(sizes, machine) for strategy in self.strategies), key=lambda cost: cost.seconds)

    def choose(self, context: ReadContext) -> Decision:
        """Select the candidate with the shortest predicted time among the candidates that support a read.

        A candidate of last resort (see the class docstring) is selected only if no other candidate supports the read.

        Raises:
            ValueError: If no candidate supports the read.
        """
        sizes = Sizes.of(context)
        machine = self.machine or DEFAULTS.get(sizes.device, MEASURED_CPU)
        ranked: Sequence[Strategy] = tuple(self.strategies)
        if torch.compiler.is_compiling():  # bypass the cache, and avoid computing costs of symbolic sizes
            ranked = [strategy for strategy in ranked if not strategy.why_not(context)]
            ranked = ranked if len(ranked) == 1 else _ranked.__wrapped__(tuple(ranked), sizes, machine)
        else:
            try:
                ranked = _ranked(ranked, sizes, machine)
            except TypeError:  # an unhashable custom strategy or symbolic size
                ranked = _ranked.__wrapped__(ranked, sizes, machine)
        slow = None  # `Structured` without its compiled kernel, a last resort
        for strategy in ranked:
            if strategy.why_not(context):
                continue
            if not isinstance(strategy, Structured) or not strategy.missing(context):
                return Decision(strategy, sizes, machine)
            slow = slow or strategy
        if slow is None:
            raise unable(self, self.why_not(context))
        return Decision(slow, sizes, machine)

    def prepare(self, context: ReadContext) -> Memory:
        """Select a candidate, and compute the keys and values (`Memory`) of a read with it."""
        return self.choose(context).strategy.prepare(context)


def with_norm_output(context: ReadContext) -> Source:
    """Return the source of a read. If its strategy is `Dense`, or `Auto` selects it, include the output of the norm.

    In this way, the block calls its norm itself. Tools such as torchinfo and `torch.export.unflatten` expect a module
    to be called by its parent.
    """
    source = context.source
    strategy = source.strategy.choose(context).strategy if isinstance(source.strategy, Auto) else source.strategy
    if not isinstance(strategy, Dense):
        return source
    options = source.mask, source.positions, source.num_queries
    return Source(source.tokens, source.norm, strategy, *options, source.normalized())


@lru_cache(maxsize=1024)  # pure; its arguments repeat in every forward pass of a model
def _ranked(strategies: tuple[Strategy, ...], sizes: Sizes, machine: Machine) -> list[Strategy]:
    """Sort strategies by predicted time, with strategies of last resort (see `Auto`) at the end of the list."""

    def is_last(strategy: Strategy) -> bool:
        if sizes.device not in DEFAULTS:
            return not isinstance(strategy, Dense)  # on other devices, prefer PyTorch's own kernels
        if sizes.device == "cuda":
            return not isinstance(strategy, (Structured, Dense))
        return isinstance(strategy, Dense) and sizes.materialized_bytes() > MATERIALIZED_BYTES

    remaining, ranked = list(strategies), []
    seconds = [strategy.cost(sizes, machine).seconds + LAST * is_last(strategy) for strategy in strategies]
    while remaining:  # torch.compile does not support sorted() for symbolic numbers
        best = seconds.index(min(seconds))
        ranked.append(remaining.pop(best))
        seconds.pop(best)
    return ranked


def check_strategy(strategy: Strategy) -> None:
    """Check that `strategy` is an instance of a strategy class.

    Raises:
        TypeError: If `strategy` is a class, or an object that is not a strategy.

    Example:
        >>> pc.reads.check_strategy(pc.reads.Dense())
    """
    if isinstance(strategy, type) or not isinstance(strategy, Strategy):
        shown = strategy.__name__ if isinstance(strategy, type) else repr(strategy)
        raise TypeError(f"strategy must be an object such as reads.Dense() or reads.Auto(); got {shown}")
