"""Positions, random points, and the check that all queries share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_core import Tokens
from perceiver_core.positions import Fourier

EXACT = {"rtol": 0, "atol": 1e-12}


def fourier(axes: int) -> Fourier:
    return Fourier(num_axes=axes, num_bands=3, max_resolution=11)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def check_some(source: nn.Module, tokens: Tokens | None, count: int) -> None:
    """Checks that indices select rows of all queries, for all samples or for each its own."""
    queried = source(tokens)
    assert queried.shape[1:] == (count, source.dim)
    one = torch.tensor([count - 1, 0, count // 2, 0])
    torch.testing.assert_close(source(tokens, query_indices=one), queried[:, one], **EXACT)
    each = torch.stack([one, (one + 1) % count])
    rows = queried.expand(2, -1, -1)
    expected = torch.stack([row[a] for row, a in zip(rows, each, strict=True)])
    torch.testing.assert_close(source(tokens, query_indices=each), expected, **EXACT)
