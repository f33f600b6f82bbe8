"""Rotary positions: queries and keys are rotated by their position, so that scores depend on distances only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register


@partial(register, name="positions.half_open_exponents")
def half_open_exponents(pairs: int, like: Tensor) -> Float[Tensor, " pairs"]:
    """Return exponents 0, 1 / pairs, ... below 1, as in RoFormer and most language models.

    Example:
        >>> pc.positions.half_open_exponents(4, like=torch.zeros(())).tolist()
        [0.0, 0.25, 0.5, 0.75]

    Reference: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    return torch.arange(pairs, device=like.device, dtype=like.dtype) / pairs


@partial(register, name="positions.inclusive_exponents")
def inclusive_exponents(pairs: int, like: Tensor) -> Float[Tensor, " pairs"]:
    """Return exponents from 0 to 1, ends included, as in Perceiver AR, whose base is the context length.

    Example:
        >>> pc.positions.inclusive_exponents(5, like=torch.zeros(())).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `_make_rotation_matrices`.
    """
    return torch.arange(pairs, device=like.device, dtype=like.dtype) / max(pairs - 1, 1)


@register
class Rotary(nn.Module):
    """Rotation of neighboring pairs of channels by position x base^-exponent, applied to heads `b h n d`.

    Default positions count from the end of the sequence (the last is 0), so that queries which are the last tokens of
    a longer input have the right distances to its keys without further arguments.

    Args:
        dim: Number of channels of a head that are rotated, the others pass unchanged; all by default. It must be even.
        base: Base of the wavelengths, which range from 2 pi tokens to about 2 pi base.
        exponents: Function from a number of channel pairs, and a tensor whose dtype and device it uses, to the exponent
            of each pair: `half_open_exponents`, `inclusive_exponents`, or your own.

    Example:
        >>> pc.positions.Rotary(dim=8)(torch.randn(2, 4, 7, 16)).shape
        torch.Size([2, 4, 7, 16])

    Perceiver AR's published code rotates half of the channels of a head, here 32 of 64, in every layer:

        >>> rotary = Rotary(dim=32, base=8192, exponents=pc.positions.inclusive_exponents)

    That code numbers positions backwards from the end, so its rotations have the opposite sign, except where it takes
    positions from the data, as in cached generation.

    Reference: Su et al. 2021 (RoFormer), section 3.2.2; google-research/perceiver-ar, perceiver_ar_model.py,
    `_apply_rotary_encoding_to_subset`.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        base: float = 10_000.0,
        exponents: Callable[[int, Tensor], Tensor] = half_open_exponents,
    ) -> None:
        super().__init__()
        if dim is not None:
            checks.positive(dim=dim)
            if dim % 2:
                raise ValueError(f"dim must be even, since channels are rotated in pairs; got {dim}")
        if not base > 0:
            raise ValueError(f"base must be above 0; got {base!r}")
        self.dim, self.base, self.exponents = dim, base, exponents

    def forward(
        self, heads: Float[Tensor, "b h n d"], positions: Shaped[Tensor, "*#b n"] | None = None
    ) -> Float[Tensor, "b h n d"]:
        """Return the rotated heads.

        Args:
            heads: Queries or keys.
            positions: Position of each token, `n` or `b n`; 1 - n ... 0 by default.
        """
        dim = heads.shape[-1] if self.dim is None else self.dim
        if heads.shape[-1] < dim:
            raise ValueError(f"heads must be at least dim={dim} wide; got {heads.shape[-1]}")
        if dim % 2:
            raise ValueError(
                f"heads must have an even width, since channels are rotated in pairs; got {dim}. Give Rotary a dim"
            )
        wide = torch.promote_types(heads.dtype, torch.float32)
        rotated, passed = heads[..., :dim].to(wide), heads[..., dim:]
        if positions is None:
            positions = torch.arange(1 - heads.shape[-2], 1, device=heads.device)
        if positions.ndim not in (1, 2) or positions.shape[-1] != heads.shape[-2]:
            raise ValueError(f"positions must be n or b n with n={heads.shape[-2]}; got {tuple(positions.shape)}")
        angles = positions.to(wide)[..., None, :, None] * self.base ** -self.exponents(dim // 2, rotated)
        even, odd = rotated[..., ::2], rotated[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return torch.cat([pairs.flatten(-2).to(heads.dtype), passed], dim=-1)
