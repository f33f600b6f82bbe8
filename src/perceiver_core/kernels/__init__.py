"""Attention kernels as pure functions.

A kernel is a function `(q, k, v, *, mask) -> out` on tensors `b h n d`. A kernel with a `dropout` argument supports
attention dropout. `fastest`, the default, selects between `sdpa` (PyTorch's own kernels) and `chunked`, which does not
store all attention weights. `reference` is the plain formula. Two kernels compute variants of softmax attention: in
`inverted`, queries compete for keys, and `add_zero_attn` lets queries attend to nothing.
"""

from perceiver_core.kernels.attention_weights import kernel_attention_map
from perceiver_core.kernels.chunked import PartialAttention, chunked, merge, partial_attention
from perceiver_core.kernels.fastest import fastest
from perceiver_core.kernels.inverted import inverted
from perceiver_core.kernels.reference import attention_map, reference
from perceiver_core.kernels.sdpa import sdpa
from perceiver_core.kernels.zero_attention import add_zero_attn

__all__ = [
    "PartialAttention",
    "add_zero_attn",
    "attention_map",
    "chunked",
    "fastest",
    "inverted",
    "kernel_attention_map",
    "merge",
    "partial_attention",
    "reference",
    "sdpa",
]
