"""Adapter for class labels as model inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from perceiver_core import checks
from perceiver_core.registry import register
from perceiver_core.tokens import Tokens


@register
class OneHotLabel(nn.Module):
    """Adapter for class labels: one token per sample.

    Labels are class indices `b` or class probabilities `b num_classes`. Class indices are converted to one-hot vectors.
    These have PyTorch's default dtype, unless the adapter is converted to another dtype, for example with `.double()`.
    The state dict does not store the dtype. Class probabilities keep their own dtype, and their values are not checked.

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
        # `.to()` and `.double()` call this method. A buffer would not do to track the dtype: a state dict does not
        # load non-persistent buffers, and published state dicts do not contain a persistent one.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, labels: Shaped[Tensor, " b *classes"]) -> Tokens:
        """Convert labels to tokens.

        Raises:
            TypeError: If `labels` is not a tensor.
            ValueError: If the shape is wrong, or a class index is out of range (checked on the CPU in eager mode only).
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
        classes = torch.arange(self.dim, device=labels.device)
        return Tokens((labels[:, None, None] == classes).to(self.dtype))  # torch.vmap does not support F.one_hot
