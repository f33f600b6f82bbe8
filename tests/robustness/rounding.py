"""First-order bounds of the rounding errors of attention, evaluated in float64.

With the unit roundoff u of a dtype, docs/concepts/numerics.md derives:

- A score is a dot product of d terms with magnitude `A = sum |q_d k_d| / sqrt(d)`. Its error is at most
  `u (2 + d / 8) A`. Scores are used relative to the log-sum-exp, whose error is that of an average score.
- A softmax weight p therefore has the relative error `r = expm1(u (2 + d / 8) (A + mean A + |lse|)) + u growth(n)`,
  plus the unit roundoff of the dtype in which weights are stored. It is rounded to zero below the smallest number.
- A sum of m terms has an error of at most `u growth(m)` times the sum of the absolute values.

The bounds of outputs and gradients combine these errors by the formulas of the backward pass, with absolute values in
place of all factors, so that they hold for each number, however much cancels in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CONSTANT = 8.0  # roundings whose number does not grow: in an exponential, divisions, products
LANES = 8.0  # partial sums that even the simplest product of matrices keeps


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff of a dtype: the largest relative error of rounding to the nearest number."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """Return the number below which weights may be rounded to zero. float16 is used with subnormal numbers."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


class Path(NamedTuple):
    """Dtypes of the steps of a path, and the number of terms that are summed before partial sums are added up."""

    scores: torch.dtype
    weights: torch.dtype
    sums: torch.dtype
    out: torch.dtype
    block: float = torch.inf

    def growth(self, num_terms: int) -> float:
        """Return the bound of the error of a sum, in units of the unit roundoff of `sums`."""
        return CONSTANT + min(num_terms, self.block) / LANES + num_terms / self.block


class Terms(NamedTuple):
    """Queries, keys and values, or sums of the absolute values of the terms that they are computed from."""

    q: Tensor
    k: Tensor
    v: Tensor


class Bounds(NamedTuple):
    """Bounds of the absolute errors of the outputs and the gradients."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def weights_and_errors(
    inputs: Terms, path: Path, allowed: Tensor | None = None, terms: Terms | None = None, depth: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return softmax weights, bounds of their absolute errors, and bounds of the errors of the log-sum-exp."""
    (q, k, _), (qa, ka, _) = inputs, terms or inputs
    scores, size = (q @ k.mT * q.shape[-1] ** -0.5), (qa.abs() @ ka.abs().mT * q.shape[-1] ** -0.5)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp().nan_to_num()
    size = size + (p * size).sum(-1, keepdim=True) + lse.nan_to_num(neginf=0.0).abs()
    of_score = unit(path.scores) * (2 + (depth or q.shape[-1]) / LANES) * size
    of_sum = unit(path.sums) * path.growth(k.shape[-2])
    r = of_score.clamp_max(50.0).expm1() + of_sum + unit(path.weights)
    here = torch.ones_like(p) if allowed is None else allowed.expand_as(p)
    return p, p * r + smallest(path.weights) * here, (p * of_score).sum(-1) + of_sum


def bounds(
    inputs: Terms,
    gradient: Tensor,
    path: Path,
    *,
    allowed: Tensor | None = None,
    terms: Terms | None = None,
    depth: int | None = None,
) -> Bounds:
    """Return the error bounds of softmax attention.

    Args:
        inputs: Queries, keys and values in float64.
        gradient: Gradient of the outputs.
        path: Dtypes of the path.
        allowed: Attention mask, broadcastable to `b h q k`.
        terms: Sums of absolute values behind the inputs, if they are results of products themselves.
        depth: Number of terms in a score; the head dimension by default.
    """
    p, dp, _ = weights_and_errors(inputs, path, allowed, terms, depth)
    qa, ka, va = (x.abs() for x in terms or inputs)
    if terms:
        dp = dp + p * unit(path.scores) * (2 + (depth or inputs.q.shape[-1]) / LANES)  # errors of the values
    g, out, scale = gradient.abs(), (p @ inputs.v).abs(), inputs.q.shape[-1] ** -0.5
    last, few = unit(path.out), unit(path.sums) * path.growth(inputs.q.shape[-2])
    of_weight = g @ va.mT + (g * out).sum(-1, keepdim=True)  # magnitude of d_score / p
    d_score = p * of_weight * scale
    of_score = dp * of_weight * scale + d_score * (unit(path.sums) * path.growth(va.shape[-1]) + 2 * last)
    return Bounds(
        dp @ va + dp.sum(-1, keepdim=True) * out + last * out + smallest(path.out),
        of_score @ ka + last * d_score @ ka + smallest(path.out),
        of_score.mT @ qa + (last + few) * d_score.mT @ qa + smallest(path.out),
        dp.mT @ g + (last + few) * p.mT @ g + smallest(path.out),
    )
