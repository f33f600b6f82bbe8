"""Keys and values of an input, ready to be attended to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from perceiver_core.masks import Mask


class KeysValues(NamedTuple):
    """Keys and values of an input, ready to be read, once or many times.

    Example:
        >>> import torch
        >>> from perceiver_core import MultiHeadAttention
        >>> attention = MultiHeadAttention(16, 10, num_heads=2)
        >>> read = attention.keys_values(torch.randn(3, 50, 10))
        >>> attention(torch.randn(3, 7, 16), read).shape
        torch.Size([3, 7, 16])
    """

    keys: Float[Tensor, "b g n d"]
    values: Float[Tensor, "b g n e"]
    mask: Mask | None = None

    def then(self, later: KeysValues) -> KeysValues:
        """These and later ones, one array; their masks are left out, since each was made for its own."""
        return KeysValues(torch.cat([self.keys, later.keys], 2), torch.cat([self.values, later.values], 2))
