"""A label among the inputs: one token."""

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
    """Class numbers `b`, or probabilities of classes `b classes`, to a token each.

    Class numbers become tokens of the dtype that the adapter was last converted to, `.double()` for example: it has no
    weights to go by, so a file does not say it. Probabilities keep theirs.

    Args:
        num_classes: how many; the width of the token.

    Example:
        >>> import torch
        >>> import perceiver_core as pc
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
        # What `.to()` and `.double()` call. A buffer that is not saved could not be loaded, and one that is would be a
        # weight more than published models have.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, labels: Shaped[Tensor, " b *classes"]) -> Tokens:
        """The tokens.

        Raises:
            TypeError: labels that are not a tensor.
            ValueError: another shape, or class numbers that there are not.
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
