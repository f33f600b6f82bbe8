"""On a GPU: attention to given queries, keys and values, by this library and by each fused kernel of PyTorch's.

Self-attends of a latent transformer, and reads of many tokens by a few hundred latents; without a mask, and with the
padding of inputs that differ in length. All in bfloat16. Tensors lie in memory as projections leave them: heads last
but for their width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import flops, plots
from benchmarks.contest import Candidate, Contest, Results, Row, Setting, Tensors, Work, compete_all
from perceiver_core import masks
from perceiver_core.kernels import fastest, sdpa

# By the names of `SDPBackend`, which itself cannot be pickled.
BACKENDS = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


class Attend(NamedTuple):
    """The sizes of one attention."""

    batch: int
    queries: int
    keys: int
    heads: int
    width: int  # of a head
    ragged: bool = False  # whether samples have from a quarter of the keys to all of them
    dtype: str = "bfloat16"


TOY = (
    Attend(batch=3, queries=11, keys=11, heads=2, width=8),
    Attend(batch=3, queries=5, keys=37, heads=2, width=16, ragged=True),
)
FULL = (
    Attend(batch=64, queries=512, keys=512, heads=16, width=64),
    Attend(batch=64, queries=512, keys=512, heads=8, width=128),
    Attend(batch=16, queries=2048, keys=2048, heads=16, width=64),
    Attend(batch=16, queries=2048, keys=2048, heads=8, width=128),
    Attend(batch=8, queries=512, keys=50_176, heads=8, width=64),
    Attend(batch=8, queries=512, keys=50_176, heads=8, width=128),
    Attend(batch=16, queries=2048, keys=2048, heads=16, width=64, ragged=True),
    Attend(batch=16, queries=2048, keys=2048, heads=8, width=128, ragged=True),
    Attend(batch=32, queries=512, keys=8192, heads=8, width=64, ragged=True),
    Attend(batch=32, queries=512, keys=8192, heads=8, width=128, ragged=True),
)


class State(NamedTuple):
    """What attends to what, and which keys are there; all of them without a mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    there: Tensor | None


def by_pytorch(backend: str, given: State) -> Tensor:
    """PyTorch's attention by one of its kernels; padding is a mask `b 1 1 k`."""
    mask = None if given.there is None else given.there[:, None, None, :]
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(given.q, given.k, given.v, attn_mask=mask)


def by_library(kernel: Callable[..., Tensor], given: State) -> Tensor:
    """One of this library's kernels; padding is a rule."""
    mask = None if given.there is None else masks.Padding(given.there)
    return kernel(given.q, given.k, given.v, mask=mask)


Way = Callable[[State], Tensor]
# The first is the formula as PyTorch writes it out, in float32 between the products.
WAYS: dict[str, Way] = {
    "PyTorch unfused": partial(by_pytorch, "MATH"),
    "fastest": partial(by_library, fastest),
    "sdpa": partial(by_library, sdpa),
    **{f"PyTorch {name}": partial(by_pytorch, backend) for name, backend in BACKENDS.items()},
}
REFUSING = [name for name in WAYS if name.startswith("PyTorch")]


def run(setting: Setting) -> Results:
    """Every way at every size."""
    return Results(compete_all(contests(toy=setting.toy), setting), [])


def plot(rows: list[Row], path: Path) -> None:
    """Times and memory as bars."""
    plots.bars(rows, path, title="Attention on a GPU, bfloat16")


def contests(*, toy: bool) -> Iterator[Contest]:
    """One a size and direction."""
    for sizes in TOY if toy else FULL:
        for direction, step in DIRECTIONS.items():
            yield Contest(
                sizes={**sizes._asdict(), "direction": direction},
                setup=partial(tensors, sizes),
                candidates={
                    name: Candidate(partial(step, way), sizes.dtype, may_refuse=name in REFUSING)
                    for name, way in WAYS.items()
                },
                work=partial(_work, flops.BACKWARD if direction == "with backward" else 1),
            )


def tensors(sizes: Attend, device: str) -> State:
    """Queries, keys and values, and which keys are there: the first ones of each sample."""
    torch.manual_seed(0)
    dtype: Any = getattr(torch, sizes.dtype)
    lengths = (sizes.queries, sizes.keys, sizes.keys)
    q, k, v = (_made(sizes.batch, n, sizes.heads, sizes.width, device, dtype) for n in lengths)
    there = None
    if sizes.ragged:
        least = -(-sizes.keys // 4)
        counts = torch.randint(least, sizes.keys + 1, (sizes.batch, 1))
        there = (torch.arange(sizes.keys) < counts).to(device)
    return State(q, k, v, there)


@torch.no_grad()
def forward(way: Way, given: State) -> Tensors:
    """What is read."""
    return (way(given),)


def backward(way: Way, given: State) -> Tensors:
    """What is read, and the gradients of half the sum of its squares by queries, keys and values."""
    out = way(given)
    return out.detach(), *torch.autograd.grad(out, given[:3], out.detach())


DIRECTIONS: dict[str, Callable[..., Tensors]] = {"forward": forward, "with backward": backward}


def _made(batch: int, n: int, heads: int, width: int, device: str, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(batch, n, heads, width, device=device, dtype=dtype)
    return drawn.transpose(1, 2).requires_grad_()


def _work(passes: int, given: State) -> Work:
    """Of the keys that are there. All tensors are touched once forward, these and their gradients with backward."""
    batch, heads, queries, width = given.q.shape
    keys = batch * given.k.shape[2] if given.there is None else int(given.there.sum())
    scores = heads * queries * keys
    moved = 2 * given.q.nbytes + 2 * heads * keys * width * given.k.element_size()
    return Work(flops=4 * scores * width * passes, exps=scores, moved=moved * (1 if passes == 1 else 2))
