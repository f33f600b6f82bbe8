"""Strategies for computing reads. A read is cross-attention from queries, such as latents, to an input.

All strategies give the same result, but differ in time and memory:

    Dense        materializes, normalizes and projects tokens to keys and values, then calls an attention kernel
    Factored     computes keys and values from the content and one table per grid axis, then calls an attention kernel
    Structured   computes scores and outputs from content and tables, without keys and values; see `kernels.grid`

A strategy turns a `ReadContext` (attention module, norm, input) into a `Memory`, and `memory.attend(q, kernel)` returns
the attention output. `Auto`, the default, selects the strategy with the lowest predicted cost. To force a strategy,
pass it in place of `Auto`. To exclude one, leave it out of `Auto(strategies)`. `explain_reads` reports the strategy of
every read in a model.
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
    """Set the strategy of all reads in a module. A strategy does not change results and is not saved with the model.

    Args:
        module: Module that contains reads (`CrossAttend`).
        strategy: Strategy such as `reads.Dense()`.

    Raises:
        TypeError: If `strategy` is not an instance of a strategy.
        ValueError: If the module contains no reads.

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
