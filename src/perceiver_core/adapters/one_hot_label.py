"""Class labels among the inputs: one token per sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from perceiver_core import checks
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class OneHotLabel(nn.Module):
    """Adapter for class indices `b`, as one-hot vectors, or class probabilities `b num_classes`: a token per sample.

    One-hot vectors have the dtype that the adapter was last converted to, with `.double()` for example. It has no
    weights that would have that dtype, so it is not saved. Probabilities keep their dtype.

    Example:
        >>> pc.adapters.OneHotLabel(700)(torch.tensor([3, 699])).content.shape
        torch.Size([2, 1, 700])

    Reference: Jaegle et al. 2022 (Perceiver IO), section 4.3 (autoencoding with labels).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        checks.positive(num_classes=num_classes)
        self.dim = num_classes
        self.dtype = torch.get_default_dtype()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneHotLabel:
        # `.to()` and `.double()` call this. The dtype is not that of a buffer, which could not be loaded if it were not
        # saved, and would be one weight more than published models have if it were.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, labels: Shaped[Tensor, " b *classes"]) -> Tokens:
        """Return the tokens; raise ValueError for class indices outside 0 ... num_classes - 1."""
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a torch.Tensor; got {type(labels).__name__}. Convert it: torch.as_tensor(...)"
            )
        if labels.is_floating_point():
            checks.has_shape("labels", labels, "b classes", last=self.dim)
            return Tokens(labels[:, None])
        checks.has_shape("labels", labels, "b")
        checks.below("labels", labels, self.dim)
        return Tokens(F.one_hot(labels.long(), self.dim)[:, None].to(self.dtype))
