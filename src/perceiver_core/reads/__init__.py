"""Strategies for computing reads. A read is cross-attention from queries, such as latents, to an input.

A token is the concatenation of its content (such as pixel values) and its position features. `Tokens` stores position
features as a few small tables that broadcast over the grid. All strategies compute the same result, but differ in time
and memory:

    Dense        computes keys and values from concatenated tokens, then calls an attention kernel
    Factored     computes keys and values from the content and one position table per grid axis, then calls a kernel
    Structured   computes attention from the content and the position tables, without computing keys and values

A strategy turns a `ReadContext` (attention module, norm, input) into a `Memory`, which holds the keys and values. Then
`memory.attend(q, kernel)` returns the attention output. `Auto`, the default, selects the strategy with the lowest
predicted cost. To use a specific strategy, pass it to the read (`strategy=reads.Dense()`) or call `set_strategy`. To
exclude a strategy, leave it out of the list passed to `Auto`. `explain_reads` reports the strategy of every read in a
model.
"""

from torch import nn

from perceiver_core.argument_errors import checked
from perceiver_core.reads.automatic import Auto, Decision, check_strategy
from perceiver_core.reads.axes import merged_axes
from perceiver_core.reads.caches import AttentionCapture, KeysValuesCache, SharedMemory
from perceiver_core.reads.dense import Dense, KeysValues
from perceiver_core.reads.factored import Factored
from perceiver_core.reads.factored_keys_values import FactoredKeysValues, factor
from perceiver_core.reads.machine import Cost, Machine
from perceiver_core.reads.strategy import Memory, ReadContext, Sizes, Source, Strategy
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


@checked
def set_strategy(module: nn.Module, strategy: Strategy) -> None:
    """Set the strategy of all reads in a module. A strategy affects time and memory, but not the result.

    Args:
        module: Module that contains reads (`CrossAttend`).
        strategy: Strategy such as `reads.Dense()`.

    Raises:
        TypeError: If `strategy` is not an instance of a strategy class.
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
