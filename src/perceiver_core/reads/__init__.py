"""Strategies of reading tokens. All give the same result; they differ in time and memory."""

from perceiver_core.reads.costs import Cost, Machine, Request, Sizes
from perceiver_core.reads.factored import FactoredKeysValues
from perceiver_core.reads.keys_values import KeysValues
from perceiver_core.reads.paths import (
    Auto,
    Dense,
    Factored,
    Strategy,
    Structured,
    check_strategy,
    kernel_of,
    reads_of,
    set_strategy,
)

__all__ = [
    "Auto",
    "Cost",
    "Dense",
    "Factored",
    "FactoredKeysValues",
    "KeysValues",
    "Machine",
    "Request",
    "Sizes",
    "Strategy",
    "Structured",
    "check_strategy",
    "kernel_of",
    "reads_of",
    "set_strategy",
]
