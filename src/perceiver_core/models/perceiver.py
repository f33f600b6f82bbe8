"""The Perceiver: adapter, encoder, head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perceiver_core.registry import register


@register
class Perceiver(nn.Module):
    """Whatever the adapter takes, to whatever the head gives.

        raw input --adapter--> tokens --encoder--> latents --head--> answer

    Args:
        adapter: raw input to tokens; see `adapters`. `nn.Identity()` for tensors `b n c`.
        encoder: tokens to latents; see `Encoder`.
        head: latents to an answer; see `heads`.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> image = pc.adapters.Image(channels=3, positions=pc.positions.Fourier(axes=2, bands=8, max_resolution=32))
        >>> encoder = pc.Encoder(image.dim, latents=16, dim=32, reads=2, depth=2, heads=4)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Classify(encoder.dim, classes=10))
        >>> model(torch.rand(2, 3, 31, 23)).shape
        torch.Size([2, 10])

    Reference: Jaegle et al. 2021, "Perceiver: General Perception with Iterative Attention", figure 1.
    """

    def __init__(self, adapter: nn.Module, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.adapter, self.encoder, self.head = adapter, encoder, head

    def forward(self, inputs: Any, *, mask: Any = None) -> Tensor:
        """The head's answer.

        Args:
            inputs: what the adapter takes: pictures `b c h w`, samples `b s`, points `b n f`, ...
            mask: which tokens are there, True = attend, in the shape that the adapter says.
        """
        tokens = self.adapter(inputs) if mask is None else self.adapter(inputs, mask=mask)
        answer: Tensor = self.head(self.encoder(tokens))
        return answer
