"""One read of a picture: layer norms, projections, attention; forward and with its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

import perceiver_core as pc
from benchmarks import flops, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete_all
from perceiver_core import reads

State: TypeAlias = tuple[pc.CrossAttend, Tensor, pc.Tokens]


class Read(NamedTuple):
    """The sizes of one read."""

    latents: int
    dim: int  # of a latent
    grid: tuple[int, ...]  # of the input: a picture, a sound
    bands: int
    heads: int
    head: int  # the width of one
    channels: int = 3
    batch: int = 1
    dtype: str = "float32"


PAPER = Read(latents=512, dim=1024, grid=(224, 224), bands=64, heads=1, head=261)
TOY = (Read(latents=16, dim=32, grid=(19, 23), bands=6, heads=2, head=8),)
FULL = (
    PAPER,
    PAPER._replace(dtype="bfloat16"),
    PAPER._replace(batch=4),
    PAPER._replace(latents=256, dim=512, head=64),
    PAPER._replace(latents=256, dim=512, heads=8, head=64),
)


def written_out(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], read: pc.CrossAttend, x: Tensor, tokens: pc.Tokens
) -> Tensor:
    """A read as it is mostly written, by PyTorch's own layers: concatenate, normalize, project, attend."""
    attention: Any = read.attention
    asks, inputs = read.query_norm(x), read.input_norm(tokens.materialize())
    pairs = ((asks, attention.query), (inputs, attention.key), (inputs, attention.value))
    made = (F.linear(tensor, layer.weight, layer.bias) for tensor, layer in pairs)
    q, k, v = (rearrange(tensor, "b n (h d) -> b h n d", h=attention.num_heads) for tensor in made)
    got = rearrange(attend(q, k, v), "b h m d -> b m (h d)")
    return F.linear(got, attention.output.weight, attention.output.bias)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as perceiver-pytorch and transformers compute it."""
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhmn,bhnd->bhmd", scores.softmax(-1), v)


def library(path: reads.Strategy, read: pc.CrossAttend, x: Tensor, tokens: pc.Tokens) -> Tensor:
    """A read by this library."""
    read.strategy = path
    out: Tensor = read.attention(read.query_norm(x), read.keys_values(tokens, queries=x.shape[1]))
    return out


# Each is a function of the read, the latents and the tokens.
READS: dict[str, Callable[[pc.CrossAttend, Tensor, pc.Tokens], Tensor]] = {
    "einsum": partial(written_out, einsum),
    "sdpa": partial(written_out, F.scaled_dot_product_attention),
    "factored": partial(library, reads.Factored()),
    "library": partial(library, reads.Auto()),
}


def run(setting: Setting) -> Results:
    """Every way to read, at every size."""
    return Results(compete_all(contests(toy=setting.toy), setting), [])


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="One read of a picture, norms and projections included")


def contests(*, toy: bool) -> Iterator[Contest]:
    """One a size and direction."""
    for read in TOY if toy else FULL:
        for direction in DIRECTIONS:
            yield contest(read, direction, READS)


def contest(
    read: Read, direction: str, ways: dict[str, Callable[[pc.CrossAttend, Tensor, pc.Tokens], Tensor]]
) -> Contest:
    """Some ways to read, against each other."""
    return Contest(
        sizes={**read._asdict(), "grid": " x ".join(map(str, read.grid)), "direction": direction},
        setup=partial(state, read),
        candidates={name: Candidate(partial(DIRECTIONS[direction], way), read.dtype) for name, way in ways.items()},
        work=partial(_work, flops.BACKWARD if direction == "with backward" else 1),
    )


def state(read: Read, device: str) -> State:
    """A cross-attend, latents, and the tokens of pictures or sounds."""
    torch.manual_seed(0)
    dtype = getattr(torch, read.dtype)
    where = pc.positions.Fourier(num_axes=len(read.grid), num_bands=read.bands, max_resolution=read.grid)
    adapter = pc.adapters.Grid(read.channels, positions=where)
    attention = partial(pc.MultiHeadAttention, qk_dim=read.heads * read.head)
    block = pc.CrossAttend(read.dim, adapter.dim, num_heads=read.heads, attention=attention).to(device, dtype)
    latents = torch.randn(read.batch, read.latents, read.dim).to(device, dtype).requires_grad_()
    return block, latents, adapter(torch.randn(read.batch, *read.grid, read.channels).to(device, dtype))


@torch.no_grad()
def forward(way: Callable[..., Tensor], given: State) -> Tensors:
    """The latents after the read."""
    return (way(*given),)


def backward(way: Callable[..., Tensor], given: State) -> Tensors:
    """The latents after the read, and the gradients of half the sum of their squares by latents and weights.

    Computed but not given, as there is nothing to compare: that of the keys' bias, which is zero but for rounding; and
    in bfloat16 those of the norm of the input, which on the CPU torch's layer norm adds up over all tokens in bfloat16,
    so that for a whole picture it loses up to 97 % of them.
    """
    read, latents, _ = given
    out = way(*given)
    weights = {name: weight for name, weight in read.named_parameters() if not name.startswith("mlp")}
    wanted = {"latents": latents, **weights}
    gradients = torch.autograd.grad(out, list(wanted.values()), out.detach())
    exact = out.dtype == torch.float32
    pairs = zip(wanted, gradients, strict=True)
    loose = ("attention.key.bias", *(() if exact else ("input_norm.weight", "input_norm.bias")))
    kept = [gradient for name, gradient in pairs if name not in loose]
    return (out.detach(), *kept)


DIRECTIONS: dict[str, Callable[..., Tensors]] = {"forward": forward, "with backward": backward}


def _work(passes: int, given: State) -> Work:
    """Tokens, written out, are touched once in each pass, latents going in and coming out twice."""
    read, latents, tokens = given
    attention: Any = read.attention
    batch, m, _ = latents.shape
    touched = batch * tokens.num_tokens * tokens.dim * latents.element_size() + 2 * latents.nbytes
    return Work(
        flops=passes * batch * flops.attention(read, latents=m, tokens=tokens.num_tokens),
        exps=batch * attention.num_heads * m * tokens.num_tokens,
        moved=touched * (1 if passes == 1 else 2),
    )
