"""Rounding error of a read in float32, for growing inputs: `python -m benchmarks.rounding [--tokens n ...]`.

The error of an output is its difference from the same read in float64, divided by the attention-weighted mean of the
absolute values, to which theory relates it. The largest error of all outputs is printed in units of 2^-24, the unit
roundoff of float32, as a row of the table in docs/concepts/numerics.md for each input and strategy.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run by its path, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from examples.common.command import exit_on_signals

    exit_on_signals()

import torch
from torch import Tensor, nn

import perceiver_core as pc
from examples.common.command import ArgumentParser, run_command
from perceiver_core import kernels, reads

STRATEGIES: dict[str, tuple[reads.Strategy, Callable[..., Tensor]]] = {
    "structured": (reads.Structured(), kernels.fastest),
    "factored": (reads.Factored(), kernels.fastest),
    "dense, `sdpa`": (reads.Dense(), kernels.sdpa),
    "dense, `chunked`": (reads.Dense(), kernels.chunked),
}
UNIT = 2.0**-24
PART = 100_000  # tokens in a part of the read in float64


def grids(num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Return grids with about `num_tokens` tokens: a line, and an image of ratio 2 : 3."""
    height = round((num_tokens / 1.5) ** 0.5)
    return {"line": (num_tokens,), "image": (height, num_tokens // height)}


def setup(grid: tuple[int, ...]) -> tuple[pc.CrossAttend, Tensor, pc.Tokens]:
    """Return a read in float64, its queries, and tokens with the values of pixels."""
    torch.manual_seed(0)
    positions = pc.positions.Fourier(num_axes=len(grid), num_bands=2, max_resolution=64)
    tokens = pc.adapters.Grid(2, positions=positions)(torch.rand(1, *grid, 2))
    attention = partial(pc.MultiHeadAttention, qk_dim=8)
    read = pc.CrossAttend(8, tokens.dim, num_heads=2, attention=attention).double().requires_grad_(False)
    return read, torch.randn(1, 5, 8), tokens


def heads_of(read: pc.CrossAttend, x: Tensor) -> Tensor:
    """Return the queries of all heads."""
    q: Tensor = read.attention.query(read.query_norm(x))
    return q.unflatten(-1, (2, -1)).transpose(1, 2)


def exact(read: pc.CrossAttend, x: Tensor, tokens: pc.Tokens) -> tuple[Tensor, Tensor]:
    """Return the outputs of all heads and the weighted means of the absolute values, computed in float64 by parts."""
    q, parts = heads_of(read, x.double()), []
    first_axis = tokens.content.shape[1]
    step = max(1, PART * first_axis // tokens.num_tokens)
    for start in range(0, first_axis, step):
        end = min(start + step, first_axis)
        tables = [table[start:end] if axis == 0 else table for axis, table in enumerate(tokens.position_tables)]
        part = pc.Tokens(tokens.content[:, start:end].double(), tuple(table.double() for table in tables))
        memory = reads.Source(part, read.input_norm, reads.Dense()).memory(read.attention)
        both = torch.cat([memory.values, memory.values.abs()], dim=-1)
        parts.append(kernels.partial_attention(q, memory.keys, both))
    output, size = kernels.merge(*parts).output.chunk(2, dim=-1)
    return output, size


def error(name: str, read: nn.Module, x: Tensor, tokens: pc.Tokens, expected: tuple[Tensor, Tensor]) -> float:
    """Return the largest relative error of a strategy in float32, in units of 2^-24."""
    strategy, kernel = STRATEGIES[name]
    single = copy.deepcopy(read).float()
    q = heads_of(single, x)
    memory = reads.Source(tokens, single.input_norm, strategy).memory(single.attention)
    output, (correct, size) = memory.attend(q, kernel), expected
    return float(((output.double() - correct) / size).abs().max()) / UNIT


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(prog="python -m benchmarks.rounding", description="Rounding errors of reads.")
    counts = [10**power for power in range(3, 8)]
    parser.add_argument("--tokens", type=int, nargs="+", default=counts, help="numbers of tokens (%(default)s)")
    options = parser.parse_args()
    if min(options.tokens) < 2:
        parser.error("--tokens must be 2 or more")
    print(f"| grid | tokens | {' | '.join(STRATEGIES)} |\n|---|---|{'---|' * len(STRATEGIES)}")
    for num_tokens in options.tokens:
        for name, grid in grids(num_tokens).items():
            read, x, tokens = setup(grid)
            expected = exact(read, x, tokens)
            errors = [error(strategy, read, x, tokens, expected) for strategy in STRATEGIES]
            print(f"| {name} | {tokens.num_tokens:,} | {' | '.join(f'{e:.1f}' for e in errors)} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
