"""Tokens: the output of an adapter and the input of cross-attention.

Position features are stored separately from the content (such as pixel values), as a few small tables that broadcast
over the grid. The sum of the tables gives the position features of every token. For example, a 224 x 224 image has two
tables of 224 rows instead of 50,176 position vectors per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree

from perceiver_core import checks


class _Fields(tuple[Any, ...]):
    """Tuple of the fields of `Tokens`, like a named tuple, but compared by identity."""

    _fields = ("content", "position_tables", "mask", "modalities")

    def __new__(cls, content: Any, position_tables: Any = (), mask: Any = None, modalities: Any = None) -> _Fields:
        return super().__new__(cls, (content, position_tables, mask, modalities))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))

    __eq__, __ne__ = object.__eq__, object.__ne__
    __hash__ = object.__hash__


if TYPE_CHECKING:
    _Base = object
else:
    # Backward hooks, and tools such as torchinfo, find tensors in tuples but not in other objects. Older versions of
    # torch.compile, such as that of PyTorch 2.6, cannot construct a subclass of tuple.
    _Base = _Fields if torch.__version__ >= (2, 13) else object


@dataclass(frozen=True, eq=False)
class Tokens(_Base):
    """Batch of tokens on a grid, stored as content, position tables and a mask.

    The position features of a token are the *sum* of the position tables, broadcast over the grid. Fourier features
    have one table per grid axis, each nonzero only in its own channels, so the sum equals the concatenation in
    the paper. Learned positions are a single table over the whole grid. The complete token vectors, as returned by
    `materialize`, are `[content, positions]`.

    Args:
        content: Features of the tokens without positions, `b *grid c`.
        position_tables: Tables of position features, `*g p`. Each axis of `g` has size 1 or the size of the grid axis,
            and all tables have the same width `p`.
        mask: Boolean mask `b *grid`, True = attend. Values of masked tokens are ignored, even NaN.
        modalities: If the tokens are a concatenation of several modalities, a dictionary from modality names to the
            tokens of the modality on their own grid, or to None for an absent modality. `adapters.Multimodal` sets this
            dictionary. Attention does not use it.

    Raises:
        TypeError: If the content is not floating point, or the mask is not boolean.
        ValueError: If the content is empty, a table does not broadcast over the grid, or the mask has the wrong shape.

    Example:
        >>> rows, columns = torch.randn(5, 1, 6), torch.randn(1, 7, 6)
        >>> tokens = pc.Tokens(torch.randn(2, 5, 7, 3), position_tables=(rows, columns))
        >>> tokens.grid, tokens.dim, tokens.materialize().shape
        ((5, 7), 9, torch.Size([2, 35, 9]))
    """

    content: Float[Tensor, "b *grid c"]
    position_tables: tuple[Float[Tensor, "... p"], ...] = ()
    mask: Bool[Tensor, " b *grid"] | None = None
    modalities: Mapping[str, Tokens | None] | None = None

    def __post_init__(self) -> None:
        content = self.content
        if not isinstance(content, Tensor) or not content.is_floating_point():
            checks.is_floating("content", content)
        if content.ndim < 3:
            raise ValueError(f"content must have at least 3 axes (b *grid c); got shape {tuple(content.shape)}")
        if 0 in content.shape[1:]:
            checks.not_empty("content", content)
        if type(self.position_tables) is not tuple or self.position_tables:
            self._check_tables()
        if self.mask is not None:
            checks.is_mask("mask", self.mask, content.shape[:-1])
            if self.mask.device != content.device:
                raise ValueError(f"mask is on {self.mask.device}, content on {content.device}; move one")

    def _check_tables(self) -> None:
        if not isinstance(self.position_tables, (tuple, list)):
            raise TypeError(f"position_tables must be a tuple of tensors; got {type(self.position_tables).__name__}")
        grid, device = self.content.shape[1:-1], self.content.device
        for table in self.position_tables:
            if not isinstance(table, Tensor) or not table.ndim:
                raise TypeError(f"position_tables must be tensors *g p; got {table!r:.80}")
            if table.device != device:
                raise ValueError(f"position_tables must be on {device}, as the content; got a table on {table.device}")
        if not self.position_tables:
            return
        width = self.position_tables[0].shape[-1]
        for table in self.position_tables:
            *sizes, own_width = table.shape
            if (
                len(sizes) != len(grid)
                or own_width != width
                or any(size != 1 and size != full for size, full in zip(sizes, grid, strict=True))
            ):
                raise ValueError(
                    f"position_tables must each broadcast over the grid {tuple(grid)} and have one width; "
                    f"got shapes {[tuple(t.shape) for t in self.position_tables]}"
                )

    @property
    def grid(self) -> tuple[int, ...]:
        """Size of each grid axis."""
        return tuple(self.content.shape[1:-1])

    @property
    def device(self) -> torch.device:
        """Device of the content."""
        return self.content.device

    @property
    def num_tokens(self) -> int:
        """Number of tokens per sample."""
        return prod(self.content.shape[1:-1])

    @property
    def dim(self) -> int:
        """Total width of the content and the position features."""
        return self.content.shape[-1] + (self.position_tables[0].shape[-1] if self.position_tables else 0)

    def to(self, *args: Any, **kwargs: Any) -> Tokens:
        """Return the tokens on another device or in another dtype, with the arguments of `torch.Tensor.to`.

        Masks stay boolean.
        """
        content = self.content.to(*args, **kwargs)
        tables = tuple([table.to(*args, **kwargs) for table in self.position_tables])
        mask = None if self.mask is None else self.mask.to(content.device)
        parts = (self.modalities or {}).items()
        modalities = {name: None if part is None else part.to(*args, **kwargs) for name, part in parts}
        return Tokens(content, tables, mask, modalities or None)

    def positions(self) -> Float[Tensor, "*grid p"] | None:
        """Return the position features of every token, or None if there are no position tables."""
        if not self.position_tables:
            return None
        total = sum(self.position_tables[1:], start=self.position_tables[0])
        return total.expand(*self.content.shape[1:-1], total.shape[-1])

    def flat_mask(self) -> Bool[Tensor, "b n"] | None:
        """Return the mask with the grid axes flattened, or None if there is no mask."""
        return None if self.mask is None else self.mask.flatten(1)

    def materialize(self) -> Float[Tensor, "b n dim"]:
        """Return the vectors `[content, positions]` of all tokens. For masked tokens, the content is zero."""
        content = self.content
        if self.mask is not None:
            content = content.masked_fill(~self.mask.unsqueeze(-1), 0.0)
        positions = self.positions()
        if positions is not None:
            shared = positions.to(content).expand(content.shape[0], *positions.shape)
            content = torch.cat([content, shared], dim=-1)
        return content.flatten(1, -2)


def _flatten(tokens: Tokens) -> tuple[list[Any], list[str]]:
    """Return the values of the fields that are not None, and their names."""
    names = [name for name in _Fields._fields if getattr(tokens, name) is not None]
    return [getattr(tokens, name) for name in names], names


def _flatten_with_keys(tokens: Tokens) -> tuple[list[tuple[Any, Any]], list[str]]:
    values, names = _flatten(tokens)
    return [(_pytree.GetAttrKey(name), value) for name, value in zip(names, values, strict=True)], names


def _unflatten(values: Iterable[Any], names: list[str]) -> Tokens:
    """Build `Tokens` without checks, because functions such as `tree_map` replace tensors with other objects."""
    fields = dict.fromkeys(_Fields._fields) | dict(zip(names, values, strict=True))
    tokens = _Base.__new__(Tokens) if _Base is object else _Base.__new__(Tokens, *fields.values())
    for name, value in fields.items():
        object.__setattr__(tokens, name, value)
    return tokens


# For torch.func, torch.export, FSDP2 and others, which look for tensors in arguments and outputs.
_pytree.register_pytree_node(
    Tokens,
    _flatten,
    _unflatten,
    serialized_type_name="perceiver_core.Tokens",
    flatten_with_keys_fn=_flatten_with_keys,
)
fx_pytree.register_pytree_flatten_spec(Tokens, lambda tokens, _: _flatten(tokens)[0])  # for exported programs
