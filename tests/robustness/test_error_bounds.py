"""Rounding errors of every kernel in every dtype are within theoretical bounds, and the bounds are not too loose.

The bounds are first-order, for each number of an output or a gradient; `rounding` has the formulas. A test computes the
largest ratio of a measured error to its bound, over inputs of various sizes and magnitudes. The ratio must be at most
1, and at least `TIGHT`, so that a bound that tolerates everything fails as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perceiver_core import kernels, masks
from perceiver_core.kernels import add_zero_attn, chunked, fastest, inverted, partial_attention, reference, sdpa
from tests.robustness.rounding import Bounds, Path, Terms, bounds, unit, weights_and_errors

pytestmark = pytest.mark.no_shape_checks  # shapes are checked by the tests of each part

TIGHT = 0.01
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def plain(dtype: torch.dtype) -> Path:
    """Return the path of kernels that compute in float32 or wider, and round weights to the dtype of the values."""
    return Path(wide(dtype), dtype, wide(dtype), dtype)


def in_chunks(dtype: torch.dtype) -> Path:
    return Path(wide(dtype), wide(dtype), wide(dtype), dtype, block=64)


def in_half(dtype: torch.dtype) -> Path:
    """Return the path of kernels that round scores and weights to the dtype of the inputs."""
    return Path(dtype, dtype, wide(dtype), dtype)


Kernel = Callable[..., Tensor]
KERNELS: dict[str, tuple[Kernel, Callable[[torch.dtype], Path]]] = {
    "reference": (reference, plain),
    "sdpa": (sdpa, plain),
    "fastest": (fastest, plain),
    "chunked": (partial(chunked, chunk_size=64), in_chunks),
    "chunked, half": (partial(chunked, chunk_size=64, half_precision_matmul=True), in_half),
    "zero token": (partial(add_zero_attn, kernel=sdpa), plain),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


class Case(NamedTuple):
    """Numbers of keys and channels, and magnitude of the scores; 0 for nearly equal weights and values."""

    keys: int
    width: int
    magnitude: float

    def draw(self, dtype: torch.dtype, queries: int = 5) -> list[Tensor]:
        """Return queries, keys, values and the gradient of the output, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(self.keys + self.width)
        shapes = (queries, self.width), (self.keys, self.width), (self.keys, 11), (queries, 11)
        q, k, v, g = (torch.randn(1, 2, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
        factor = self.magnitude**0.5 if self.magnitude else 0.01
        drawn = q * factor, k * factor, v if self.magnitude else 1 + 0.01 * v, g
        return [x.to(dtype) for x in drawn]


CASES = [Case(*case) for case in ((1, 8, 30), (7, 8, 0), (7, 64, 1), (61, 8, 1000), (499, 8, 30), (997, 64, 1))]
LONG = [Case(4999, 8, 0)]


def exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return (weights if allowed is None else weights.masked_fill(~allowed, 0.0)) @ v


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def ratios(actual: list[Tensor], expected: list[Tensor], limits: Bounds | list[Tensor]) -> dict[str, float]:
    """Return the largest ratio of the errors to their bounds, for the output and each gradient."""
    pairs = zip(Bounds._fields, actual, expected, limits, strict=True)
    found = {}
    for name, a, e, limit in pairs:
        assert a.isfinite().all(), name
        found[name] = float(((a.double() - e) / limit).abs().max())
    return found


def largest(found: Iterator[dict[str, float]]) -> dict[str, float]:
    every = list(found)
    return {name: max(each[name] for each in every) for name in every[0]}


def check(found: dict[str, float]) -> None:
    assert max(found.values()) <= 1, found
    assert max(found.values()) >= TIGHT, found


def kernel_ratios(
    name: str, dtype: torch.dtype, case: Case, path: Path, mask: masks.Mask | None = None, allowed: Tensor | None = None
) -> dict[str, float]:
    q, k, v, g = case.draw(dtype)
    kernel = partial(KERNELS[name][0], mask=mask)
    inputs = [x.double() for x in (q, k, v)]
    if name == "zero token":
        seen = None if allowed is None else F.pad(allowed.expand(*allowed.shape[:-1], case.keys), (1, 0), value=True)
        extended = [F.pad(x, (0, 0, 1, 0)) if i else x for i, x in enumerate(inputs)]
        limits = bounds(Terms(*extended), g.double(), path, allowed=seen)
        limits = limits._replace(dk=limits.dk[:, :, 1:], dv=limits.dv[:, :, 1:])
        formula = lambda q, k, v: exact(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), seen)  # noqa: E731
    else:
        limits, formula = bounds(Terms(*inputs), g.double(), path, allowed=allowed), partial(exact, allowed=allowed)
    return ratios(with_gradients(kernel, [q, k, v], g), with_gradients(formula, inputs, g), limits)


@all_dtypes
@every_kernel
def test_errors_of_a_kernel_are_within_their_bounds(name, dtype):
    path = KERNELS[name][1](dtype)
    cases = CASES + (LONG if dtype.itemsize >= 4 and name in ("reference", "sdpa", "chunked") else [])
    check(largest(kernel_ratios(name, dtype, case, path) for case in cases))


@every_kernel
def test_masked_keys_do_not_add_to_errors(name):
    valid = torch.arange(997) % 3 == 0
    mask, allowed = masks.and_(masks.Padding(valid[None]), masks.Causal()), valid & torch.ones(5, 997).tril(992).bool()
    check(kernel_ratios(name, torch.float32, Case(997, 8, 30), KERNELS[name][1](torch.float32), mask, allowed))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("reference", in_half(torch.bfloat16)),
        ("sdpa", in_half(torch.bfloat16)),
        ("fastest", in_half(torch.bfloat16)),
        ("chunked", in_chunks(torch.float32)),  # leaves autocast
        ("zero token", in_half(torch.bfloat16)),
    ],
)
def test_errors_under_autocast_are_within_their_bounds(name, path):
    with torch.autocast("cpu", torch.bfloat16):
        found = largest(kernel_ratios(name, torch.float32, case, path) for case in CASES)
    check(found)


@all_dtypes
def test_errors_of_weights_and_of_their_logarithm_are_within_their_bounds(dtype):
    def found() -> Iterator[dict[str, float]]:
        for case in CASES:
            q, k, v, _ = case.draw(dtype)
            exact_inputs, path = Terms(*(x.double() for x in (q, k, v))), Path(*[wide(dtype)] * 4)
            p, dp, dlse = weights_and_errors(exact_inputs, path)
            lse = (exact_inputs.q @ exact_inputs.k.mT * case.width**-0.5).logsumexp(-1)
            parts = [partial_attention(q, *both) for both in zip(k.split(600, 2), v.split(600, 2), strict=True)]
            yield {
                "map": float(((kernels.attention_map(q, k) - p) / dp).abs().max()),
                "one-hot map": float(((kernels.kernel_attention_map(fastest, q, k) - p) / dp).abs().max()),
                "lse": float(((kernels.merge(*parts).lse - lse) / dlse).abs().max()),
            }

    check(largest(found()))


@all_dtypes
def test_errors_of_inverted_attention_are_within_their_bounds(dtype):
    """Log-probabilities of the softmax over queries are the scores of a second one, and have their own error."""

    def found() -> Iterator[dict[str, float]]:
        for case in CASES:
            q, k, v, _ = (x.double() for x in case.draw(dtype))
            _, _, d_lse = weights_and_errors(Terms(k, q, v), Path(*[wide(dtype)] * 4))
            scores, size = (q @ k.mT * case.width**-0.5), (q.abs() @ k.abs().mT * case.width**-0.5)
            shares = scores - scores.logsumexp(-2, keepdim=True)
            of_share = unit(wide(dtype)) * (2 + case.width / 8) * (size + shares.abs()) + d_lse[:, :, None]
            p = shares.softmax(-1)
            path = plain(dtype)
            r = (of_share + (p * of_share).sum(-1, keepdim=True)).clamp_max(50).expm1()
            dp = p * (r + unit(path.sums) * path.growth(case.keys) + unit(path.weights))
            out = p @ v
            limit = dp @ v.abs() + (dp.sum(-1, keepdim=True) + unit(dtype)) * out.abs() + torch.finfo(dtype).tiny
            yield {"out": float(((inverted(*case.draw(dtype)[:3]).double() - out) / limit).abs().max())}

    check(largest(found()))


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


MUTANTS: dict[str, Kernel] = {
    "scores in bfloat16": lambda q, k, v: rounded(q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v,
    "weights in bfloat16": lambda q, k, v: rounded((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)) @ v,
    "outputs in bfloat16": lambda q, k, v: rounded(reference(q, k, v)),
    "queries in float16": lambda q, k, v: reference(q.half().to(q.dtype), k, v),
    "scale in bfloat16": lambda q, k, v: reference(q * (float(rounded(torch.tensor(8**-0.5))) * 8**0.5), k, v),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_bounds_reveal_a_kernel_that_computes_less_precisely(name):
    case, path = Case(997, 8, 30), plain(torch.float32)
    q, k, v, g = case.draw(torch.float32)
    inputs = [x.double() for x in (q, k, v)]
    limit = bounds(Terms(*inputs), g.double(), path).out
    assert ((MUTANTS[name](q, k, v).double() - exact(*inputs)) / limit).abs().max() > 1
