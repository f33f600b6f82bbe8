"""Reads of tokens on a grid in factored form, and their baseline: attention to dense tokens, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import Tokens, masks
from perceiver_core.kernels import PartialAttention, reference
from perceiver_core.reads import factored, slabs, structured
from perceiver_core.reads.factored_keys_values import AttendSlab, FactoredKeysValues, Norm, factor

B, H, Q, C, P = 2, 3, 5, 7, 11  # batch, heads, queries, channels, width of positions
D, E = 13, 2  # of a head's keys and values
GRID = (3, 17, 5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bools(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def columns(start: int, stop: int, *shape: int, seed: int) -> Tensor:
    """A table with some nonzero columns."""
    table = torch.zeros(*shape, P, dtype=torch.float64)
    table[..., start:stop] = draw(*shape, stop - start, seed=seed)
    return table


TABLES = {
    "none": (),
    "one axis": (draw(1, 17, 1, P, seed=1),),
    "disjoint": (
        columns(0, 5, 3, 1, 1, seed=1),
        columns(5, 8, 1, 17, 1, seed=2),
        columns(8, 11, 1, 1, 5, seed=3),
    ),
    "overlapping": (draw(3, 1, 1, P, seed=1), columns(2, 9, 1, 17, 1, seed=2), draw(1, 1, 5, P, seed=3)),
    "whole grid": (draw(3, 17, 5, P, seed=1),),
    "two on an axis": (draw(1, 17, 1, P, seed=1), draw(1, 17, 1, P, seed=2), draw(1, 1, 5, P, seed=3)),
    "first two axes": (draw(3, 17, 1, P, seed=1), draw(1, 1, 5, P, seed=2)),
    "last two axes": (draw(3, 1, 1, P, seed=1), draw(1, 17, 5, P, seed=2)),
    "outer axes": (draw(3, 1, 5, P, seed=1), draw(1, 17, 1, P, seed=2)),
    "overlapping spans": (draw(3, 17, 1, P, seed=1), draw(1, 17, 5, P, seed=2)),
    "constant": (draw(1, 1, 1, P, seed=1), draw(1, 17, 1, P, seed=2)),
    "constant alone": (draw(1, 1, 1, P, seed=1),),
}


class Case(NamedTuple):
    """Inputs of a read; `leaves` lists all differentiable ones in order."""

    q: Tensor
    content: Tensor
    tables: tuple[Tensor, ...]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    weight: Tensor | None = None  # of the norm
    bias: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        flat = [self.q, self.content, *self.tables, *self.key, *self.value, self.weight, self.bias]
        return [x for x in flat if x is not None]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Case:
        return Case(*torch.utils._pytree.tree_map_only(Tensor, function, tuple(self)))


NORMS = {
    "layer norm": ("layer", True, True),
    "layer norm without bias": ("layer", True, False),
    "plain layer norm": ("layer", False, False),
    "RMS norm": ("rms", True, False),
    "plain RMS norm": ("rms", False, False),
    "no norm": (None, False, False),
}


def make(
    tables: tuple[Tensor, ...] = TABLES["disjoint"], norm: str = "layer norm", query_batch: int = B, bias: bool = True
) -> Case:
    width = C + (P if tables else 0)
    _, weight, shift = NORMS[norm]
    return Case(
        q=draw(query_batch, H, Q, D, seed=20),
        content=draw(B, *GRID, C, seed=21),
        tables=tables,
        key=(draw(H * D, width, seed=22) / width**0.5, draw(H * D, seed=23) if bias else None),
        value=(draw(H * E, width, seed=24), draw(H * E, seed=25) if bias else None),
        weight=1 + 0.3 * draw(width, seed=26) if weight else None,
        bias=draw(width, seed=27) if shift else None,
    )


EPS = 0.013
ATTEND_SLAB = {"structured": structured.attend_slab, "formed": factored.attend_slab}


def factored_memory(
    case: Case, norm: str, mask: Tensor | None = None, attend_slab: AttendSlab = structured.attend_slab
) -> FactoredKeysValues:
    formula, _, _ = NORMS[norm]
    constants = None if formula is None else Norm(EPS, case.weight, case.bias, center=formula == "layer")
    return factor(
        Tokens(case.content, case.tables, mask),
        constants,
        case.key,
        case.value,
        num_heads=H,
        attend_slab=attend_slab,
        tokens_per_slab=slabs.TOKENS,
    )


def attend(
    case: Case, norm: str, mask: Tensor | None = None, attend_slab: AttendSlab = structured.attend_slab
) -> PartialAttention:
    return factored_memory(case, norm, mask, attend_slab).attend_with_lse(case.q)


def keys_values(case: Case, norm: str, mask: Tensor | None = None) -> list[Tensor]:
    x = Tokens(case.content, case.tables, mask).materialize()
    if NORMS[norm][0] == "layer":
        x = F.layer_norm(x, x.shape[-1:], case.weight, case.bias, EPS)
    elif NORMS[norm][0] == "rms":
        x = F.rms_norm(x, x.shape[-1:], case.weight, EPS)
    return [F.linear(x, *part).unflatten(-1, (H, -1)).transpose(1, 2) for part in (case.key, case.value)]


def baseline(case: Case, norm: str, mask: Tensor | None = None) -> PartialAttention:
    """Materializes, normalizes and projects tokens, and attends to them."""
    keys, values = keys_values(case, norm, mask)
    q = case.q.expand(B, -1, -1, -1)
    scores = q @ keys.mT / D**0.5
    if mask is None:
        return PartialAttention(reference(q, keys, values), scores.logsumexp(-1))
    present = mask.flatten(1)
    lse = scores.masked_fill(~present[:, None, None], -torch.inf).logsumexp(-1)
    return PartialAttention(reference(q, keys, values, mask=masks.Padding(present)), lse)


def results(read: Callable[..., PartialAttention], case: Case, *args: Any, **options: Any) -> list[Tensor]:
    """Returns output, log-sum-exp and all gradients, for random gradients of both."""
    case = case.mapped(lambda x: x.detach().requires_grad_())
    outputs = read(case, *args, **options)
    upstream = [draw(*x.shape, seed=30 + i).to(x.dtype) for i, x in enumerate(outputs)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, case.leaves(), upstream)]


def compare(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compares with a tolerance relative to the largest value of each tensor, or to their common scale."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        largest = max(e.abs().max().item(), 1.0)
        torch.testing.assert_close(
            a.double(), e.double(), rtol=0.0, atol=tolerance * largest, msg=lambda m, i=i: f"result {i}: {m}"
        )


def check(
    case: Case,
    norm: str,
    dtype: torch.dtype,
    tolerance: float,
    mask: Tensor | None = None,
    *,
    attend_slab: AttendSlab = structured.attend_slab,
) -> None:
    case = case.mapped(lambda x: x.to(dtype))
    expected = results(baseline, case.mapped(Tensor.double), norm, mask)
    compare(results(attend, case, norm, mask, attend_slab), expected, tolerance)
