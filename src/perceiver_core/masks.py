"""Masks: who may attend to whom. True = attend.

A mask is a boolean tensor that broadcasts to `b h q k`, or a function of query and key positions, which need not
be written out whole: a kernel asks for the block it works on, `chunked` for a piece at a time, the others for all
of it. Positions count from the end of the sequence (the last is -1), so a few queries at the end of a long input
(Perceiver AR) line up with its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from perceiver_core import checks

Rule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Mask: TypeAlias = Tensor | Rule


@dataclass(frozen=True, eq=False)
class Padding:
    """Attend to keys that are there.

    Args:
        keys: `b n`, True where the key is a token, False where it is padding.

    Example:
        >>> import torch
        >>> from perceiver_core import masks
        >>> masks.materialize(masks.Padding(torch.tensor([[True, True, False]])), queries=2, keys=3).shape
        torch.Size([1, 1, 1, 3])
    """

    keys: Bool[Tensor, "b n"]

    def __post_init__(self) -> None:
        _check_axes("keys", self.keys)

    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "b 1 1 #k"]:
        """The block of the mask for these positions."""
        return block(self.keys[:, None, None, :], queries, keys)


@dataclass(frozen=True, eq=False)
class Queries:
    """Let only these queries attend; the others give zeros.

    Args:
        queries: `b q`, True where the query is wanted.
    """

    queries: Bool[Tensor, "b q"]

    def __post_init__(self) -> None:
        _check_axes("queries", self.queries)

    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "b 1 #q 1"]:
        """The block of the mask for these positions."""
        return block(self.queries[:, None, :, None], queries, keys)


@dataclass(frozen=True)
class Causal:
    """Attend to no later position. With fewer queries than keys, the last ones line up.

    Example:
        >>> from perceiver_core import masks
        >>> masks.materialize(masks.Causal(), queries=2, keys=3).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """

    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "q k"]:
        """The block of the mask for these positions."""
        return keys[None, :] <= queries[:, None]


@dataclass(frozen=True)
class Window:
    """Attend to positions from `before` earlier to `after` later, itself included.

    Example:
        >>> from perceiver_core import masks
        >>> masks.materialize(masks.Window(before=1, after=0), queries=3, keys=3).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    before: int
    after: int

    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "q k"]:
        """The block of the mask for these positions."""
        ahead = keys[None, :] - queries[:, None]
        return (ahead >= -self.before) & (ahead <= self.after)


@dataclass(frozen=True, eq=False)
class And:
    """What all masks allow; `and_` makes one."""

    masks: tuple[Mask, ...]

    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, " ..."]:
        """The block of the mask for these positions."""
        allowed = block(self.masks[0], queries, keys)
        for mask in self.masks[1:]:
            allowed = allowed & block(mask, queries, keys)
        return allowed


@dataclass(frozen=True, eq=False)
class Or:
    """What any mask allows; `or_` makes one."""

    masks: tuple[Mask, ...]

    def __call__(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, " ..."]:
        """The block of the mask for these positions."""
        allowed = block(self.masks[0], queries, keys)
        for mask in self.masks[1:]:
            allowed = allowed | block(mask, queries, keys)
        return allowed


def and_(*masks: Mask | None) -> Mask | None:
    """Attend where all masks allow it. None stands for "everything"; all None gives None.

    Example:
        >>> from perceiver_core import masks
        >>> band = masks.and_(masks.Causal(), masks.Window(before=1, after=1))
        >>> masks.materialize(band, queries=3, keys=3).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    given = tuple(mask for mask in masks if mask is not None)
    return And(given) if len(given) > 1 else (given[0] if given else None)


def or_(*masks: Mask) -> Mask:
    """Attend where any mask allows it.

    Example:
        >>> from perceiver_core import masks
        >>> either = masks.or_(masks.Window(0, 0), masks.Window(-1, 1))
        >>> masks.materialize(either, queries=3, keys=3).int().tolist()
        [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    """
    if not masks:
        raise ValueError("or_ needs at least one mask; got none")
    return Or(masks) if len(masks) > 1 else masks[0]


def positions(size: int, device: torch.device | None = None) -> Int[Tensor, " n"]:
    """The positions of `size` tokens, counted from the end: -size ... -1."""
    return torch.arange(-size, 0, device=device)


def block(mask: Mask, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, " ..."]:
    """The part of a mask for some queries and keys, given by their positions; broadcasts to `b h q k`.

    Raises:
        TypeError: a mask that is not boolean.
    """
    if not isinstance(mask, Tensor):
        allowed = mask(queries, keys)
        checks.is_mask("mask", allowed)
        return allowed
    checks.is_mask("mask", mask)
    mask = mask[(None,) * (2 - mask.ndim)]
    rows = queries if mask.shape[-2] != 1 else queries.new_zeros(1)
    columns = keys if mask.shape[-1] != 1 else keys.new_zeros(1)
    return mask[..., rows[:, None], columns]


def materialize(mask: Mask, *, queries: int, keys: int, device: torch.device | None = None) -> Bool[Tensor, " ..."]:
    """The whole mask for so many queries and keys; broadcasts to `b h q k`.

    Raises:
        TypeError: a mask that is not boolean.
    """
    if not isinstance(mask, Tensor):
        return block(mask, positions(queries, device), positions(keys, device))
    checks.is_mask("mask", mask)
    return mask


def fits(mask: Mask, q: Tensor, k: Tensor) -> None:
    """Raises unless a mask can be laid over `q` and `k`, on the same device.

    Raises:
        TypeError: a tensor that is not boolean.
        ValueError: a tensor that does not broadcast to `b h q k`, or lies on another device.
    """
    wanted = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for tensor, shape in _tensors(mask, wanted):
        checks.is_mask("mask", tensor)
        if tensor.device != q.device:
            raise ValueError(f"mask is on {tensor.device}, the queries on {q.device}; move one: .to({str(q.device)!r})")
        ends = shape[len(shape) - tensor.ndim :]  # the axes that it has
        if tensor.ndim > len(shape) or not all(
            size in (1, full) for size, full in zip(tensor.shape, ends, strict=True)
        ):
            raise ValueError(f"mask must broadcast to {shape}; got shape {tuple(tensor.shape)}")


def _check_axes(name: str, mask: Tensor) -> None:
    checks.is_mask(name, mask)
    if mask.ndim != 2:
        raise ValueError(f"{name} must have 2 axes, one row a sample; got shape {tuple(mask.shape)}")


def taken_apart(mask: Mask | None) -> tuple[tuple[Rule, ...], tuple[Tensor, ...]]:
    """A mask as rules and tensors that all have to allow: what hides in `Padding`, `Queries` and `And` comes out."""
    if mask is None:
        return (), ()
    if isinstance(mask, Tensor):
        return (), (mask,)
    if isinstance(mask, Padding):
        return (), (mask.keys[:, None, None, :],)
    if isinstance(mask, Queries):
        return (), (mask.queries[:, None, :, None],)
    if isinstance(mask, And):
        parts = [taken_apart(part) for part in mask.masks]
        return tuple(r for rules, _ in parts for r in rules), tuple(t for _, tensors in parts for t in tensors)
    return (mask,), ()


def of_tokens(mask: Mask | None) -> Mask | None:
    """A mask as modules take it: a tensor of two axes says which tokens are there, `b n`.

    Raises:
        ValueError: a tensor of other than two or four axes, which could mean several things.
    """
    if not isinstance(mask, Tensor) or mask.ndim == 4:
        return mask
    if mask.ndim != 2:
        raise ValueError(f"mask must be b n (which tokens are there) or b h q k; got shape {tuple(mask.shape)}")
    return Padding(mask)


def _tensors(mask: Mask, shape: tuple[int, int, int, int]) -> list[tuple[Tensor, tuple[int, ...]]]:
    batch, _, queries, keys = shape
    if isinstance(mask, Tensor):
        return [(mask, shape)]
    if isinstance(mask, Padding):
        return [(mask.keys, (batch, keys))]
    if isinstance(mask, Queries):
        return [(mask.queries, (batch, queries))]
    if isinstance(mask, (And, Or)):
        return [pair for part in mask.masks for pair in _tensors(part, shape)]
    return []
