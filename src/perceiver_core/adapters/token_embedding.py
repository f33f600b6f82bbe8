"""Sequences of token ids: text, bytes, musical notes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.layers import init
from perceiver_core.positions import Gaussian, LearnedGrid, Projected
from perceiver_core.positions.fourier import SeparableFeatures
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class TokenEmbedding(nn.Module):
    """Adapter for token ids: a learned vector per id, plus the vector of its position, if there are positions.

    Args:
        vocab_size: Number of ids.
        dim: Width of a vector.
        positions: Module from indices `b n` to vectors of width `dim`, such as `positions.LearnedEmbedding`; none by
            default, for models with rotary positions (`positions.Rotary`).
        positions_include_padding: Whether positions count masked tokens too, so that a token's position is its index in
            the array (as in DeepMind's Perceiver IO). By default the first valid token has position 0, after any
            padding (as in Perceiver AR).

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> positions = pc.positions.LearnedEmbedding(100, dim=32)
        >>> text = pc.adapters.TokenEmbedding(vocab_size=256, dim=32, positions=positions)
        >>> text(torch.tensor([list(b"a b c")])).content.shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self, vocab_size: int, dim: int, *, positions: nn.Module | None = None, positions_include_padding: bool = False
    ) -> None:
        super().__init__()
        checks.positive(vocab_size=vocab_size, dim=dim)
        if positions is not None and not _takes_indices(positions):
            raise TypeError(
                f"positions must be a module from indices to vectors, as positions.LearnedEmbedding; got {positions!r}"
            )
        if positions is not None and getattr(positions, "dim", dim) != dim:
            raise ValueError(f"positions must be dim={dim} wide, they are added; got {positions.dim}")
        self.vocab_size, self.dim = vocab_size, dim
        self.vectors = init.embedding(vocab_size, dim)
        self.positions, self.positions_include_padding = positions, positions_include_padding

    @property
    def length(self) -> int | None:
        """Maximum length of a sequence; None for no limit."""
        return getattr(self.positions, "length", None)

    def forward(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "*#b n"] | None = None,
    ) -> Tokens:
        """Return the tokens.

        Args:
            ids: Ids of any integer dtype.
            mask: Valid tokens, True = attend. Positions count these, unless `positions_include_padding`.
            positions: Position of each token in its sequence, `n` or `b n`; counted from the first token by default.

        Raises:
            ValueError: Ids outside the vocabulary, a sequence longer than the positions, a sample without valid tokens.
        """
        checks.ids("ids", ids, self.vocab_size)
        if mask is not None:
            checks.is_mask("mask", mask, ids.shape)
            checks.leaves_a_token(mask)
        content = F.embedding(ids.long(), self.vectors)
        if self.positions is not None:
            content = content + self.positions(self._default_positions(ids, mask) if positions is None else positions)
        return Tokens(content, mask=mask)

    def _default_positions(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if self.length is not None and ids.shape[1] > self.length:
            raise ValueError(
                f"ids must be at most {self.length} long, the number of positions; got {ids.shape[1]}. Pass the last "
                "ones only, or build more positions"
            )
        if mask is None or self.positions_include_padding:
            return torch.arange(ids.shape[1], device=ids.device)
        return (mask.long().cumsum(1) - 1).clamp(min=0)


def _takes_indices(positions: object) -> bool:
    takes_others = isinstance(positions, (SeparableFeatures, Gaussian, LearnedGrid, Projected))  # points or grids
    return isinstance(positions, nn.Module) and type(positions).forward is not nn.Module.forward and not takes_others
