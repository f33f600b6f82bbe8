"""Adapter for class labels as model inputs."""

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
    """Adapter for class labels: one token per sample.

    Labels are class indices `b` or class probabilities `b num_classes`. Class indices are converted to one-hot vectors
    of the dtype the adapter was last converted to, for example with `.double()`. The adapter has no weights, so the
    state dict does not store this dtype. Probabilities keep their dtype, and their values are not checked.

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
        # `.to()` and `.double()` call this method. The dtype is not tracked with a buffer: a non-persistent buffer
        # could not be loaded, and published state dicts have no entry for a persistent one.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, labels: Shaped[Tensor, " b *classes"]) -> Tokens:
        """Convert labels to tokens.

        Raises:
            TypeError: If `labels` is not a tensor.
            ValueError: If a class index is outside 0 ... num_classes - 1, or the shape is wrong.
        """
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
