"""Reads of an input by queries: strategies that give the same result and differ in time and memory.

    Dense        tokens written out, normalized, projected to keys and values; then an attention kernel
    Factored     keys and values formed from the content and one table per grid axis; then an attention kernel
    Structured   scores and outputs from content and tables, without keys and values; see `kernels.grid`

A strategy turns a `ReadContext` (attention, norm, input) into a `Memory`, and `memory.attend(q, kernel)` gives the
output. `Auto`, the default, takes the strategy of least predicted cost. Passing another one forces it; leaving one out
of `Auto(strategies)` forbids it. `explain_reads` reports the decisions of a model.
"""

from torch import nn

from perceiver_core.reads.automatic import Auto, Decision
from perceiver_core.reads.axes import merged_axes
from perceiver_core.reads.caches import AttentionCapture, KeysValuesCache, SharedMemory
from perceiver_core.reads.dense import Dense, KeysValues
from perceiver_core.reads.factored import Factored
from perceiver_core.reads.factored_keys_values import FactoredKeysValues, factor
from perceiver_core.reads.machine import Machine
from perceiver_core.reads.strategy import Cost, Memory, ReadContext, Sizes, Source, Strategy, check_strategy
from perceiver_core.reads.structured import Structured

__all__ = [
    "AttentionCapture",
    "Auto",
    "Cost",
    "Decision",
    "Dense",
    "Factored",
    "FactoredKeysValues",
    "KeysValues",
    "KeysValuesCache",
    "Machine",
    "Memory",
    "ReadContext",
    "SharedMemory",
    "Sizes",
    "Source",
    "Strategy",
    "Structured",
    "check_strategy",
    "factor",
    "merged_axes",
    "set_strategy",
]


def set_strategy(module: nn.Module, strategy: Strategy) -> None:
    """Make all reads in a module use a strategy. It is not saved with the model, whose result it does not change.

    Args:
        module: Module with reads (`CrossAttend`).
        strategy: Strategy, for example `reads.Dense()`.

    Raises:
        TypeError: A strategy that is none.
        ValueError: A module without reads.

    Example:
        >>> encoder = pc.Encoder(10, num_latents=7, dim=32, depth=1, num_heads=4)
        >>> pc.reads.set_strategy(encoder, pc.reads.Dense())
        >>> encoder.reads[0].strategy
        Dense()
    """
    check_strategy(strategy)
    reads = [part for part in module.modules() if hasattr(part, "strategy") and hasattr(part, "read_context")]
    if not reads:
        raise ValueError(
            f"module must have reads (CrossAttend), which have a strategy; {type(module).__name__} has none"
        )
    for read in reads:
        read.strategy = strategy  # type: ignore[assignment]
