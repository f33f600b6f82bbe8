"""Computations whose results are compared bit by bit: kernels, reads, adapters, and whole models with gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import perceiver_core as pc
from perceiver_core import kernels, reads
from perceiver_core.kernels.grid import eager, read_grid
from perceiver_core.kernels.grid.interface import GridInputs

Computation = Callable[[], list[Tensor]]


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def kernel(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (1, 4, 65, 32), (1, 4, 1999, 32), (1, 4, 1999, 32)
    return with_gradients(function, *(torch.randn(shape).to(dtype) for shape in shapes))


def structured(grid: tuple[int, ...], num_queries: int = 37) -> list[Tensor]:
    inputs = torch.randn(1, 2, num_queries, 3), torch.randn(1, 2, num_queries, sum(grid)), torch.randn(2, 3, *grid)
    leaves = [x.requires_grad_() for x in (*inputs, torch.rand(2, *grid) + 0.5)]
    outputs = read_grid(*leaves)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)]


def eager_grid() -> list[Tensor]:
    queries = torch.randn(1, 2, 37, 3), torch.randn(1, 2, 37, 61 + 53)
    return list(eager.forward(GridInputs(*queries, torch.randn(2, 3, 61, 53), torch.rand(2, 61, 53) + 0.5, None)))


def image_model(strategy: reads.Strategy | None = None, dropout: float = 0.0) -> pc.Perceiver:
    image = pc.adapters.Image(3, positions=pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=32))
    options = {} if strategy is None else {"strategy": strategy}
    block = partial(pc.CrossAttend, dropout=dropout, **options)
    encoder = pc.Encoder(image.dim, num_latents=32, dim=32, num_reads=2, depth=1, num_heads=4, cross_attention=block)
    return pc.Perceiver(image, encoder, pc.heads.Classification(32, num_classes=10))


def model(strategy: reads.Strategy) -> list[Tensor]:
    perceiver, images = image_model(strategy), torch.rand(2, 3, 24, 32)
    loss = pc.losses.cross_entropy(perceiver(images), torch.tensor([3, 7]))
    return [loss.detach(), *torch.autograd.grad(loss, list(perceiver.parameters()))]


def training() -> list[Tensor]:
    """Return trained weights, except biases of keys: their gradients are rounding errors, which Adam amplifies."""
    perceiver, images = image_model(dropout=0.1), torch.rand(4, 3, 12, 16)
    optimizer = torch.optim.AdamW(perceiver.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        pc.losses.cross_entropy(perceiver(images), torch.tensor([3, 7, 1, 0])).backward()
        optimizer.step()
    return [weight.detach() for name, weight in perceiver.named_parameters() if not name.endswith("key.bias")]


def generation() -> list[Tensor]:
    embedding = pc.adapters.TokenEmbedding(97, 32, positions=pc.positions.LearnedEmbedding(64, 32))
    ar = pc.PerceiverAR(embedding, num_latents=16, depth=1, num_heads=4).eval()
    prompt = torch.randint(97, (3, 9))
    return [pc.generate(ar, prompt, max_new_tokens=5, sampler=pc.models.sampling.Sample(temperature=0.9))]


def draws() -> list[Tensor]:
    drop = pc.adapters.DropTokens(pc.adapters.Grid(3, positions=None), rate=0.5).train()
    latents = pc.DropLatents(0.5).train()
    noise = nn.init.trunc_normal_(torch.empty(300, 1000)), nn.Dropout(0.3)(torch.ones(300_000))
    return [drop(torch.randn(4, 3233, 3)).content, latents(torch.randn(4, 999, 32)), *noise]


def log_mel() -> list[Tensor]:
    return [pc.adapters.LogMel(16_000, positions=None)(torch.randn(3, 48_000)).content]


# Results that do not depend on the number of threads, by design of this library or as measured of PyTorch.
EQUAL: dict[str, Computation] = {
    "structured read of an image": partial(structured, (61, 53)),
    "structured read of a line": partial(structured, (9973,)),
    "structured read of a video by few queries": partial(structured, (7, 31, 23), 5),
    "random draws": draws,
}
# Results in which the order of PyTorch's sums may depend on the number of threads.
ROUNDING: dict[str, Computation] = {
    **{f.__name__: partial(kernel, f) for f in (kernels.reference, kernels.sdpa, kernels.chunked)},
    "sdpa in bfloat16": partial(kernel, kernels.sdpa, torch.bfloat16),
    "structured read in plain PyTorch": eager_grid,
    "model with dense reads": partial(model, reads.Dense()),
    "model with factored reads": partial(model, reads.Factored()),
    "model with structured reads": partial(model, reads.Structured()),
    "training": training,
    "spectrogram": log_mel,
}
CASES = {**EQUAL, **ROUNDING, "generation": generation}
