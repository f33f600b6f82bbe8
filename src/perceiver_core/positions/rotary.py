"""Rotary embeddings: rotations of queries and keys that make attention scores depend on relative positions only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from perceiver_core import argument_types, checks
from perceiver_core.argument_errors import explained
from perceiver_core.registry import register

SMALLEST_BASE = 1e-20  # With a smaller base, angles might overflow in float32, where they are computed.


@partial(register, name="positions.half_open_exponents")
@explained
def half_open_exponents(pairs: int, like: Tensor) -> Float[Tensor, " pairs"]:
    """Return the `Rotary` exponents 0, 1 / pairs, ..., (pairs - 1) / pairs, as in most language models.

    Example:
        >>> pc.positions.half_open_exponents(4, like=torch.zeros(())).tolist()
        [0.0, 0.25, 0.5, 0.75]

    Reference: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    argument_types.sizes(least=1, pairs=pairs)
    return torch.arange(pairs, device=like.device, dtype=like.dtype) / pairs


@partial(register, name="positions.inclusive_exponents")
@explained
def inclusive_exponents(pairs: int, like: Tensor) -> Float[Tensor, " pairs"]:
    """Return evenly spaced `Rotary` exponents from 0 to 1, endpoints included, as in Perceiver AR.

    Perceiver AR sets the base to the context length.

    Example:
        >>> pc.positions.inclusive_exponents(5, like=torch.zeros(())).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]

    Reference: google-research/perceiver-ar, perceiver_ar_model.py, `_make_rotation_matrices`.
    """
    argument_types.sizes(least=1, pairs=pairs)
    return torch.arange(pairs, device=like.device, dtype=like.dtype) / max(pairs - 1, 1)


@register
class Rotary(nn.Module):
    """Rotary embedding of heads `b h n d`: rotates adjacent channel pairs by the angle position * base^-exponent.

    By default, the last token has position 0, the token before it -1, and so on. If the queries are the last tokens of
    a longer input, their distances to the keys are therefore correct without explicit positions. For cross-attention
    to inputs that are padded at the end, set `from_end=False`.

    Args:
        dim: Number of channels to rotate in each head, even; None for all. The other channels are unchanged.
        base: Base of the frequencies base^-exponent. Wavelengths range from 2 pi to about 2 pi * base tokens.
        from_end: Whether the default positions end at 0 for the last token: ..., -2, -1, 0. If False, they start at 0
            for the first token, so padding at the end of an input does not change them.
        exponents: Function `(pairs, like) -> exponents` that returns the exponent of each channel pair in the dtype and
            on the device of `like`: `half_open_exponents`, `inclusive_exponents` or a custom function.

    Example:
        >>> pc.positions.Rotary(dim=8)(torch.randn(2, 4, 7, 16)).shape
        torch.Size([2, 4, 7, 16])

    Perceiver AR's published configuration rotates half of the channels of each head in every layer, here 32 of 64:

        >>> rotary = Rotary(dim=32, base=8192, exponents=pc.positions.inclusive_exponents)

    If neither `use_positions_from_data` nor `use_negative_rotary_positions` is set, the published code uses the
    positions n - 1, ..., 0 instead of 1 - n, ..., 0. The rotations then have the opposite sign.

    Reference: Su et al. 2021 (RoFormer), section 3.2.2; google-research/perceiver-ar, perceiver_ar_model.py,
    `_apply_rotary_encoding_to_subset`.
    """

    def __init__(
        self,
        dim: int | None = None,
        *,
        base: float = 10_000.0,
        from_end: bool = True,
        exponents: Callable[[int, Tensor], Tensor] = half_open_exponents,
    ) -> None:
        super().__init__()
        if dim is not None:
            checks.positive(dim=dim)
            if dim % 2:
                raise ValueError(f"dim must be even, since channels are rotated in pairs; got {dim}")
        if not base >= SMALLEST_BASE:
            raise ValueError(f"base must be at least {SMALLEST_BASE}; got {base!r}")
        self.dim, self.base, self.from_end, self.exponents = dim, base, from_end, exponents

    def forward(
        self, heads: Float[Tensor, "b h n d"], positions: Shaped[Tensor, "*#b n"] | None = None
    ) -> Float[Tensor, "b h n d"]:
        """Apply the rotary embedding to queries or keys.

        Args:
            heads: Queries or keys of all heads.
            positions: Token positions, `n` or `b n`; consecutive integers by default (see `from_end`).
        """
        dim = heads.shape[-1] if self.dim is None else self.dim
        if misfit := _misfit(dim, heads.shape[-1]):
            raise ValueError(f"heads must {misfit}")
        wide = torch.promote_types(heads.dtype, torch.float32)
        rotated, passed = heads[..., :dim].to(wide), heads[..., dim:]
        if positions is None:
            positions = torch.arange(heads.shape[-2], device=heads.device)
            positions = positions - (heads.shape[-2] - 1) if self.from_end else positions
        checks.is_real("positions", positions)
        if positions.ndim not in (1, 2) or positions.shape[-1] != heads.shape[-2]:
            raise ValueError(f"positions must be n or b n with n={heads.shape[-2]}; got {tuple(positions.shape)}")
        angles = positions.to(wide)[..., None, :, None] * self.base ** -self.exponents(dim // 2, rotated)
        even, odd = rotated[..., ::2], rotated[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return torch.cat([pairs.flatten(-2).to(heads.dtype), passed], dim=-1)


def check_rotated_heads(rotary: nn.Module, num_heads: int, width: int) -> None:
    """Check that heads of a width fit their rotary embedding, if it is a `Rotary`.

    Raises:
        ValueError: If the heads are narrower than the rotated channels, or all channels are rotated and the number of
            channels is odd.
    """
    if isinstance(rotary, Rotary) and (misfit := _misfit(width if rotary.dim is None else rotary.dim, width)):
        raise ValueError(f"num_heads={num_heads} does not fit the rotary embedding: the heads must {misfit}")


def _misfit(dim: int, width: int) -> str:
    """Return why `dim` channels of heads of this width cannot be rotated, or "" if they can."""
    if width < dim:
        return f"be at least dim={dim} wide; got {width}"
    if dim % 2:
        return f"have an even width, since channels are rotated in pairs; got {dim}. Give Rotary a dim"
    return ""
