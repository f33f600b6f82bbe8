"""Attention over an input taken in pieces: online softmax, and the merging of partial results.

No piece is ever held against all the input, in the forward or in the backward pass, which computes the
weights of a piece again from the log-sum-exp. Partial results merge exactly, in any order, so an input
may come from a stream, a memory-mapped file or other ranks:

    out = sum_i exp(lse_i - lse) out_i        lse = log sum_i exp(lse_i)

Reference: Milakov and Gimelshein 2018 (online softmax); Rabe and Staats 2021; Dao et al. 2022, appendix B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core import checks
from perceiver_core import masks
from perceiver_core.masks import Mask, Rule
from perceiver_core.registry import register


class PartialAttention(NamedTuple):
    """Attention over a part of the input, and the log of its normalizer, by which parts merge."""

    output: Float[Tensor, "b h q e"]
    lse: Float[Tensor, "b h q"]


@register
def chunked(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    chunk_size: int = 4096,
    half_precision_matmul: bool = False,
) -> Float[Tensor, "b h q e"]:
    """Exact attention in memory q x chunk instead of q x k, forward and backward.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: see `masks`; evaluated a piece at a time.
        chunk_size: how many keys are held against the queries at once.
        half_precision_matmul: whether inputs in half precision are multiplied as they are, which processors with units
            for it do several times faster, and scores are rounded to it; unless set they are multiplied in float32. The
            softmax and all sums over pieces are in float32 either way.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import chunked, reference
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(chunked(q, k, v, chunk_size=3), reference(q, k, v))
    """
    return partial_attention(q, k, v, mask=mask, chunk_size=chunk_size, half_precision_matmul=half_precision_matmul).output


def partial_attention(
    q: Float[Tensor, "b h q d"],
    k: Float[Tensor, "b h k d"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask | None = None,
    chunk_size: int = 4096,
    half_precision_matmul: bool = False,
) -> PartialAttention:
    """Attention over the part of an input that is at hand, with what `merge` needs to join it to the rest.

    Args are those of `chunked`. A mask is that of this part: a rule such as `masks.Causal` counts positions
    from the end of the keys it is given, so for parts of a longer input give the part of the whole mask.

    Returns:
        The output, in v's dtype, and the log-sum-exp of the scores, in float32 or wider; -inf where a
        query may attend to nothing.

    Example:
        >>> import torch
        >>> from perceiver_core.kernels import merge, partial_attention, reference
        >>> q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
        >>> halves = [partial_attention(q, k[:, :, :6], v[:, :, :6]), partial_attention(q, k[:, :, 6:], v[:, :, 6:])]
        >>> torch.testing.assert_close(merge(*halves).output, reference(q, k, v))
    """
    checks.positive(chunk_size=chunk_size)
    if mask is not None:
        masks.fits(mask, q, k)
    rules, tensors = masks.taken_apart(mask)
    products = q.dtype if half_precision_matmul else torch.promote_types(q.dtype, torch.float32)
    return PartialAttention(*_Partial.apply(q, k, v, rules, (chunk_size, products), *tensors))  # type: ignore[no-untyped-call]


def merge(*parts: PartialAttention) -> PartialAttention:
    """Joins attention over several parts of an input into attention over all of it.

    Differentiable, associative and commutative; see `partial_attention` for an example.
    """
    if not parts:
        raise ValueError("merge needs at least one part; got none")
    lses = torch.stack([part.lse for part in parts])
    top = lses.amax(0).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    shares = (lses - top).exp()
    total = shares.sum(0)
    some = total > 0
    total = total.where(some, 1.0)
    dtype = parts[0].output.dtype
    outputs = torch.stack([part.output.to(lses.dtype) for part in parts])
    output = (shares[..., None] * outputs).sum(0) / total[..., None]
    return PartialAttention(output.to(dtype), (top + total.log()).where(some, -torch.inf))


class _Partial(torch.autograd.Function):
    """The forward and backward of one part; a Function because autograd would store every chunk's weights.

    Mask tensors are arguments of their own, so that `torch.func.vmap` sees them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, rules: tuple[Rule, ...], how: tuple[int, torch.dtype], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        chunk, products = how
        with checks.full_precision(q.device):
            queries, wide = _scaled(q, products)
            top = queries.new_full(q.shape[:-1], -torch.inf, dtype=wide)
            total = torch.zeros_like(top)
            summed = queries.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide)
            for part in _pieces(k.shape[-2], chunk):
                scores = _scores(queries, k[..., part, :].to(products), (*rules, *tensors), part, k.shape[-2])
                new_top = torch.maximum(top, scores.amax(-1))
                base = new_top.masked_fill(new_top == -torch.inf, 0.0)
                weights = (scores - base[..., None]).exp_()
                shrink = (top - base).exp()
                total = total * shrink + weights.sum(-1)
                summed = summed * shrink[..., None] + weights.to(products) @ v[..., part, :].to(products)
                top = new_top
            some = total > 0
            norm = total.where(some, 1.0)
            lse = (top + norm.log()).where(some, -torch.inf)
            return _narrowed(summed / norm[..., None], v.dtype), lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.rules, ctx.how, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse, *tensors = ctx.saved_tensors
        # torch.compile cannot trace a Function inside a backward, and takes no second derivative anyway.
        compute = _Gradients.forward if torch.compiler.is_compiling() else _Gradients.apply
        gradients = compute(q, k, v, output, lse, d_output, d_lse, ctx.rules, ctx.how, *tensors)
        return (*gradients, None, None, *(None for _ in tensors))


class _Gradients(torch.autograd.Function):
    """The backward of a part. A Function of its own so that a second derivative is refused, never silently wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: PLR0913 (what the forward saved and what came back)
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        d_output: Tensor,
        d_lse: Tensor,
        rules: tuple[Rule, ...],
        how: tuple[int, torch.dtype],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunk, products = how
        with checks.full_precision(q.device):
            queries, wide = _scaled(q, products)
            # d score = weight * (d weight - sum of weight * d weight + d lse); the sum is d_out . out.
            offset = d_lse - (d_output.to(wide) * output.to(wide)).sum(-1)
            d_out = d_output.to(products)
            base = lse.masked_fill(lse == -torch.inf, 0.0)
            # Made from `offset`, so that under vmap they have the mapped axis even where an input lacks it.
            d_queries = offset.new_zeros(queries.shape)
            d_k, d_v = offset.new_empty(k.shape, dtype=k.dtype), offset.new_empty(v.shape, dtype=v.dtype)
            for part in _pieces(k.shape[-2], chunk):
                keys, values = k[..., part, :].to(products), v[..., part, :].to(products)
                scores = _scores(queries, keys, (*rules, *tensors), part, k.shape[-2])
                weights = (scores - base[..., None]).exp_()
                d_v[..., part, :] = (weights.to(products).mT @ d_out).to(v.dtype)
                d_scores = (d_out @ values.mT + offset[..., None]).mul_(weights).to(products)
                d_queries += d_scores @ keys
                d_k[..., part, :] = (d_scores.mT @ queries).to(k.dtype)
            return _narrowed(d_queries * q.shape[-1] ** -0.5, q.dtype), d_k, d_v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("chunked attention is differentiable once; for second derivatives use kernel=reference")


def _scaled(q: Tensor, products: torch.dtype) -> tuple[Tensor, torch.dtype]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide) * q.shape[-1] ** -0.5).to(products), wide


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Not a `to` that does nothing: where a Function returns one, torch.compile of PyTorch 2.11 gives zero gradients.
    return x if x.dtype == dtype else x.to(dtype)


def _pieces(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def _scores(queries: Tensor, keys: Tensor, allowed: tuple[Mask, ...], part: slice, n: int) -> Tensor:
    scores = (queries @ keys.mT).to(torch.promote_types(queries.dtype, torch.float32))
    rows = masks.positions(queries.shape[-2], queries.device)
    columns = masks.positions(n, keys.device)[part]
    for mask in allowed:
        scores = scores.masked_fill(~masks.block(mask, rows, columns), -torch.inf)
    return scores
