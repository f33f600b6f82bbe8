"""Softmax attention as pure functions.

A kernel is any function `(q, k, v, *, mask) -> out` on tensors `b h n d`; one that also takes `dropout`
can drop attention weights. `fastest` is the default and chooses, `sdpa` is PyTorch's, `reference` the truth,
`chunked` the one for inputs too long to be held against all queries at once. Two compute something else: `inverted`,
in which queries compete for keys, and `add_zero_attn`, by which they may attend to nothing.
"""

from perceiver_core import masks
from perceiver_core.kernels.chunked import PartialAttention, chunked, merge, partial_attention
from perceiver_core.kernels.fastest import fastest
from perceiver_core.kernels.inverted import inverted
from perceiver_core.kernels.reference import attention_map, reference
from perceiver_core.kernels.sdpa import sdpa
from perceiver_core.kernels.attention_weights import weights_of
from perceiver_core.kernels.zero_attention import add_zero_attn

__all__ = [
    "PartialAttention",
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
    "add_zero_attn",
]
