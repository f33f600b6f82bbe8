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
        adapter: raw input to tokens; see `adapters`. `nn.Identity()` for tensors `b n c`, or
            for `Tokens`, which carry their own mask.
        encoder: tokens to latents; see `Encoder`.
        head: latents to an answer; see `heads`.

    Raises:
        TypeError: a part that is not a module.
        ValueError: parts whose widths (`.dim`, `.input_dim`, where they have them) do not meet.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
        >>> image = pc.adapters.Image(num_channels=3, positions=pc.positions.Fourier(num_axes=2, num_bands=8, max_resolution=32))
        >>> encoder = pc.Encoder(image.dim, num_latents=16, dim=32, num_reads=2, depth=2, num_heads=4)
        >>> model = pc.Perceiver(image, encoder, pc.heads.Classification(encoder.dim, num_classes=10))
        >>> model(torch.rand(2, 3, 31, 23)).shape
        torch.Size([2, 10])

    Reference: Jaegle et al. 2021, "Perceiver: General Perception with Iterative Attention", figure 1.
    """

    def __init__(self, adapter: nn.Module, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        for name, part in (("adapter", adapter), ("encoder", encoder), ("head", head)):
            check_module(name, part)
        check_widths("adapter", adapter, "dim", "encoder", encoder, "input_dim")
        check_widths("encoder", encoder, "dim", "head", head, "dim")
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


def check_module(name: str, part: nn.Module) -> None:
    """Raises TypeError unless a part is a module."""
    if not isinstance(part, nn.Module):
        raise TypeError(f"{name} must be a module; got {type(part).__name__}. Build it first")


def check_widths(giver: str, gives: nn.Module, out: str, taker: str, takes: nn.Module, into: str) -> None:
    """Raises ValueError unless what one part gives is as wide as what the next takes, where both say it."""
    given, taken = getattr(gives, out, None), getattr(takes, into, None)
    if None not in (given, taken) and given != taken:
        raise ValueError(
            f"{taker} must take what {giver} gives: {given} wide; it takes {taken}. Build it with {giver}.{out}"
        )
