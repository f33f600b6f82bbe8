"""Softmax attention as pure functions.

A kernel is any function `(q, k, v, *, mask) -> out` on tensors `b h n d`; one that also takes `dropout`
can drop attention weights. `fastest` is the default and chooses, `sdpa` is PyTorch's, `reference` the truth,
`chunked` the one for inputs too long to be held against all queries at once. Two compute something else: `inverted`,
in which queries compete for keys, and `with_zero_token`, by which they may attend to nothing.
"""

from perceiver_core.attention import masks
from perceiver_core.attention.chunked import Partial, chunked, merge, partial_attention
from perceiver_core.attention.fastest import fastest
from perceiver_core.attention.inverted import inverted
from perceiver_core.attention.reference import attention_map, reference
from perceiver_core.attention.sdpa import sdpa
from perceiver_core.attention.weights import weights_of
from perceiver_core.attention.zero_token import with_zero_token

__all__ = [
    "Partial",
    "attention_map",
    "chunked",
    "fastest",
    "inverted",
    "masks",
    "merge",
    "partial_attention",
    "reference",
    "sdpa",
    "weights_of",
    "with_zero_token",
]
