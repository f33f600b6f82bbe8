"""One read of an image: layer norms, projections and attention; forward, and with its backward pass.

Candidates are a read as it is usually written, by several kernels; a read with absorbed projections, which forms
neither keys nor values; and this library's read by each of its strategies. On a GPU all is in bfloat16, weights too,
and other candidates get what makes them fastest: concatenation, norm, projections and kernel in one graph of
torch.compile, and weights padded with zeros to what the kernel needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import perceiver_core as pc
from benchmarks.comparison import Candidate, Comparison, Row, Setting, Tensors, Work, compare_all, count_flops
from perceiver_core import reads

TITLE = "One read of an image, norms and projections included"
REFUSING = ("PyTorch", "einsum", "absorbed")  # take some widths of a head only, or more memory than available

State: TypeAlias = tuple[pc.CrossAttend, Tensor, pc.Tokens]
Method: TypeAlias = Callable[[pc.CrossAttend, Tensor, pc.Tokens], Tensor]
Kernel: TypeAlias = Callable[..., Tensor]


class Sizes(NamedTuple):
    """Sizes of one read."""

    num_latents: int
    dim: int  # of a latent
    grid: tuple[int, ...]  # of the input: an image, audio
    num_heads: int
    head_dim: int
    num_bands: int = 64
    num_channels: int = 3
    batch: int = 1
    ragged: bool = False  # whether between a quarter and all of a sample's tokens are valid
    dtype: str = "float32"

    def columns(self, **more: str) -> Row:
        """Return the sizes as columns of a table."""
        sizes = {name: value for name, value in self._asdict().items() if value is not False}
        return sizes | {"grid": " x ".join(map(str, self.grid)), **more}


PAPER = Sizes(num_latents=512, dim=1024, grid=(224, 224), num_heads=1, head_dim=261)
ON_CUDA = PAPER._replace(batch=32, dtype="bfloat16")
TINY = Sizes(num_latents=16, dim=32, grid=(19, 23), num_heads=2, head_dim=7, num_bands=6)
TOY = {"cpu": (TINY,), "cuda": (TINY._replace(batch=2, dtype="bfloat16"),)}
FULL = {
    "cpu": (
        PAPER,
        PAPER._replace(dtype="bfloat16"),
        PAPER._replace(num_latents=256, dim=512, head_dim=64),
        PAPER._replace(num_latents=256, dim=512, num_heads=8, head_dim=64),
        PAPER._replace(batch=4),
    ),
    "cuda": (
        ON_CUDA,
        ON_CUDA._replace(head_dim=64),
        ON_CUDA._replace(num_heads=8, head_dim=64),
        ON_CUDA._replace(num_channels=64, head_dim=64),
        *(ON_CUDA._replace(batch=1, num_latents=count) for count in (512, 16, 1)),
    ),
}


def einsum(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Attention as perceiver-pytorch and transformers compute it."""
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    return torch.einsum("bhmn,bhnd->bhmd", scores.softmax(-1), v)


def fused(backend: str, q: Tensor, k: Tensor, v: Tensor, *, mask: Any = None, scale: float | None = None) -> Tensor:
    """Attention by one of PyTorch's kernels, named as in `SDPBackend`, whose members cannot be pickled."""
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def dense(kernel: Kernel, block: pc.CrossAttend, x: Tensor, tokens: pc.Tokens, *, multiple: int = 1) -> Tensor:
    """Read as it is usually written: concatenate, normalize, project, attend; heads are padded to a multiple."""
    attention: Any = block.attention
    heads, normalized = attention.num_heads, block.input_norm(tokens.materialize())
    head_dim = attention.query.out_features // heads
    pairs = ((block.query_norm(x), attention.query), (normalized, attention.key), (normalized, attention.value))
    projected = (F.linear(tensor, *padded(layer, heads, multiple)) for tensor, layer in pairs)
    q, k, v = (rearrange(tensor, "b n (h d) -> b h n d", h=heads) for tensor in projected)
    out = rearrange(kernel(q, k, v, scale=head_dim**-0.5)[..., :head_dim], "b h m d -> b m (h d)")
    return F.linear(out, attention.output.weight, attention.output.bias)


def padded(layer: nn.Linear, num_heads: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a layer with each head padded with zeros to a multiple of some width."""
    weight, bias = (rearrange(p, "(h d) ... -> h d ...", h=num_heads) for p in (layer.weight, layer.bias))
    more = -weight.shape[1] % multiple
    return F.pad(weight, (0, 0, 0, more)).flatten(0, 1), F.pad(bias, (0, more)).flatten()


def absorbed(kernel: Kernel, block: pc.CrossAttend, x: Tensor, tokens: pc.Tokens, *, multiple: int = 1) -> Tensor:
    """Read with absorbed projections: queries times the key projection attend to the normalized tokens themselves.

    The value projection is applied to the result of each query. A key's bias adds the same to all scores of a query,
    which the softmax ignores; the weights of a query sum to 1, so the value's bias is added as it is. Tokens are padded
    with zeros to a multiple of some width.
    """
    attention: Any = block.attention
    heads, normalized = attention.num_heads, block.input_norm(tokens.materialize())
    more = -normalized.shape[-1] % multiple
    normalized = F.pad(normalized, (0, more)).unsqueeze(1)
    weights = (attention.key.weight, attention.value.weight)
    key, value = (F.pad(rearrange(weight, "(h d) c -> h d c", h=heads), (0, more)) for weight in weights)
    q = rearrange(attention.query(block.query_norm(x)), "b m (h d) -> b h m d", h=heads)
    # All heads share the tokens, so the queries of all heads are queries of one.
    absorbing = rearrange(q @ key, "b h m c -> b 1 (h m) c")
    out = kernel(absorbing, normalized, normalized, scale=q.shape[-1] ** -0.5)
    out = rearrange(out, "b 1 (h m) c -> b h m c", h=heads) @ value.mT
    return attention.output(rearrange(out, "b h m d -> b m (h d)") + attention.value.bias)


def library(strategy: reads.Strategy, block: pc.CrossAttend, x: Tensor, tokens: pc.Tokens) -> Tensor:
    """Read of this library by one of its strategies."""
    return block.attention(block.query_norm(x), strategy.prepare(block.read_context(tokens, num_queries=x.shape[1])))


@cache
def _graph(method: Method) -> Callable[..., Tensor]:
    # For torch.compile all methods are one function. Without `fullgraph` it would run eagerly after too many of them.
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # PyTorch 2.6
    setattr(torch._dynamo.config, name, 64)
    return torch.compile(lambda *arguments: method(*arguments), fullgraph=True, dynamic=False)


def compiled(method: Method, *arguments: Any) -> Tensor:
    """Result of a method compiled as one graph for these sizes."""
    return _graph(method)(*arguments)


STRATEGIES: dict[str, Method] = {
    "dense": partial(library, reads.Dense()),
    "factored": partial(library, reads.Factored()),
    "structured": partial(library, reads.Structured()),
    "library": partial(library, reads.Auto()),
}
BACKENDS = {"efficient": "EFFICIENT_ATTENTION", "flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
KERNELS = {name: partial(fused, backend) for name, backend in BACKENDS.items()}
# Ratios refer to the first. On a GPU it is compiled and fused: PyTorch's own choice of a kernel for heads of 261 is the
# formula written out in float32, and a ratio to that says nothing.
METHODS: dict[str, dict[str, Method]] = {
    "cpu": {
        "einsum": partial(dense, einsum),
        "sdpa": partial(dense, F.scaled_dot_product_attention),
        "absorbed": partial(absorbed, einsum),
        **{name: STRATEGIES[name] for name in ("factored", "library")},
    },
    "cuda": {
        **{f"PyTorch {n}, compiled": partial(compiled, partial(dense, k, multiple=8)) for n, k in KERNELS.items()},
        "absorbed, compiled": partial(compiled, partial(absorbed, einsum, multiple=8)),
        "einsum": partial(dense, einsum),
        **STRATEGIES,
        **{f"{name}, compiled": partial(compiled, STRATEGIES[name]) for name in ("dense", "structured")},
    },
}


def run(setting: Setting) -> Iterator[Row]:
    """Compare all methods at all sizes."""
    return compare_all(comparisons(setting.platform, toy=setting.toy), setting)


def comparisons(platform: str, *, toy: bool) -> Iterator[Comparison]:
    """Yield a comparison for each size and direction."""
    for sizes in (TOY if toy else FULL)[platform]:
        for direction in DIRECTIONS:
            yield comparison(sizes, direction, METHODS[platform])


def comparison(sizes: Sizes, direction: str, methods: dict[str, Method]) -> Comparison:
    """Compare some methods at one size."""
    columns, step = sizes.columns(direction=direction), DIRECTIONS[direction]
    candidates = {n: Candidate(partial(step, m), sizes.dtype, n.startswith(REFUSING)) for n, m in methods.items()}
    return Comparison(columns, partial(setup, sizes), candidates, partial(_work, sizes, direction))


def setup(sizes: Sizes, device: str) -> State:
    """Make a cross-attend, latents, and the tokens of images or audio; the first tokens of a sample are valid."""
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    positions = pc.positions.Fourier(num_axes=len(sizes.grid), num_bands=sizes.num_bands, max_resolution=sizes.grid)
    attention = partial(pc.MultiHeadAttention, qk_dim=sizes.num_heads * sizes.head_dim)
    input_dim = sizes.num_channels + positions.dim
    block = pc.CrossAttend(sizes.dim, input_dim, num_heads=sizes.num_heads, attention=attention).to(device, dtype)
    x = torch.randn(sizes.batch, sizes.num_latents, sizes.dim).to(device, dtype).requires_grad_()
    content = torch.randn(sizes.batch, *sizes.grid, sizes.num_channels).to(device, dtype)
    tokens = pc.Tokens(content, positions.tables(sizes.grid, like=content))
    if sizes.ragged:
        lengths = torch.randint(-(-tokens.num_tokens // 4), tokens.num_tokens + 1, (sizes.batch, 1))
        valid = (torch.arange(tokens.num_tokens) < lengths).unflatten(1, sizes.grid)
        tokens = pc.Tokens(content, tokens.position_tables, valid.to(device))
    return block, x, tokens


@torch.no_grad()
def forward(method: Method, state: State) -> Tensors:
    """Return the latents after the read."""
    return (method(*state),)


def backward(method: Method, state: State) -> Tensors:
    """Return the latents after the read, and gradients of half the sum of their squares by latents and weights.

    Two gradients are computed but not returned: that of the keys' bias, which is zero except for rounding; and in
    bfloat16 that of the input's norm, which torch's layer norm on the CPU sums in bfloat16 and so loses up to 97 % of.
    """
    block, x, _ = state
    out = method(*state)
    leaves = {"latents": x, **{name: p for name, p in block.named_parameters() if not name.startswith("mlp")}}
    gradients = torch.autograd.grad(out, list(leaves.values()), out.detach(), materialize_grads=True)
    imprecise = () if out.dtype == torch.float32 else ("input_norm.weight", "input_norm.bias")
    left_out = ("attention.key.bias", *imprecise)
    return out.detach(), *(g for name, g in zip(leaves, gradients, strict=True) if name not in left_out)


DIRECTIONS: dict[str, Callable[..., Tensors]] = {"forward": forward, "with backward": backward}


def _work(sizes: Sizes, direction: str, state: State) -> Work:
    """Count the read as it is usually written; written-out tokens are moved once per pass, latents in and out."""
    _, x, tokens = state
    keys = sizes.batch * tokens.num_tokens
    moved = keys * tokens.dim * x.element_size() + 2 * x.nbytes
    flops = count_flops(DIRECTIONS[direction], partial(dense, einsum), setup(sizes, "meta"))
    exps = sizes.num_heads * sizes.num_latents * keys
    return Work(flops, exps, moved * (1 if direction == "forward" else 2))
