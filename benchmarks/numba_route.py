"""The loop of a structured read in Python, compiled by numba: pictures of three channels, one sample, one head."""
# mypy: ignore-errors

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

F = np.float32
LOG2E = 1.4426950408889634
BLOCK = 16  # queries a task holds
SLACK, LOWEST = F(16), F(-3e38)
FREE = {"nnan", "ninf", "nsz", "contract", "reassoc", "arcp"}
KEPT = {"contract", "nsz", "nnan"}  # no reassoc: (x + ROUND) - ROUND has to stay
ROUND, TINY = F(12582912), F(-126)
P6, P5, P4, P3, P2, P1 = (
    F(x)
    for x in (1.54035304e-4, 1.33335581e-3, 9.61812911e-3, 5.55041087e-2, 2.40226507e-1, 6.93147181e-1)  # of 2^x
)


@intrinsic
def bits(_, x):
    """The bits of a float."""
    return types.int32(types.float32), lambda c, b, s, a: b.bitcast(a[0], ir.IntType(32))


@intrinsic
def number(_, x):
    """The float of some bits."""
    return types.float32(types.int32), lambda c, b, s, a: b.bitcast(a[0], ir.FloatType())


@intrinsic
def scaled(_, p, n):
    """The bits p with n added to the exponent."""
    shift = ir.Constant(ir.IntType(32), 23)
    return types.int32(types.int32, types.int32), lambda c, b, s, a: b.add(a[0], b.shl(a[1], shift))


@intrinsic
def larger(_, x, y):
    """A maximum that LLVM vectorizes."""

    def build(c, b, s, a):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        return b.call(b.module.declare_intrinsic("llvm.maxnum", [ir.FloatType()], kind), a, fastmath=tuple(FREE))

    return types.float32(types.float32, types.float32), build


@njit(fastmath=KEPT, error_model="numpy")
def exp2(x):
    """2^x for x <= 0."""
    x = max(x, TINY)
    shifted = x + ROUND
    f = x - (shifted - ROUND)
    p = (((((P6 * f + P5) * f + P4) * f + P3) * f + P2) * f + P1) * f + F(1)
    return number(scaled(bits(p), bits(shifted)))


@njit(fastmath=FREE, error_model="numpy")
def score(scores, u, base, a, x0, x1, x2, r):
    """The scores of a row, and the largest."""
    top, a0, a1, a2 = LOWEST, a[0], a[1], a[2]
    for j in range(scores.shape[0]):
        scores[j] = (u[j] + base + a0 * x0[j] + a1 * x1[j] + a2 * x2[j]) * r[j]
        top = larger(top, scores[j])
    return top


@njit(fastmath=FREE, error_model="numpy")
def weigh(scores, base, r, x0, x1, x2, column):
    """The sums of a row."""
    total = row = y0 = y1 = y2 = F(0)
    for j in range(scores.shape[0]):
        p = exp2(scores[j] - base)
        total += p
        p *= r[j]
        row += p
        column[j] += p
        y0 += p * x0[j]
        y1 += p * x1[j]
        y2 += p * x2[j]
    return total, row, y0, y1, y2


@njit(parallel=True, error_model="numpy")
def forward(a, rows, columns, x, r, y, row_sums, column_sums, lse):  # noqa: PLR0913
    """All queries, a block of them at a time."""
    for block in prange((a.shape[0] + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min((block + 1) * BLOCK, a.shape[0])
        scores, base, total = np.empty(r.shape[1], F), np.full(BLOCK, LOWEST), np.zeros(BLOCK, F)
        for i in range(r.shape[0]):
            x0, x1, x2 = x[0, i], x[1, i], x[2, i]
            for query in range(first, last):
                q = query - first
                top = score(scores, columns[query], rows[query, i], a[query], x0, x1, x2, r[i])
                if top > base[q] + SLACK:
                    shrink = exp2(max(base[q] - top, TINY)) if i else F(0)
                    total[q] *= shrink
                    y[query] *= shrink
                    row_sums[query] *= shrink
                    column_sums[query] *= shrink
                    base[q] = top
                more, row_sums[query, i], y0, y1, y2 = weigh(scores, base[q], r[i], x0, x1, x2, column_sums[query])
                total[q] += more
                y[query, 0] += y0
                y[query, 1] += y1
                y[query, 2] += y2
        for query in range(first, last):
            lse[query] = base[query - first] + np.log2(total[query - first])
            y[query] /= total[query - first]
            row_sums[query] /= total[query - first]
            column_sums[query] /= total[query - first]


def read_grid(a: Tensor, u: Tensor, content: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """As `perceiver_core.kernels.structured.read_grid`."""
    height, width = scale.shape[1:]
    asks, tables = (np.ascontiguousarray(x[0, 0].numpy()) * F(LOG2E) for x in (a, u))
    y, rows = np.zeros((len(asks), 3), F), np.zeros((len(asks), height), F)
    columns, lse = np.zeros((len(asks), width), F), np.empty(len(asks), F)
    above, beside = np.ascontiguousarray(tables[:, :height]), np.ascontiguousarray(tables[:, height:])
    forward(asks, above, beside, content[0].numpy(), scale[0].numpy(), y, rows, columns, lse)
    marginals = torch.cat([torch.from_numpy(rows), torch.from_numpy(columns)], dim=1)
    return torch.from_numpy(y)[None, None], marginals[None, None], torch.from_numpy(lse / F(LOG2E))[None, None]
