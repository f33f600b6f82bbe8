"""Output of a single query, without the query axis."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core.registry import register


@register
class SingleQuery(nn.Module):
    """The only answer, after a head if there is one: logits of a picture from one query.

    Args:
        head: what is done to the answer first.

    Example:
        >>> import torch
        >>> from perceiver_core import heads
        >>> heads.SingleQuery(heads.Linear(32, out_dim=10))(torch.randn(2, 1, 32)).shape
        torch.Size([2, 10])

    Reference: deepmind-research/perceiver/perceiver.py, `ClassificationDecoder`.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.head = nn.Identity() if head is None else head

    @property
    def dim(self) -> int | None:
        """The width of an answer; None where the head does not say it."""
        return getattr(self.head, "dim", None)

    def forward(self, answers: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b values"]:
        """The answer to the only query.

        Raises:
            ValueError: several answers.
        """
        if answers.ndim != 3 or answers.shape[1] != 1:
            raise ValueError(f"answers must be one a sample, b 1 d; got shape {tuple(answers.shape)}")
        only: Tensor = self.head(answers)[:, 0]
        return only
