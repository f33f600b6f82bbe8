"""Adapter for encoders with a different input for each read (cross-attention to the input)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from perceiver_core.adapters.lengths import Lengths, options
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class PerRead(nn.Module):
    """Adapter for a sequence of inputs, one per read (cross-attention to the input) of the encoder.

    Each input has its own adapter. The attribute `dim` is a tuple of token widths, one per adapter. Pass it to the
    encoder as `input_dim`, and set `num_reads` to the number of adapters.

    Example:
        >>> plane, line = (pc.positions.Fourier(axes, num_bands=4, max_resolution=32) for axes in (2, 1))
        >>> image = pc.adapters.Image(num_channels=3, positions=plane)
        >>> audio = pc.adapters.Audio(patch_size=16, positions=line)
        >>> both = pc.adapters.PerRead([image, audio])
        >>> encoder = pc.Encoder(both.dim, num_latents=5, dim=16, num_reads=2, depth=1, num_heads=2, share=False)
        >>> encoder(both((torch.rand(2, 3, 7, 5), torch.randn(2, 64)))).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, adapters: Sequence[nn.Module]) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.dim = tuple([int(adapter.dim) for adapter in cast(Any, self.adapters)])

    def forward(
        self,
        inputs: Sequence[object],
        *,
        mask: Sequence[Tensor | None] | None = None,
        lengths: Sequence[Lengths | None] | None = None,
    ) -> list[Tokens]:
        """Convert each input to tokens with its own adapter.

        Args:
            inputs: Inputs, one per adapter.
            mask: Masks, one per adapter; None for an input without a mask.
            lengths: Sizes of the inputs before padding, one entry per adapter; None for an input without padding.

        Raises:
            ValueError: If the number of inputs, masks or lengths differs from the number of adapters.
        """
        none = [None] * len(self.adapters)
        masks, sizes = (none if x is None else x for x in (mask, lengths))
        for name, values in (("inputs", inputs), ("mask", masks), ("lengths", sizes)):
            if isinstance(values, Tensor) or len(values) != len(self.adapters):
                got = "one tensor" if isinstance(values, Tensor) else len(values)
                raise ValueError(f"{name} must be {len(self.adapters)}, one per adapter; got {got}")
        each = zip(self.adapters, inputs, masks, sizes, strict=True)
        return [adapter(x, **options(mask=own, lengths=size)) for adapter, x, own, size in each]
