"""Attention kernels as pure functions.

A kernel is a function `(q, k, v, *, mask) -> out` on tensors of shape `b h n d`. A kernel that supports attention
dropout also has a `dropout` argument. Three kernels compute softmax attention: `sdpa` (PyTorch's own kernels),
`chunked` (does not store all attention weights) and `reference` (the plain formula). `fastest`, the default, selects
`sdpa` or `chunked`. Two kernels compute variants of softmax attention. In `inverted`, queries compete for keys.
`add_zero_attn` adds a key of zeros, so that queries can attend to nothing.
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
