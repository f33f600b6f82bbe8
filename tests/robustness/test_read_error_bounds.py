"""Rounding errors of structured reads, in all backends, and of all read strategies are within first-order bounds.

A structured read is softmax attention whose keys and values are both `scale * [content, indicators of the positions]`,
so the bounds of `rounding` apply to it. The bounds of a whole read follow from sums of absolute values: of the tokens
before the norm subtracts their mean, and of the projections.
"""

from __future__ import annotations

import copy
import math
import shutil
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perceiver_core as pc
from perceiver_core import reads
from perceiver_core.kernels.grid import cpp_library, eager, read_grid
from tests.kernels.grid.backends import use_backend
from tests.kernels.grid.cases import formula, normal, outputs_and_gradients, random_mask
from tests.robustness.rounding import CONSTANT, LANES, Path, Terms, bounds, unit, weights_and_errors
from tests.robustness.test_error_bounds import TIGHT

pytestmark = pytest.mark.no_shape_checks  # shapes are checked by the tests of each part

TRITON = pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.interpreted(dtype=[torch.float32])])
SINGLE = Path(*[torch.float32] * 4)
BACKENDS = ("cpp", "eager", TRITON)
CASES = ((0.01, False), (30.0, True), (1000.0, False))  # magnitude of the queries, and whether tokens are masked
GRIDS = {"triton": ((2, 5),)}  # interpreted, which is slow
NAMES = ("content", "marginals", "lse", "d content_queries", "d axis_queries", "d content", "d scale")


def triton_problem() -> str:
    """Return why Triton cannot be tested, or an empty string if it can."""
    pytest.importorskip("triton")
    from tests.kernels.grid.triton_probe import why_triton_fails

    return why_triton_fails()


def grid_inputs(grid: tuple[int, ...], magnitude: float, dtype: torch.dtype) -> list[Tensor]:
    channels, queries = 3, (1, 2, 5)
    drawn = [
        normal(*queries, channels) * magnitude,
        normal(*queries, sum(grid), seed=1) * magnitude,
        normal(2, channels, *grid, seed=2),
        normal(2, *grid, seed=3).abs() + 0.3,
    ]
    return [x.to(dtype) for x in drawn]


def as_attention(inputs: list[Tensor]) -> Terms:
    """Return queries, keys and values of attention that equals a structured read, in float64."""
    content_queries, axis_queries, content, scale = (x.double() for x in inputs)
    batch, grid = content.shape[0], content.shape[2:]
    indices = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    indicators = torch.cat([F.one_hot(index, size) for index, size in zip(indices, grid, strict=True)], -1).double()
    tokens = torch.cat([content.movedim(1, -1), indicators.expand(batch, *indicators.shape)], -1)
    keys = (scale[..., None] * tokens).flatten(1, -2)[:, None].expand(-1, content_queries.shape[1], -1, -1)
    q = torch.cat([content_queries, axis_queries], -1).expand(batch, -1, -1, -1)
    return Terms(q * q.shape[-1] ** 0.5, keys, keys)


def grid_limits(inputs: list[Tensor], path: Path, mask: Tensor | None) -> list[Tensor]:
    """Return the bounds of all outputs and gradients of `outputs_and_gradients`."""
    attention, channels = as_attention(inputs), inputs[0].shape[-1]
    allowed = None if mask is None else mask.flatten(1)[:, None, None]
    shape = (*attention.q.shape[:3], channels), (*attention.q.shape[:3], inputs[1].shape[-1]), attention.q.shape[:3]
    upstream = [normal(*sizes, seed=11 + i) for i, sizes in enumerate(shape)]
    depth = channels + inputs[2].ndim - 2
    of_lse = weights_and_errors(attention, path, allowed, depth=depth)
    # The gradient of the log-sum-exp is that of an additional value that is 1 for all keys.
    whole = attention._replace(v=F.pad(attention.v, (0, 1), value=1.0))
    gradient = torch.cat([*upstream[:2], upstream[2][..., None]], -1)
    limit = bounds(whole, gradient, path, allowed=allowed, depth=depth)
    dq = limit.dq.sum(0, keepdim=True) * attention.q.shape[-1] ** 0.5  # the samples share the queries
    of_keys = (limit.dk + limit.dv[..., :-1]).sum(1)  # of scale * tokens, for all heads
    scale = inputs[3].double().flatten(1)
    tokens = (attention.k[:, 0] / scale[..., None]).abs()
    grid = inputs[2].shape[2:]
    return [
        *limit.out[..., :-1].split([channels, inputs[1].shape[-1]], -1),
        of_lse[2],
        *dq.split([channels, inputs[1].shape[-1]], -1),
        (of_keys[..., :channels] * scale[..., None]).mT.unflatten(-1, grid),
        (of_keys * tokens).sum(-1).unflatten(-1, grid),
    ]


def grid_ratios(inputs: list[Tensor], path: Path, mask: Tensor | None = None) -> dict[str, float]:
    actual = outputs_and_gradients(read_grid, inputs, mask)
    expected = outputs_and_gradients(formula, [x.double() for x in inputs], mask)
    limits = grid_limits(inputs, path, mask)
    tiny = torch.finfo(path.out).tiny
    return {
        name: float(((a.double() - e) / (limit + tiny)).abs().max())
        for name, a, e, limit in zip(NAMES, actual, expected, limits, strict=True)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_a_structured_read_are_within_their_bounds(backend, dtype):
    if backend == "cpp" and not cpp_library.functions():
        pytest.skip("no compiler")
    if backend == "triton" and (reason := triton_problem()):
        pytest.skip(reason)
    worst = dict.fromkeys(NAMES, 0.0)
    with use_backend(backend):
        for grid in GRIDS.get(backend, ((1,), (499,), (19, 23), (5, 3, 11))):
            for magnitude, masked in ((30.0, True),) if backend == "triton" else CASES:
                mask = random_mask(2, *grid) | (torch.arange(grid[-1]) == 0) if masked else None
                inputs = grid_inputs(grid, magnitude, dtype)
                for name, ratio in grid_ratios(inputs, Path(*[dtype] * 4), mask).items():
                    worst[name] = max(worst[name], ratio)
    assert max(worst.values()) <= 1, worst
    assert max(worst.values()) >= TIGHT, worst


def short_power(x: Tensor) -> Tensor:
    """Return 2^x from a polynomial of degree 4 instead of 6, as in cpp/vectors.h, in place."""
    rest = (x - x.round()) * math.log(2)
    return x.copy_(sum(rest**n / math.factorial(n) for n in range(5)) * torch.exp2(x.round()))


def evenly_spaced_scores() -> list[Tensor]:
    """Return inputs whose scores evenly cover an interval of length log 2, the period of the polynomial's error."""
    axis_queries = torch.linspace(-0.7, 0, 13).expand(1, 2, 5, 13)
    return [torch.zeros(1, 2, 5, 3), axis_queries, torch.ones(2, 3, 13), torch.ones(2, 13)]


def test_bounds_reveal_a_polynomial_that_is_too_short(monkeypatch):
    with use_backend("eager"):
        assert max(grid_ratios(evenly_spaced_scores(), SINGLE).values()) <= 1
        monkeypatch.setattr(torch.Tensor, "exp2_", short_power)
        assert grid_ratios(evenly_spaced_scores(), SINGLE)["marginals"] > 1


def test_bounds_reveal_scores_in_lower_precision(monkeypatch):
    products = eager._products
    monkeypatch.setattr(eager, "_products", lambda *arguments: products(*arguments).bfloat16().float())
    with use_backend("eager"):
        assert grid_ratios(grid_inputs((19, 23), 1.0, torch.float32), SINGLE)["content"] > 1


MUTATIONS = {  # text in a file, and what replaces it
    "2^x by a polynomial of degree 4": ("vectors.h", "f * 1.5403530393381608e-4f + 1.3333558146428443e-3f", "0.0f * f"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_bounds_reveal_mutations_of_the_compiled_loop(name, tmp_path, monkeypatch):
    if not cpp_library.functions():
        pytest.skip("no compiler")
    file, old, new = MUTATIONS[name]
    folder = shutil.copytree(cpp_library.SOURCE.parent, tmp_path / "cpp")
    text = (folder / file).read_text()
    assert text.count(old) == 1
    (folder / file).write_text(text.replace(old, new))
    monkeypatch.setattr(cpp_library, "SOURCE", folder / "reads.cpp")
    monkeypatch.setattr(cpp_library, "FLAGS", tuple("-O1" if flag == "-O3" else flag for flag in cpp_library.FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mutated = cpp_library.functions.__wrapped__()
    monkeypatch.setattr(cpp_library, "functions", lambda: mutated)
    assert max(grid_ratios(evenly_spaced_scores(), SINGLE).values()) > 1


STRATEGIES = {"dense": reads.Dense(), "factored": reads.Factored(), "structured": reads.Structured()}


class Read(NamedTuple):
    """Attention of latents to tokens on a grid, in float64. Contents have a given mean and standard deviation."""

    attention: pc.MultiHeadAttention
    norm: nn.Module
    x: Tensor
    tokens: pc.Tokens

    def output(self, strategy: reads.Strategy, dtype: torch.dtype) -> list[Tensor]:
        """Return the output, and the gradients of latents, content and weights, computed in `dtype`.

        The bias of the keys is left out: its gradient is zero.
        """
        attention, norm = (copy.deepcopy(part).to(dtype) for part in (self.attention, self.norm))
        x, content = (y.to(dtype).requires_grad_() for y in (self.x, self.tokens.content))
        tables = tuple(table.to(dtype) for table in self.tokens.position_tables)
        source = reads.Source(pc.Tokens(content, tables, self.tokens.mask), norm, strategy)
        out = attention(x, source)
        gradient = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
        leaves = [x, content, *(weight for name, weight in attention.named_parameters() if name != "key.bias")]
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    @torch.no_grad()
    def limit(self, dtype: torch.dtype) -> float:
        """Return the bound of errors relative to the largest number of an output or a gradient."""
        tokens = self.tokens.materialize()
        ratio = (tokens.mean(-1).abs() / (tokens.var(-1, unbiased=False) + self.norm.eps).sqrt()).max()
        q, k = (
            part(x).unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)
            for part, x in ((self.attention.query, self.x), (self.attention.key, self.norm(tokens)))
        )
        scores = (q @ k.mT * q.shape[-1] ** -0.5).abs().max()
        sums = unit(torch.promote_types(dtype, torch.float32)) * tokens.shape[-2] / LANES
        return float((unit(dtype) * CONSTANT / 2 + sums) * (1 + scores) * (1 + ratio))


def read_of(grid: tuple[int, ...], *, mean: float, masked: bool, tables: bool = True) -> Read:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    content = torch.randn(2, *grid, 3, generator=generator) + mean
    fourier = pc.positions.Fourier(num_axes=len(grid), num_bands=2, max_resolution=11)
    tokens = pc.Tokens(
        content.bfloat16().double(),
        tuple(table.bfloat16().double() for table in fourier.tables(grid, content)) if tables else (),
        random_mask(2, *grid) if masked else None,
    )
    attention = pc.MultiHeadAttention(16, tokens.dim, num_heads=2, qk_dim=8).double()
    norm = nn.LayerNorm(tokens.dim).double()
    with torch.no_grad():
        for weight in (*attention.parameters(), *norm.parameters()):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1).copy_(weight.bfloat16())
    return Read(attention, norm, torch.randn(2, 5, 16, generator=generator).bfloat16().double(), tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STRATEGIES)
def test_errors_of_a_whole_read_grow_with_its_scores_and_the_mean_of_its_tokens(name, dtype):
    found = {}
    for grid in ((7,), (19, 23)):
        for mean, masked, tables in ((0.0, True, True), (0.0, False, False), (100.0, True, False)):
            read = read_of(grid, mean=mean, masked=masked, tables=tables)
            expected, actual = read.output(reads.Dense(), torch.float64), read.output(STRATEGIES[name], dtype)
            errors = [(a.double() - e).abs().max() / e.abs().max() for a, e in zip(actual, expected, strict=True)]
            found[grid, mean, tables] = float(max(errors)) / read.limit(dtype)
    assert max(found.values()) <= 1, found
    if (name, dtype) != ("dense", torch.float64):  # the same computation
        assert max(found.values()) >= TIGHT, found
