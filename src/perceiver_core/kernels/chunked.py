"""Softmax attention computed one chunk of keys at a time, with an online softmax, and exact merging of results.

Both the forward and the backward pass compute scores for one chunk at a time. The backward pass recomputes the
attention weights from the log-sum-exp (lse) of the scores. Attention outputs over disjoint subsets i of the keys can be
merged exactly and in any order, so the keys may come from a stream, a memory-mapped file or other distributed ranks:

    out = sum_i exp(lse_i - lse) out_i        lse = log sum_i exp(lse_i)

Reference: Milakov and Gimelshein 2018 (online softmax); Rabe and Staats 2021; Dao et al. 2022, appendix B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core import checks, masks, tracing
from perceiver_core.argument_errors import explained
from perceiver_core.kernels.reference import Keys, Outputs, Queries, Values
from perceiver_core.masked_values import attended_keys, may_spread
from perceiver_core.masks import Mask, Rule
from perceiver_core.registry import register


class PartialAttention(NamedTuple):
    """Attention output over a subset of the keys, and the log-sum-exp of the scores."""

    output: Float[Tensor, "b h q e"]
    lse: Float[Tensor, "b h q"]


@register
@explained
def chunked(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    mask: Mask | None = None,
    chunk_size: int = 4096,
    half_precision_matmul: bool = False,
) -> Outputs:
    """Compute exact attention with O(q x chunk_size) instead of O(q x k) memory, in forward and backward pass.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        mask: Attention mask, evaluated one chunk at a time; see `masks`.
        chunk_size: Number of keys per chunk.
        half_precision_matmul: Whether to multiply half-precision inputs in half precision instead of float32. This is
            several times faster on processors with hardware support, but rounds the scores. The softmax and the sums
            over chunks are always computed in at least float32.

    Example:
        >>> q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8), torch.randn(2, 4, 11, 5)
        >>> torch.testing.assert_close(pc.kernels.chunked(q, k, v, chunk_size=3), pc.kernels.reference(q, k, v))
    """
    part = partial_attention(q, k, v, mask=mask, chunk_size=chunk_size, half_precision_matmul=half_precision_matmul)
    return part.output


@explained
def partial_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    mask: Mask | None = None,
    chunk_size: int = 4096,
    half_precision_matmul: bool = False,
) -> PartialAttention:
    """Compute softmax attention over a subset of the keys. `merge` combines the results for several subsets.

    The arguments are the same as for `chunked`. The mask must cover only the keys that are passed. `masks.Causal` and
    `masks.Window` assume that the last of these keys is the last key of the whole input. For any other subset, pass a
    boolean tensor: the mask of the whole input, sliced along the key axis.

    Returns:
        Named tuple of the output `b h q e`, in the dtype of `v`, and the log-sum-exp of the scores `b h q`, in at least
        float32. For a query whose keys are all masked, the output is 0 and the log-sum-exp is -inf.

    Example:
        >>> q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
        >>> chunks = zip(k.split(6, dim=2), v.split(6, dim=2))
        >>> halves = [pc.kernels.partial_attention(q, keys, values) for keys, values in chunks]
        >>> torch.testing.assert_close(pc.kernels.merge(*halves).output, pc.kernels.reference(q, k, v))
    """
    checks.positive(chunk_size=chunk_size)
    checks.attention_inputs(q=q, k=k, v=v)
    if mask is not None:
        masks.check_broadcast(mask, q, k)
    rules, tensors = masks.split(mask)
    if mask is not None:
        q, k, v = _without_masked(q, k, v, mask, tensors, chunk_size)
    matmul_dtype = q.dtype if half_precision_matmul else torch.promote_types(q.dtype, torch.float32)
    attend: Callable[..., tuple[Tensor, Tensor]] = _PartialAttention.apply
    return PartialAttention(*attend(q, k, v, rules, (chunk_size, matmul_dtype), *tensors))


def _without_masked(
    q: Queries, k: Keys, v: Values, mask: Mask, tensors: tuple[Tensor, ...], chunk_size: int
) -> tuple[Queries, Keys, Values]:
    """Return queries, keys and values, with zeros for those that the mask excludes. Rules are not expanded."""
    if not any(map(may_spread, (q, k, v))):
        return q, k, v
    for part in tensors:
        if part.ndim > 1 and part.shape[-2] != 1:
            q = q.masked_fill(~part.any(-1, keepdim=True), 0.0)
    keys = attended_keys(mask, q.shape[-2], k.shape[-2], q.device, block_size=chunk_size)
    if keys is not None:
        k, v = (x.masked_fill(~keys.unsqueeze(-1), 0.0) for x in (k, v))
    return q, k, v


@explained
def merge(*parts: PartialAttention) -> PartialAttention:
    """Merge attention results over disjoint subsets of the keys into the result over all these keys.

    The operation is differentiable, and the order of the results does not matter. `partial_attention` has an example.

    Raises:
        ValueError: If no parts are passed.
    """
    if not parts:
        raise ValueError("merge needs at least one part; got none")
    lses = torch.stack([part.lse for part in parts])
    top = lses.amax(0).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    shares = (lses - top).exp()
    total = shares.sum(0)
    attends = total > 0
    total = total.where(attends, 1.0)
    outputs = torch.stack([part.output.to(lses.dtype) for part in parts])
    output = (shares[..., None] * outputs).sum(0) / total[..., None]
    return PartialAttention(output.to(parts[0].output.dtype), (top + total.log()).where(attends, -torch.inf))


class _PartialAttention(torch.autograd.Function):
    """Autograd function of `partial_attention`. Plain autograd would store the attention weights of every chunk.

    Each mask tensor is a separate argument, so that `torch.func.vmap` can map over it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, rules: tuple[Rule, ...], settings: tuple[int, torch.dtype], *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        chunk_size, matmul_dtype = settings
        with checks.full_precision(q.device):
            queries, wide = _scaled(q, matmul_dtype)
            top = queries.new_full(q.shape[:-1], -torch.inf, dtype=wide)
            total = torch.zeros_like(top)
            summed = queries.new_zeros(*q.shape[:-1], v.shape[-1], dtype=wide)
            for chunk in _chunks(k, chunk_size):
                scores = _scores(queries, k[..., chunk, :].to(matmul_dtype), (*rules, *tensors), chunk, k.shape[-2])
                new_top = torch.maximum(top, scores.amax(-1))
                base = new_top.masked_fill(new_top == -torch.inf, 0.0)
                weights = (scores - base[..., None]).exp_()
                shrink = (top - base).exp()
                total = total * shrink + weights.sum(-1)
                summed = summed * shrink[..., None] + weights.to(matmul_dtype) @ v[..., chunk, :].to(matmul_dtype)
                top = new_top
            attends = total > 0
            norm = total.where(attends, 1.0)
            return _cast(summed / norm[..., None], v.dtype), (top + norm.log()).where(attends, -torch.inf)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, ctx.rules, ctx.settings, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        # torch.compile cannot trace a Function inside a backward pass, and does not support second derivatives.
        compute = _Gradients.forward if torch.compiler.is_compiling() else _Gradients.apply
        saved = ctx.saved_tensors
        gradients = compute(ctx.rules, ctx.settings, d_output, d_lse, *saved)
        return (*gradients, None, None, *(None for _ in saved[5:]))


class _Gradients(torch.autograd.Function):
    """Backward pass of `_PartialAttention`, as a separate Function so that second derivatives raise an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rules: tuple[Rule, ...], settings: tuple[int, torch.dtype], d_output: Tensor, d_lse: Tensor, *saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, output, lse, *tensors = saved
        chunk_size, matmul_dtype = settings
        with checks.full_precision(q.device):
            queries, wide = _scaled(q, matmul_dtype)
            # d score = weight * (d weight - sum of weight * d weight + d lse); the sum is d_out . out.
            offset = d_lse - (d_output.to(wide) * output.to(wide)).sum(-1)
            d_out = d_output.to(matmul_dtype)
            base = lse.masked_fill(lse == -torch.inf, 0.0)
            # Created from `offset`, so that under vmap the gradients have the mapped axis even if their input does not.
            d_queries = offset.new_zeros(queries.shape)
            d_k, d_v = offset.new_empty(k.shape, dtype=k.dtype), offset.new_empty(v.shape, dtype=v.dtype)
            for chunk in _chunks(k, chunk_size):
                keys, values = k[..., chunk, :].to(matmul_dtype), v[..., chunk, :].to(matmul_dtype)
                scores = _scores(queries, keys, (*rules, *tensors), chunk, k.shape[-2])
                weights = (scores - base[..., None]).exp_()
                d_v[..., chunk, :] = (weights.to(matmul_dtype).mT @ d_out).to(v.dtype)
                d_scores = (d_out @ values.mT + offset[..., None]).mul_(weights).to(matmul_dtype)
                d_queries += d_scores @ keys
                d_k[..., chunk, :] = (d_scores.mT @ queries).to(k.dtype)
            return _cast(d_queries * q.shape[-1] ** -0.5, q.dtype), d_k, d_v

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Save nothing, because second derivatives are not supported."""

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> None:
        raise RuntimeError("chunked attention is differentiable once; for second derivatives use kernel=reference")


def _scaled(q: Tensor, matmul_dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """Return the queries times 1 / sqrt(d) in `matmul_dtype`, and the dtype for accumulation (at least float32)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide) * q.shape[-1] ** -0.5).to(matmul_dtype), wide


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # If a Function returns the result of a no-op `to`, torch.compile in PyTorch 2.11 computes zero gradients.
    return x if x.dtype == dtype else x.to(dtype)


def _chunks(k: Tensor, size: int) -> list[slice]:
    if tracing.is_exporting():  # the number of chunks could not depend on dynamic sizes
        return [slice(0, k.shape[-2])]
    return [slice(start, min(start + size, k.shape[-2])) for start in range(0, k.shape[-2], size)]


def _scores(queries: Tensor, keys: Tensor, parts: tuple[Mask, ...], chunk: slice, num_keys: int) -> Tensor:
    """Return the attention scores for one chunk of keys, in at least float32. Masked scores are -inf.

    `chunk` is the slice of the `num_keys` keys that `keys` contains. Each mask in `parts` covers all `num_keys` keys.
    """
    scores = (queries @ keys.mT).to(torch.promote_types(queries.dtype, torch.float32))
    if not parts:
        return scores
    # Positions are counted from the end of the keys; see `masks.positions`. Those of other chunks are not formed.
    rows = masks.positions(queries.shape[-2], queries.device)
    columns = torch.arange(chunk.start - num_keys, chunk.stop - num_keys, device=keys.device)
    for mask in parts:
        scores = scores.masked_fill(~masks.block(mask, rows, columns), -torch.inf)
    return scores
