"""Zeros in place of masked values, so that NaN and infinity at masked positions affect neither outputs nor gradients.

A weight of zero is not enough: zero times NaN is NaN, in the output and in the gradient of every weight that a masked
value was multiplied with. Without a mask, no function of this module does any work. On the CPU in eager mode, values
are inspected first, and inputs of ordinary numbers are returned without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import and_, or_
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from perceiver_core import checks, masks, tracing
from perceiver_core.masks import Mask
from perceiver_core.tokens import Tokens

LARGEST = 1e9  # magnitude up to which values are multiplied and normalized without overflow in float32 and bfloat16

Queries: TypeAlias = Float[Tensor, "b h q d"]
Keys: TypeAlias = Float[Tensor, "b h k d"]
Values: TypeAlias = Float[Tensor, "b h k e"]


def attended_keys(
    mask: Mask | None, num_queries: int, num_keys: int, device: torch.device, *, block_size: int = 4096
) -> Bool[Tensor, "... k"] | None:
    """Return a mask `k`, `h k` or `b h k` that is False at keys to which no query attends, or None for no such keys.

    For an intersection of masks, the keys are those to which a query attends according to each mask by itself.

    Args:
        mask: Attention mask.
        num_queries: Number of queries.
        num_keys: Number of keys.
        device: Device on which a rule is evaluated.
        block_size: Number of keys for which a rule is evaluated at a time.
    """
    if mask is None or isinstance(mask, (masks.Causal, masks.Queries)):  # the last query attends to all keys
        return None
    if isinstance(mask, masks.Padding):
        return mask.keys[:, None]
    if isinstance(mask, masks.And):
        known = [
            x
            for part in mask.masks
            if (x := attended_keys(part, num_queries, num_keys, device, block_size=block_size)) is not None
        ]
        return reduce(and_, known) if known else None
    if isinstance(mask, masks.Or):
        parts = [attended_keys(part, num_queries, num_keys, device, block_size=block_size) for part in mask.masks]
        return None if any(x is None for x in parts) else reduce(or_, parts)
    if isinstance(mask, Tensor):
        return None if not mask.ndim or mask.shape[-1] == 1 else mask[(None,) * (2 - mask.ndim)].any(-2)
    rows, columns = masks.positions(num_queries, device), masks.positions(num_keys, device)
    if torch.compiler.is_compiling():  # a graph must not depend on the number of blocks
        return masks.block(mask, rows, columns).any(-2)
    blocks = [masks.block(mask, rows, keys).any(-2) for keys in torch.split(columns, block_size)]
    return torch.cat(blocks, dim=-1)


def without_masked_tokens(
    tokens: Tokens | Float[Tensor, "b n c"], mask: Mask | None, num_queries: int
) -> Tokens | Float[Tensor, "b n c"]:
    """Return the tokens, with zeros for tokens to which no query attends, and for positions of such tokens only.

    Args:
        tokens: `Tokens` or a tensor. The content of tokens that are excluded by their own mask is not changed.
        mask: Key-padding mask `b n`, attention mask `b h q k`, or a rule; None if only the tokens' own mask applies.
        num_queries: Number of queries of the mask.
    """
    if mask is None:
        return _without_masked_positions(tokens)
    content, tables = (tokens.content, tokens.position_tables) if isinstance(tokens, Tokens) else (tokens, ())
    if not any(map(may_spread, (content, *tables))):
        return tokens
    grid = content.shape[1:-1]
    num_tokens = prod(grid)
    keys = attended_keys(masks.from_token_mask(mask), num_queries, num_tokens, content.device)
    if keys is None:
        return _without_masked_positions(tokens)
    while keys.ndim > 2:  # over the heads
        keys = keys.any(1)
    keys = keys[None] if keys.ndim == 1 else keys
    if tracing.always(content.shape[0] == 1):
        keys = keys.any(0, keepdim=True)
    if not _fits(keys, (content.shape[0], num_tokens), content.device):
        return tokens  # the attention raises an error that names the mask
    valid = keys.expand(-1, num_tokens).reshape(-1, *grid, 1)
    content = content.masked_fill(~valid, 0.0)
    if not isinstance(tokens, Tokens):
        return content
    valid = valid if tokens.mask is None else valid & tokens.mask.unsqueeze(-1)
    tables = tuple(_without_masked_rows(table, valid.any(0)) for table in tables)
    return Tokens(content, tables, tokens.mask, tokens.modalities)


def _without_masked_positions(tokens: Tokens | Float[Tensor, "b n c"]) -> Tokens | Float[Tensor, "b n c"]:
    """Return the tokens, with zeros in the position tables where their own mask excludes all tokens of all samples."""
    if not isinstance(tokens, Tokens) or tokens.mask is None or not any(map(may_spread, tokens.position_tables)):
        return tokens
    valid = tokens.mask.any(0).unsqueeze(-1)
    tables = tuple(_without_masked_rows(table, valid) for table in tokens.position_tables)
    return Tokens(tokens.content, tables, tokens.mask, tokens.modalities)


def _without_masked_rows(table: Float[Tensor, "*g p"], valid: Bool[Tensor, "*grid 1"]) -> Float[Tensor, "*g p"]:
    for axis, size in enumerate(table.shape[:-1]):
        if size == 1:
            valid = valid.any(axis, keepdim=True)
    return table.masked_fill(~valid, 0.0)


def finite_where_masked(x: Float[Tensor, "b n c"], mask: Mask, axis: type) -> Float[Tensor, "b n c"]:
    """Return `x`, with zeros for NaN, infinity and very large numbers in masked rows. Other values are kept.

    Args:
        x: Vectors that are queries, and also keys in self-attention.
        mask: Key-padding mask `b n` or another attention mask, of which only parts of the type `axis` are considered.
        axis: `masks.Padding` for vectors of self-attention, `masks.Queries` for queries of cross-attention.
    """
    rule = masks.from_token_mask(mask)
    for part in rule.masks if isinstance(rule, masks.And) else (rule,):
        if not isinstance(part, axis) or not isinstance(part, (masks.Padding, masks.Queries)):
            continue
        valid = part.keys if isinstance(part, masks.Padding) else part.queries
        if _fits(valid, x.shape[:2], x.device) and may_spread(x):
            x = x.where(valid.unsqueeze(-1) | (x.abs() <= _limit(x)), 0.0)
    return x


def _fits(valid: Bool[Tensor, "b n"], shape: Sequence[int], device: torch.device) -> bool:
    """Return whether a mask broadcasts to a shape. Assumed by torch.compile and export, whose sizes may be dynamic."""
    if torch.compiler.is_compiling():
        return True
    return valid.device == device and all(size in (1, full) for size, full in zip(valid.shape, shape, strict=True))


def without_masked(q: Queries, k: Keys, v: Values, allowed: Bool[Tensor, "*shape"]) -> tuple[Queries, Keys, Values]:
    """Return queries, keys and values, with zeros for those that `allowed` excludes from all attention.

    `allowed` broadcasts to `b h q k`.
    """
    if not any(map(may_spread, (q, k, v))):
        return q, k, v
    allowed = allowed[(None,) * (2 - allowed.ndim)]
    attends, attended = allowed.any(-1, keepdim=True), allowed.any(-2).unsqueeze(-1)
    return q.masked_fill(~attends, 0.0), k.masked_fill(~attended, 0.0), v.masked_fill(~attended, 0.0)


def may_spread(x: Tensor) -> bool:
    """Return whether `x` contains NaN, infinity, or numbers so large that their products could overflow.

    The values are inspected only on the CPU in eager mode. Otherwise, return True.
    """

    def is_extreme() -> bool:
        (lowest, highest), limit = x.detach().aminmax(), _limit(x)
        return not (lowest.item() >= -limit and highest.item() <= limit)  # also True for NaN

    return torch.compiler.is_compiling() or (bool(x.numel()) and checks.is_true(is_extreme, x))


def _limit(x: Tensor) -> float:
    """Return the magnitude up to which values are multiplied and normalized without overflow: 16 in float16."""
    return LARGEST if checks.product_dtype(x) != torch.float16 else torch.finfo(torch.float16).max ** 0.25
