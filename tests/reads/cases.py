"""Reads, inputs and models that tests of strategies share."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import perceiver_core as pc
from perceiver_core import CrossAttend, Encoder, MultiHeadAttention, Tokens, positions
from perceiver_core.reads import AttentionCapture, Auto, Dense, Factored, Machine, SharedMemory, Structured

ALL = (Structured(), Factored(), Dense())
OTHERS = {  # than Dense, with which they are compared
    "factored": Factored(),
    "structured": Structured(),
    "auto": Auto(),
    "auto, structured is cheap": Auto(machine=Machine(start=0.0, pair=1e-9, channel=0.0)),
}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
GRIDS = {"line": (23,), "image": (5, 13), "video": (3, 7, 5), "pixel": (1, 1), "row": (1, 17), "column": (17, 1)}
NORMS = {
    "layer": nn.LayerNorm,
    "plain": partial(nn.LayerNorm, elementwise_affine=False),
    "unbiased": partial(nn.LayerNorm, bias=False),
    "rms": nn.RMSNorm,
    "none": nn.Identity,
}


def tokens_of(grid, channels=3, *, batch=2, masked=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(batch, *grid, channels, dtype=torch.float64, generator=generator)
    fourier = positions.Fourier(num_axes=len(grid), num_bands=2, max_resolution=11)
    mask = torch.rand(batch, *grid, generator=generator) < 0.7 if masked else None
    return Tokens(content, fourier.tables(grid, like=content), mask)


def read_of(tokens, *, strategy=Dense(), heads=2, norm=nn.LayerNorm, **options):  # noqa: B008 (a constant)
    torch.manual_seed(0)
    attention = partial(MultiHeadAttention, **{"qk_dim": 14, "v_dim": 22, **options})
    read = CrossAttend(19, tokens.dim, num_heads=heads, norm=norm, attention=attention, strategy=strategy).double()
    with torch.no_grad():
        for weight in read.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return read


def queries(batch=2, m=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, m, 19, dtype=torch.float64, generator=generator).requires_grad_()


def outcome(read, x, tokens, **options):
    """Returns the output, and the gradients of queries, content and every weight."""
    content = tokens.content.detach().clone().requires_grad_()
    out = read(x, Tokens(content, tokens.position_tables, tokens.mask), **options)
    weights = dict(read.named_parameters())
    gradients = torch.autograd.grad(out.square().sum(), [x, content, *weights.values()])
    return out.detach(), dict(zip(["x", "content", *weights], gradients, strict=True))


def attention_map(read, x, tokens, *, queries=None):
    capture = AttentionCapture(queries=queries)
    read(x, tokens, capture=capture)
    return capture.result()


def memory_of(read, x, tokens, *, num_queries=None):
    """Returns the memory that a read makes of tokens."""
    cache = SharedMemory(num_queries)
    read(x, tokens, cache=cache)
    return cache.memory


def model_of(strategy=None, share=True, *, num_reads=3):
    torch.manual_seed(0)
    image = pc.adapters.Image(num_channels=3, positions=positions.Fourier(num_axes=2, num_bands=3, max_resolution=19))
    read = partial(CrossAttend, **({} if strategy is None else {"strategy": strategy}))
    encoder = Encoder(
        image.dim, num_latents=11, dim=14, num_reads=num_reads, depth=1, num_heads=2, share=share, cross_attention=read
    )
    return pc.Perceiver(image, encoder, pc.heads.Classification(14, 5)).double()


def images():
    return torch.rand(2, 3, 19, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
