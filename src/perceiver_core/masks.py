"""Attention masks (True = attend), as boolean tensors or as rules.

A mask is a boolean tensor that broadcasts to `b h q k`, or a rule: a function that computes such a tensor from query
and key positions. The kernel `chunked` evaluates a rule one chunk at a time; most other kernels materialize the mask.
Positions are negative and counted from the end, so the last query and the last key are both at -1. This aligns queries
and keys in Perceiver AR, where the queries are the last tokens of a longer input.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from perceiver_core import argument_types, checks
from perceiver_core.argument_errors import explained

T = TypeVar("T")
Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Mask: TypeAlias = Tensor | Rule


@dataclass(frozen=True, eq=False)
class Padding:
    """Key-padding mask: queries attend to valid keys only.

    Args:
        keys: Boolean tensor `b n`, True for valid keys and False for padding.

    Example:
        >>> pc.masks.materialize(pc.masks.Padding(torch.tensor([[True, True, False]])), queries=2, keys=3).shape
        torch.Size([1, 1, 1, 3])
    """

    keys: Bool[Tensor, "b n"]

    def __post_init__(self) -> None:
        _check_axes("keys", self.keys)

    @explained
    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "b 1 1 #k"]:
        """Return the mask for queries and keys at these positions."""
        return block(self.keys[:, None, None, :], queries, keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Padding:
        """Return the mask on another device."""
        return Padding(self.keys.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class Queries:
    """Query mask: only valid queries attend. The attention output of all other queries is zero.

    Args:
        queries: Boolean tensor `b q`, True for valid queries.
    """

    queries: Bool[Tensor, "b q"]

    def __post_init__(self) -> None:
        _check_axes("queries", self.queries)

    @explained
    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "b 1 #q 1"]:
        """Return the mask for queries and keys at these positions."""
        return block(self.queries[:, None, :, None], queries, keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Queries:
        """Return the mask on another device."""
        return Queries(self.queries.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Causal:
    """Causal mask: queries do not attend to later positions. The last query is aligned with the last key.

    Example:
        >>> pc.masks.materialize(pc.masks.Causal(), queries=2, keys=3).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    @explained
    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "q k"]:
        """Return the mask for queries and keys at these positions."""
        return keys[None, :] <= queries[:, None]


@dataclass(frozen=True)
class Window:
    """Sliding-window mask: a query attends to keys at most `before` positions earlier and `after` positions later.

    Example:
        >>> pc.masks.materialize(pc.masks.Window(before=1, after=0), queries=3, keys=3).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    before: int
    after: int

    def __post_init__(self) -> None:
        argument_types.check_fields(self)

    @explained
    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "q k"]:
        """Return the mask for queries and keys at these positions."""
        ahead = keys[None, :] - queries[:, None]
        return (ahead >= -self.before) & (ahead <= self.after)


@dataclass(frozen=True, eq=False)
class And:
    """Intersection of masks: a query attends to the keys that all masks allow. Build it with `and_`."""

    masks: tuple[Mask, ...]

    @explained
    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, " ..."]:
        """Return the mask for queries and keys at these positions."""
        return reduce(operator.and_, [block(mask, queries, keys) for mask in self.masks])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> And:
        """Return the masks on another device."""
        return And(tuple([moved(mask, device, non_blocking=non_blocking) for mask in self.masks]))


@dataclass(frozen=True, eq=False)
class Or:
    """Union of masks: a query attends to the keys that at least one mask allows. Build it with `or_`."""

    masks: tuple[Mask, ...]

    @explained
    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, " ..."]:
        """Return the mask for queries and keys at these positions."""
        return reduce(operator.or_, [block(mask, queries, keys) for mask in self.masks])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Or:
        """Return the masks on another device."""
        return Or(tuple([moved(mask, device, non_blocking=non_blocking) for mask in self.masks]))


def moved(x: T, device: torch.device | str, **options: bool) -> T:
    """Move a mask or another object to a device. Objects without a method `to`, such as `Causal`, are unchanged."""
    return cast(T, cast(Any, x).to(device, **options)) if hasattr(x, "to") else x


def and_(*masks: Mask | None) -> Mask | None:
    """Return the intersection of masks. Masks that are None are skipped; if all are None, the result is None.

    Example:
        >>> band = pc.masks.and_(pc.masks.Causal(), pc.masks.Window(before=1, after=1))
        >>> pc.masks.materialize(band, queries=3, keys=3).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    given = tuple(mask for mask in masks if mask is not None)
    return And(given) if len(given) > 1 else (given[0] if given else None)


def or_(*masks: Mask) -> Mask:
    """Return the union of one or more masks.

    Example:
        >>> either = pc.masks.or_(pc.masks.Window(0, 0), pc.masks.Window(-1, 1))
        >>> pc.masks.materialize(either, queries=3, keys=3).int().tolist()
        [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    """
    if not masks:
        raise ValueError("or_ needs at least one mask; got none")
    return Or(masks) if len(masks) > 1 else masks[0]


def positions(size: int, device: torch.device | None = None) -> Int[Tensor, " n"]:
    """Return the positions of `size` tokens, counted from the end: -size ... -1."""
    return torch.arange(-size, 0, device=device)


def block(mask: Mask, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, " ..."]:
    """Evaluate a mask for the queries and keys at some positions (negative, counted from the end).

    `queries` and `keys` contain the positions. The result broadcasts to `b h q k`, where q and k are the numbers of
    positions.

    Raises:
        TypeError: If the mask is not boolean, or the positions are not integers.
    """
    if not isinstance(mask, Tensor):
        allowed = mask(queries, keys)
        checks.is_mask("mask", allowed)
        return allowed
    checks.is_mask("mask", mask)
    rows, columns = checks.whole_numbers("queries", queries), checks.whole_numbers("keys", keys)
    mask = mask[(None,) * (2 - mask.ndim)]
    rows = rows if mask.shape[-2] != 1 else rows.new_zeros(1)
    columns = columns if mask.shape[-1] != 1 else columns.new_zeros(1)
    return mask[..., rows[:, None], columns]


@explained
def materialize(mask: Mask, *, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, " ..."]:
    """Return a mask as a boolean tensor that broadcasts to `b h q k`, for these numbers of queries and keys.

    Raises:
        TypeError: If the mask is not boolean.
        ValueError: If `queries` or `keys` is not a whole number of at least 0.
    """
    argument_types.sizes(queries=queries, keys=keys)
    if not isinstance(mask, Tensor):
        return block(mask, positions(queries, device), positions(keys, device))
    checks.is_mask("mask", mask)
    return mask


def check_broadcast(mask: Mask, q: Tensor, k: Tensor) -> None:
    """Check that each tensor in a mask broadcasts to the attention scores of `q` and `k`, and is on the device of `q`.

    Raises:
        TypeError: If a tensor is not boolean.
        ValueError: If a tensor does not broadcast to `b h q k`, or is on a different device.
    """
    shape: tuple[int, ...] = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for part in mask.masks if isinstance(mask, (And, Or)) else ():
        check_broadcast(part, q, k)
    if isinstance(mask, Padding):
        mask, shape = mask.keys, (q.shape[0], k.shape[2])
    elif isinstance(mask, Queries):
        mask, shape = mask.queries, (q.shape[0], q.shape[2])
    if not isinstance(mask, Tensor):
        return
    checks.is_mask("mask", mask)
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, the queries on {q.device}; move one: .to({str(q.device)!r})")
    ends = shape[len(shape) - mask.ndim :]  # sizes of the last mask.ndim axes
    if mask.ndim > len(shape) or any(size not in (1, full) for size, full in zip(mask.shape, ends, strict=True)):
        raise ValueError(f"mask must broadcast to {shape}; got shape {tuple(mask.shape)}")


def _check_axes(name: str, mask: Tensor) -> None:
    checks.is_mask(name, mask)
    if mask.ndim != 2:
        raise ValueError(f"{name} must have 2 axes, one row a sample; got shape {tuple(mask.shape)}")


def split(mask: Mask | None) -> tuple[tuple[Rule, ...], tuple[Tensor, ...]]:
    """Split a mask into rules and boolean tensors whose intersection equals the mask.

    `Padding` and `Queries` are converted to tensors. `And` is split recursively. `Or` is kept as a rule.
    """
    if mask is None:
        return (), ()
    if isinstance(mask, Tensor):
        return (), (mask,)
    if isinstance(mask, Padding):
        return (), (mask.keys[:, None, None, :],)
    if isinstance(mask, Queries):
        return (), (mask.queries[:, None, :, None],)
    if isinstance(mask, And):
        parts = [split(part) for part in mask.masks]
        return tuple(r for rules, _ in parts for r in rules), tuple(t for _, tensors in parts for t in tensors)
    return (mask,), ()


def from_token_mask(mask: Mask | None) -> Mask | None:
    """Wrap a key-padding mask `b n` in `Padding`. Return any other mask (`b h q k`, a rule or None) unchanged.

    Raises:
        ValueError: If `mask` is a tensor that has neither two nor four axes.
    """
    if not isinstance(mask, Tensor) or mask.ndim == 4:
        return mask
    checks.is_mask("mask", mask)
    if mask.ndim != 2:
        raise ValueError(f"mask must be b n (valid tokens) or b h q k; got shape {tuple(mask.shape)}")
    return Padding(mask)
