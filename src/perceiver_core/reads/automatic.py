"""The default strategy of a read: the fastest that can compute it, by predicted cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from perceiver_core.reads.dense import Dense
from perceiver_core.reads.factored import Factored
from perceiver_core.reads.machine import DEFAULTS, MEASURED_CPU, Machine
from perceiver_core.reads.strategy import Cost, Memory, ReadContext, Sizes, Strategy, check_strategy, unable
from perceiver_core.reads.structured import Structured
from perceiver_core.registry import register

LAST = 1e6  # seconds added to the cost of a strategy that is taken only where no other can compute a read
MATERIALIZED_BYTES = 2**30  # a CPU read that would write out more is not dense where another strategy computes it


class Decision(NamedTuple):
    """The strategy that `Auto` selects for a read, with the sizes and constants that it was selected by.

    Args:
        strategy: Strategy taken.
        sizes: Sizes of the read.
        machine: Machine constants from which costs were predicted.

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
        """Predicted cost of the strategy taken."""
        return self.strategy.cost(self.sizes, self.machine)


@partial(register, name="reads.Auto")
@dataclass(frozen=True)
class Auto:
    """Take the fastest of several strategies on a CPU or CUDA GPU, by predicted cost; on other devices `Dense`.

    On a CPU, `Dense` comes last where it would write out more than a gibibyte: the others process a large input in
    slabs. On a GPU, `Factored` comes last: its slabs are sized for CPU caches.

    Args:
        strategies: Strategies to choose from; one that is left out is never taken.
        machine: Machine constants; those of `reads.machine` for the device by default.

    Raises:
        TypeError: A strategy that is none.
        ValueError: No strategies; or (in `choose`) none that can compute a read.

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
        """Return why none of the strategies can compute a read; empty if one can."""
        if not self.strategies[-1].why_not(context):  # usually Dense, which computes every read
            return ""
        reasons = [strategy.why_not(context) for strategy in self.strategies]
        return "" if "" in reasons else "; ".join(reasons)

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Return the least cost of the strategies."""
        return min((strategy.cost(sizes, machine) for strategy in self.strategies), key=lambda cost: cost.seconds)

    def choose(self, context: ReadContext) -> Decision:
        """Return the decision for a read.

        Raises:
            ValueError: None of the strategies can compute it.
        """
        sizes = Sizes.of(context)
        machine = self.machine or DEFAULTS.get(sizes.device, MEASURED_CPU)
        ranked: Sequence[Strategy] = tuple(self.strategies)
        if torch.compiler.is_compiling():  # it traces the function itself, and costs of symbolic sizes are best avoided
            ranked = [strategy for strategy in ranked if not strategy.why_not(context)]
            ranked = ranked if len(ranked) == 1 else _ranked.__wrapped__(tuple(ranked), sizes, machine)
        else:
            try:
                ranked = _ranked(ranked, sizes, machine)
            except TypeError:  # a user's strategy or a symbolic size that is not hashable
                ranked = _ranked.__wrapped__(ranked, sizes, machine)
        slow = None  # a structured read without its compiled loop, where nothing else can compute the read
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
        """Return the memory that the chosen strategy makes."""
        return self.choose(context).strategy.prepare(context)


@lru_cache(maxsize=1024)  # a pure function, whose arguments repeat in every forward pass of a model
def _ranked(strategies: tuple[Strategy, ...], sizes: Sizes, machine: Machine) -> list[Strategy]:
    """Return strategies by ascending cost; last are those that are taken only where no other can compute the read."""

    def is_last(strategy: Strategy) -> bool:
        if sizes.device not in DEFAULTS:
            return not isinstance(strategy, Dense)  # PyTorch's own kernels come first
        if sizes.device == "cuda":
            return not isinstance(strategy, (Structured, Dense))
        return isinstance(strategy, Dense) and sizes.materialized_bytes() > MATERIALIZED_BYTES

    remaining, ranked = list(strategies), []
    seconds = [strategy.cost(sizes, machine).seconds + LAST * is_last(strategy) for strategy in strategies]
    while remaining:  # not sorted(), which torch.compile does not apply to such numbers
        best = seconds.index(min(seconds))
        ranked.append(remaining.pop(best))
        seconds.pop(best)
    return ranked
