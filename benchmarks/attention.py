"""Attention alone: queries attend to tokens by each kernel on their keys and values, and by a structured read.

Kernels receive keys and values, laid out in memory as projections produce them. The structured read receives the
content, positions and weights from which these were made; the benchmark `read` includes the cost of making them. On a
GPU there are also self-attention, and padding of samples that differ in length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

import perceiver_core as pc
from benchmarks import read
from benchmarks.comparison import Candidate, Comparison, Row, Setting, Tensors, Work, compare_all
from benchmarks.read import Sizes
from perceiver_core import masks, reads
from perceiver_core.kernels import chunked, fastest, reference, sdpa

TITLE = "Attention: kernels on queries, keys and values, and a structured read"


def _sizes(num_queries: int, grid: tuple[int, ...], num_heads: int, head_dim: int, **more: Any) -> Sizes:
    return Sizes(num_queries, num_heads * head_dim, grid, num_heads, head_dim, **more)


TOY = {
    "cpu": (_sizes(16, (13, 17), 2, 8, num_bands=4),),
    "cuda": (
        _sizes(11, (11,), 2, 8, num_bands=4, batch=3, dtype="bfloat16"),
        _sizes(5, (37,), 2, 16, num_bands=4, batch=3, ragged=True, dtype="bfloat16"),
    ),
}
FULL = {
    "cpu": (
        _sizes(256, (64, 64), 8, 64),
        _sizes(256, (128, 128), 8, 64),
        _sizes(512, (224, 224), 1, 64),
        _sizes(512, (224, 224), 1, 261),
        _sizes(256, (128, 128), 8, 64, dtype="bfloat16"),
        _sizes(512, (224, 224), 1, 261, dtype="bfloat16"),
    ),
    "cuda": tuple(
        _sizes(num_queries, grid, dim // head_dim, head_dim, batch=batch, ragged=ragged, dtype="bfloat16")
        for num_queries, grid, dim, batch, ragged in (
            (512, (512,), 1024, 64, False),
            (512, (224, 224), 512, 8, False),
            (2048, (2048,), 1024, 16, False),
            (2048, (2048,), 1024, 16, True),
            (512, (8192,), 512, 32, True),
        )
        for head_dim in (64, 128)
    ),
}


class State(NamedTuple):
    """Queries, and the tokens that they attend to in two forms."""

    x: Tensor  # b m (h d)
    k: Tensor
    v: Tensor
    valid: Tensor | None  # b n; None if all are
    block: Any  # a CrossAttend that projects neither queries nor outputs
    tokens: pc.Tokens


Method = Callable[[State], tuple[Tensor, Tensors]]  # to outputs `b m (h d)` and the tensors that they depend on


def by_kernel(kernel: Callable[..., Tensor], state: State, *, rule: bool = True) -> tuple[Tensor, Tensors]:
    """Attention by a kernel, with padding as a rule of this library or as a tensor `b 1 1 k`."""
    mask = None if state.valid is None else masks.Padding(state.valid) if rule else state.valid[:, None, None]
    q = rearrange(state.x, "b m (h d) -> b h m d", h=state.k.shape[1])
    return rearrange(kernel(q, state.k, state.v, mask=mask), "b h m d -> b m (h d)"), state[:3]


def structured(state: State) -> tuple[Tensor, Tensors]:
    """Attention to content and positions, without keys and values."""
    attention = state.block.attention
    context = state.block.read_context(state.tokens, num_queries=state.x.shape[1])
    leaves = (state.x, state.tokens.content, attention.key.weight, attention.value.weight)
    return attention(state.x, reads.Structured().prepare(context)), leaves


LIBRARY: dict[str, Method] = {each.__name__: partial(by_kernel, each) for each in (reference, sdpa, chunked, fastest)}
PYTORCH: dict[str, Method] = {
    f"PyTorch {name}": partial(by_kernel, kernel, rule=False)
    for name, kernel in {**read.KERNELS, "unfused": partial(read.fused, "MATH")}.items()
}
# Ratios refer to the first. On a GPU that is not the unfused formula, which PyTorch computes in float32.
METHODS: dict[str, dict[str, Method]] = {
    "cpu": {**LIBRARY, "PyTorch unfused": PYTORCH["PyTorch unfused"], "structured": structured},
    "cuda": {**PYTORCH, "fastest": LIBRARY["fastest"], "sdpa": LIBRARY["sdpa"], "structured": structured},
}


def run(setting: Setting) -> Iterator[Row]:
    """Compare all methods at all sizes."""
    return compare_all(comparisons(setting.platform, toy=setting.toy), setting)


def comparisons(platform: str, *, toy: bool) -> Iterator[Comparison]:
    """Yield a comparison for each size and direction; structured reads take part on grids of several axes."""
    for sizes in (TOY if toy else FULL)[platform]:
        methods = {name: m for name, m in METHODS[platform].items() if len(sizes.grid) > 1 or m is not structured}
        for direction, step in DIRECTIONS.items():
            columns, work = sizes.columns(direction=direction), partial(_work, 1 if direction == "forward" else 3)
            candidates = {
                n: Candidate(partial(step, m), sizes.dtype, n.startswith("PyTorch")) for n, m in methods.items()
            }
            yield Comparison(columns, partial(setup, sizes), candidates, work)


def setup(sizes: Sizes, device: str) -> State:
    """Make queries, tokens, keys and values."""
    block, x, tokens = read.setup(sizes, device)
    block.attention.query, block.attention.output = nn.Identity(), nn.Identity()
    with torch.no_grad():
        k, v, _ = reads.Dense().prepare(block.read_context(tokens))
    tokens.content.requires_grad_()
    return State(x, k.requires_grad_(), v.requires_grad_(), tokens.flat_mask(), block, tokens)


@torch.no_grad()
def forward(method: Method, state: State) -> Tensors:
    """Return the outputs."""
    return (method(state)[0],)


def backward(method: Method, state: State) -> Tensors:
    """Return the outputs and the gradient of half the sum of their squares by the queries; compute the others too."""
    out, leaves = method(state)
    return out.detach(), torch.autograd.grad(out, leaves, out.detach())[0]


DIRECTIONS: dict[str, Callable[..., Tensors]] = {"forward": forward, "with backward": backward}


def _work(passes: int, state: State) -> Work:
    """Count valid keys only. Tensors are moved once in the forward pass, they and their gradients with backward."""
    batch, heads, keys, head_dim = state.k.shape
    keys = batch * keys if state.valid is None else int(state.valid.sum())
    scores = heads * state.x.shape[1] * keys
    moved = 2 * state.x.nbytes + 2 * heads * keys * head_dim * state.k.element_size()
    return Work(4 * scores * head_dim * passes, scores, moved * min(passes, 2))
