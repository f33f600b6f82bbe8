"""Sequences of a vocabulary: text, bytes, notes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks, init
from perceiver_core.positions import Fourier, FourierPerAxis, Gaussian, NeRF
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class TokenEmbedding(nn.Module):
    """Every id gets its learned vector, to which that of its position is added, if there is one.

    Args:
        vocab_size: how many different ids there are, from 0.
        dim: the width of a vector.
        positions: a module from indices `b n` to vectors `b n d`, such as `positions.LearnedEmbedding`; none unless
            given, for models that turn queries and keys (`positions.Rotary`).
        positions_include_padding: whether tokens that a mask hides have places too, so that a token's place is its
            place in the array (models of DeepMind's Perceiver IO); unless so, the first token that is there is the
            first, however much padding there is before it (Perceiver AR).

    Raises:
        TypeError: positions that take no indices.
        ValueError: positions of another width.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> text = pc.adapters.TokenEmbedding(vocab_size=256, dim=32, positions=pc.positions.LearnedEmbedding(100, dim=32))
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
        """How long a sequence may be; None where there is no limit."""
        return getattr(self.positions, "length", None)

    def forward(
        self,
        ids: Shaped[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "*#b n"] | None = None,
    ) -> Tokens:
        """The tokens.

        Args:
            ids: whole numbers of any integer dtype.
            mask: which tokens are there, True = attend. Positions count these, unless `positions_include_padding`.
            positions: the index of each token in its sequence, `n` or `b n`, if not counted from the first on.

        Raises:
            TypeError: ids that are not whole numbers, a mask that is not boolean.
            ValueError: ids outside the vocabulary or another shape, a sequence longer than there are positions, a mask
                that leaves a sample no token.
        """
        checks.ids("ids", ids, self.vocab_size)
        if mask is not None:
            checks.is_mask("mask", mask, ids.shape)
            checks.leaves_a_token(mask)
        content = F.embedding(ids.long(), self.vectors)
        if self.positions is not None:
            if positions is None:
                positions = self._counted(ids, mask)
            content = content + self.positions(positions)
        return Tokens(content, mask=mask)

    def _counted(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if self.length is not None and ids.shape[1] > self.length:
            raise ValueError(
                f"ids must be at most {self.length} long, as many as there are positions; got {ids.shape[1]}. Give the "
                "last ones, or make more positions"
            )
        if mask is None or self.positions_include_padding:
            return torch.arange(ids.shape[1], device=ids.device)
        return (mask.long().cumsum(1) - 1).clamp(min=0)


def _takes_indices(positions: object) -> bool:
    takes_points = isinstance(positions, (Fourier, FourierPerAxis, NeRF, Gaussian))
    return isinstance(positions, nn.Module) and type(positions).forward is not nn.Module.forward and not takes_points
