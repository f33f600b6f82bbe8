"""Output of a decoder with one query."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from perceiver_core.registry import register


@register
class SingleQuery(nn.Module):
    """Output of the only query, without the query axis, such as the logits of an image; `head` is applied first.

    Example:
        >>> pc.heads.SingleQuery(pc.heads.Linear(32, out_dim=10))(torch.randn(2, 1, 32)).shape
        torch.Size([2, 10])

    Reference: deepmind-research/perceiver/perceiver.py, `ClassificationDecoder`.
    """

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.head = nn.Identity() if head is None else head
        self.dim = getattr(head, "dim", None)

    def forward(self, outputs: Float[Tensor, "b 1 d"]) -> Float[Tensor, "b values"]:
        """Return the output of the only query; raise ValueError if there are more."""
        if outputs.ndim != 3 or outputs.shape[1] != 1:
            raise ValueError(f"outputs must be one per sample, b 1 d; got shape {tuple(outputs.shape)}")
        return self.head(outputs)[:, 0]
