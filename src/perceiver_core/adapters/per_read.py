"""A different input for each read of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class PerRead(nn.Module):
    """Several adapters, one a read: each input goes to its own.

    Give the encoder `adapter.dim`, the widths, and as many reads.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> image = pc.adapters.Image(num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=4, max_resolution=32))
        >>> audio = pc.adapters.Audio(patch_size=16, positions=pc.positions.Fourier(num_axes=1, num_bands=4, max_resolution=32))
        >>> both = pc.adapters.PerRead([image, audio])
        >>> encoder = pc.Encoder(both.dim, num_latents=5, dim=16, num_reads=2, depth=1, num_heads=2, share=False)
        >>> encoder(both((torch.rand(2, 3, 7, 5), torch.randn(2, 64)))).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, adapters: Sequence[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)

    @property
    def dim(self) -> tuple[int, ...]:
        """The width of each input's tokens."""
        return tuple(int(adapter.dim) for adapter in self.adapters)  # type: ignore[arg-type]

    def forward(self, inputs: Sequence[Any], *, mask: Sequence[Tensor | None] | None = None) -> list[Tokens]:
        """The tokens of each input.

        Raises:
            ValueError: another number of inputs or masks than of adapters.
        """
        masks = [None] * len(self.adapters) if mask is None else list(mask)
        for name, given in (("inputs", inputs), ("masks", masks)):
            if isinstance(given, Tensor) or len(given) != len(self.adapters):
                got = "one tensor" if isinstance(given, Tensor) else len(given)
                raise ValueError(f"{name} must be {len(self.adapters)}, one an adapter; got {got}")
        return [adapter(x, mask=m) for adapter, x, m in zip(self.adapters, inputs, masks, strict=True)]
