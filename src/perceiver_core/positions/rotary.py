"""Rotary positions: queries and keys are turned by their position, so scores depend on distances only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register


@register
class Rotary(nn.Module):
    """Turns neighboring pairs of channels by position x base^(-2i / dim). A callable on heads `b h n d`.

    Positions count from the end of the sequence (the last is 0), so that queries which are the last
    tokens of a longer input meet its keys at the right distance without being told where they stand.

    Args:
        dim: how many channels of a head are turned; the rest pass unchanged.
        base: the longest wavelength is 2 pi base^(1 - 2 / dim) tokens.

    Raises:
        ValueError: an odd dim, or (in forward) heads narrower than dim.

    Example:
        >>> import torch
        >>> from perceiver_core.positions import Rotary
        >>> Rotary(dim=8)(torch.randn(2, 4, 7, 16)).shape
        torch.Size([2, 4, 7, 16])

    Reference: Su et al. 2021 (RoFormer), section 3.2.2.
    """

    def __init__(self, dim: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        checks.positive(dim=dim)
        if dim % 2:
            raise ValueError(f"dim must be even, channels are turned in pairs; got {dim}")
        self.dim, self.base = dim, base

    def forward(
        self, heads: Float[Tensor, "b h n d"], positions: Shaped[Tensor, "*#b n"] | None = None
    ) -> Float[Tensor, "b h n d"]:
        """The heads, turned.

        Args:
            heads: queries or keys.
            positions: where each token stands, `n` or `b n`, if not one after the other up to the end.
        """
        if heads.shape[-1] < self.dim:
            raise ValueError(f"heads must be at least dim={self.dim} wide; got {heads.shape[-1]}")
        wide = torch.promote_types(heads.dtype, torch.float32)
        if positions is None:
            positions = torch.arange(1 - heads.shape[-2], 1, device=heads.device)
        if positions.ndim not in (1, 2) or positions.shape[-1] != heads.shape[-2]:
            raise ValueError(f"positions must be n or b n with n={heads.shape[-2]}; got {tuple(positions.shape)}")
        exponents = torch.arange(0, self.dim, 2, device=heads.device, dtype=wide) / self.dim
        angles = positions.to(wide)[..., None, :, None] * self.base**-exponents
        turned, kept = heads[..., : self.dim].to(wide), heads[..., self.dim :]
        even, odd = turned[..., ::2], turned[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return torch.cat([pairs.flatten(-2).to(heads.dtype), kept], dim=-1)
