"""Small inputs and models, from which valid calls of public classes and functions are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import perceiver_core as pc
from perceiver_core import adapters, heads, positions

Arguments = Callable[[], dict[str, Any]]


class Subject(NamedTuple):
    """Public class or function, with valid arguments.

    Args:
        call: The class or function.
        arguments: Function that returns valid arguments by name.
        methods: Valid arguments of the methods of an instance, by method name.
    """

    call: Callable[..., Any]
    arguments: Arguments = dict
    methods: Mapping[str, Arguments] = {}


def of(call: Callable[..., Any], arguments: Arguments = dict, **methods: Arguments) -> Subject:
    return Subject(call, arguments, {"__call__" if name == "forward" else name: use for name, use in methods.items()})


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def valid(*shape: int) -> Tensor:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., -1:] = False
    return mask


def fourier(axes: int) -> positions.Fourier:
    return positions.Fourier(axes, num_bands=2, max_resolution=7)


def image() -> adapters.Image:
    return adapters.Image(3, positions=fourier(2))


def encoder(input_dim: int) -> pc.Encoder:
    return pc.Encoder(input_dim, num_latents=3, dim=8, num_reads=2, depth=1, num_heads=2)


def text() -> adapters.TokenEmbedding:
    return adapters.TokenEmbedding(11, 8)


def language() -> pc.PerceiverAR:
    return pc.PerceiverAR(text(), num_latents=3, depth=1, num_heads=2).eval()


def perceiver() -> pc.Perceiver:
    return pc.Perceiver(image(), encoder(13), heads.Classification(8, 5)).eval()


def hierarchical() -> pc.HierarchicalPerceiver:
    levels = [pc.Level(2, num_latents=2, dim=8, depth=1, num_heads=2), pc.Level(1, num_latents=3, dim=8, num_heads=2)]
    return pc.HierarchicalPerceiver(3, levels=levels, positions=positions.LearnedGrid((7,), dim=4))


def resampler() -> pc.Resampler:
    return pc.Resampler(8, num_latents=3, depth=1, num_heads=2)


def tokens() -> pc.Tokens:
    return pc.Tokens(drawn(2, 5, 3), (drawn(5, 2),))


def attended() -> dict[str, Any]:
    return {"q": drawn(2, 2, 3, 4), "k": drawn(2, 2, 5, 4), "v": drawn(2, 2, 5, 6), "mask": valid(2, 1, 1, 5)}


def kernel(call: Callable[..., Any], **options: Any) -> Subject:
    return of(call, lambda: attended() | options)


def head(call: Callable[..., Any], arguments: Arguments = dict, **shown: Any) -> Subject:
    return of(call, arguments, forward=lambda: {"latents": drawn(2, 3, 8)} | shown)


def stem(call: Callable[..., Any], **arguments: Any) -> Subject:
    return of(call, lambda: {"num_channels": 3} | arguments, forward=lambda: {"x": drawn(2, 3, 16, 20)})


def where(call: Callable[..., Any], arguments: dict[str, Any], grid: tuple[int, ...], **methods: Arguments) -> Subject:
    return of(call, lambda: dict(arguments), tables=lambda: {"grid": grid, "like": drawn(1)}, **methods)


def activation(call: Callable[..., Any]) -> Subject:
    return of(call, forward=lambda: {"x": drawn(2, 3, 8)})
